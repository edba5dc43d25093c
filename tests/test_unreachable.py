"""A store that stops giving in the middle of a file ends an import, and takes nothing from it."""

import io
import json
import re
import socket
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import picture
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from coca_jax.data import prepare as splits
from coca_jax.data.sources import files, references
from coca_jax.data.sources.items import Options
from coca_jax.runtime import unreachable

COUNT = 12


class Flaky(LocalFileSystem):
    """Local files by flaky://PATH, which end after `left` more bytes with an error."""

    protocol = "flaky"
    left = 1 << 60

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("flaky://"))

    def _open(self, path, mode="rb", **unused):
        return Stuttering(path) if mode == "rb" else super()._open(path, mode, **unused)


class Stuttering(io.FileIO):
    def read(self, size=-1):
        data = super().read(size)
        Flaky.left -= len(data)
        if Flaky.left < 0:
            raise ConnectionResetError("the peer has gone")
        return data

    def readinto(self, buffer):
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture(autouse=True)
def as_bucket(monkeypatch):
    monkeypatch.setattr(references, "_SCHEMES", (*references._SCHEMES, "flaky"))


def png(number):
    out = io.BytesIO()
    Image.fromarray(picture(number)).save(out, "PNG")
    return out.getvalue()


def write_tar(folder):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(COUNT):
            for suffix, data in ((".png", png(number)), (".txt", b"a picture")):
                member = tarfile.TarInfo(f"{number:03d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_parquet(folder):
    rows = dict(image=[png(n) for n in range(COUNT)], text=["a picture"] * COUNT)
    pq.write_table(pa.table(rows), folder / "0.parquet", row_group_size=2)


def write_list(folder):
    for number in range(COUNT):
        (folder / f"{number:03d}.png").write_bytes(png(number))
    lines = [json.dumps(dict(image=f"{n:03d}.png", text="a picture")) for n in range(COUNT)]
    (folder / "0.jsonl").write_text("\n".join(lines))


def write_csv(folder):
    write_list(folder)
    (folder / "0.jsonl").unlink()
    rows = ["image,text", *(f"{n:03d}.png,a picture" for n in range(COUNT))]
    (folder / "0.csv").write_text("\n".join(rows))


def write_sidecars(folder):
    for number in range(COUNT):
        (folder / f"{number:03d}.png").write_bytes(png(number))
        (folder / f"{number:03d}.txt").write_text("a picture")


WRITERS = dict(
    webdataset=write_tar,
    parquet=write_parquet,
    jsonl=write_list,
    csv=write_csv,
    sidecars=write_sidecars,
)


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in_place"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_store_that_stops_ends_an_import_that_goes_on(name, in_place, tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    WRITERS[name](data)
    format = "jsonl" if name == "packed" else name
    url = f"flaky://{data}" + (f"/0.{name}" if name in ("csv", "jsonl") else "")

    def prepare():
        options = Options(in_place=in_place)
        return splits.prepare(format, url, str(out), options=options, processes=1, progress=False)

    monkeypatch.setattr(Flaky, "left", 6 * len(png(0)))
    with pytest.raises(unreachable.Unreachable, match="ConnectionResetError: the peer") as raised:
        prepare()
    assert str(data) in str(raised.value) and "give the same command again" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (out / "manifest.json").exists()  # neither a short split nor a list of faults
    monkeypatch.setattr(Flaky, "left", 1 << 60)
    done = prepare()
    assert done["written"] == done["read"] == COUNT and not done["quarantined"]


def test_finished_shards_stay(tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write_tar(data)
    tar = data / "0.tar"
    size = tar.stat().st_size
    for number in (1, 2):
        (data / f"{number}.tar").write_bytes(tar.read_bytes())
    keywords = dict(options=Options(in_place=True), processes=1, progress=False)
    monkeypatch.setattr(Flaky, "left", size)  # the second ends in its first half or so
    with pytest.raises(unreachable.Unreachable, match=r"1\.tar"):
        splits.prepare("webdataset", f"flaky://{data}", str(out), **keywords)
    tar.unlink()  # it is not read again
    monkeypatch.setattr(Flaky, "left", 1 << 60)
    done = splits.prepare("webdataset", f"flaky://{data}", str(out), **keywords)
    assert done["written"] == 3 * COUNT and not done["quarantined"]


def test_what_a_store_says_is_no_failure(tmp_path):
    """An image that is not there is that row's problem, as before."""
    write_list(tmp_path)
    (tmp_path / "003.png").unlink()
    out = tmp_path / "out"
    done = splits.prepare(
        "jsonl", f"flaky://{tmp_path}/0.jsonl", str(out), processes=1, progress=False
    )
    assert done["written"] == COUNT - 1 and done["quarantined"] == {"missing_image": 1}


@pytest.mark.parametrize("scheme", ["http", "ftp"])
def test_an_address_that_is_not_reached_is_named_and_no_missing_file(scheme):
    """http:// was a file that is not there, of which an import would go on without it."""
    with socket.socket() as held:  # bound, and it does not listen: refused
        held.bind(("127.0.0.1", 0))
        url = f"{scheme}://127.0.0.1:{held.getsockname()[1]}/x.jpg"
        with unreachable.noting() as noted:
            with pytest.raises(
                ConnectionError, match=f"{re.escape(url)} cannot be reached: .*onnect"
            ):
                files.read_image(url)
    assert [path for path, _ in noted] == [url]
