"""Prepared data and indexes as input: what of them cannot be read is told record by record."""

import contextlib
import json
import pathlib
import threading

import fsspec
import pytest
from in_place_cases import make, write_tar
from prepare_cases import encode, import_data, reasons_of

from coca_jax.data import filters, prepare
from coca_jax.data.sources import array_record, files, lists, registry
from coca_jax.data.sources.items import Options
from coca_jax.runtime import unreachable

COUNT = 12


def write_pictures(folder, count=COUNT):
    folder.mkdir()
    for n in range(count):
        (folder / f"{n:03d}.jpg").write_bytes(encode(n))
        (folder / f"{n:03d}.txt").write_text(f"caption {n}")
    return folder


def keys(out):
    return [record.key for record in filters.open_source(str(out))]


def test_pictures_behind_an_index_that_are_gone_or_changed_are_those_records_alone(tmp_path):
    """The rest of up to 4,096 records was lost with the first of them."""
    data = write_pictures(tmp_path / "data")
    make("sidecars", data, tmp_path / "index", in_place=True)
    (data / "003.jpg").unlink()
    (data / "007.jpg").write_bytes(encode(1))
    done = import_data("prepared", tmp_path / "index", tmp_path / "copy")
    assert (done["read"], done["written"]) == (COUNT, COUNT - 2)
    assert done["quarantined"] == {"missing_image": 2}
    assert reasons_of(tmp_path / "copy") == {"003": "missing_image", "007": "missing_image"}
    assert keys(tmp_path / "copy") == [f"{n:03d}" for n in range(COUNT) if n not in (3, 7)]
    lines = (tmp_path / "copy/train-quarantine.jsonl").read_text().splitlines()
    told = [json.loads(line)["detail"] for line in lines]
    assert "No such file" in told[0] and "index the data again" in told[1]


def test_a_damaged_record_is_one_entry(tmp_path):
    data = write_pictures(tmp_path / "data")
    import_data("sidecars", data, tmp_path / "one")
    (shard,) = (tmp_path / "one").glob("*.array_record")
    whole = bytearray(shard.read_bytes())
    whole[whole.find(encode(5)) + 40] ^= 255
    shard.write_bytes(whole)
    done = import_data("prepared", tmp_path / "one", tmp_path / "two")
    assert done["read"] == COUNT and done["quarantined"] == {"damaged_archive": 1}
    assert reasons_of(tmp_path / "two") == {"train/5": "damaged_archive"}
    assert keys(tmp_path / "two") == [f"{n:03d}" for n in range(COUNT) if n != 5]


def test_prepared_data_that_are_removed_meanwhile_end_the_import(tmp_path):
    data = write_pictures(tmp_path / "data")
    import_data("sidecars", data, tmp_path / "one")
    units = registry.find("prepared").plan(str(tmp_path / "one"), "train", Options())
    (tmp_path / "one").rename(tmp_path / "two")
    job = prepare.Job(0, tuple(units), "prepared", Options(), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list(prepare.read_items(job))


@contextlib.contextmanager
def silent(method, monkeypatch):
    """A store that answers nothing but what it has answered before."""

    def refuse(*args, **keywords):
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), method, refuse)
        yield


@pytest.mark.parametrize("kind", ["index", "copy"])
def test_a_store_that_is_away_is_no_damage(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "a/a.tar", 0, COUNT)
    system = fsspec.filesystem("memory")
    place = pathlib.PurePath("/away") / kind
    system.pipe_file(f"{place}/a.tar", (tmp_path / "a/a.tar").read_bytes())
    url = f"memory:/{place}"
    index = kind == "index"
    where = str(tmp_path / "made") if index else f"{url}/made"
    make("webdataset", f"{url}/a.tar", where, in_place=index)
    out = tmp_path / "out"
    with silent("cat_ranges" if index else "get_file", monkeypatch):
        with pytest.raises(unreachable.Unreachable, match="no answer.*the same command again"):
            import_data("prepared", where, out)
    assert not (out / "manifest.json").exists()
    done = import_data("prepared", where, out)
    assert done["written"] == done["read"] == COUNT and not done["quarantined"]
    system.rm("/away", recursive=True)


def test_a_picture_that_is_gone_from_a_store_is_that_record_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "a/0.tar", 0, 4)
    system = fsspec.filesystem("memory")
    for n in range(2):
        system.pipe_file(f"/gone/{n}.tar", (tmp_path / "a/0.tar").read_bytes())
    make("webdataset", "memory://gone/{0,1}.tar", tmp_path / "made", in_place=True)
    system.rm("/gone/0.tar")
    done = import_data("prepared", tmp_path / "made", tmp_path / "out")
    assert done["read"] == 8 and done["quarantined"] == {"missing_image": 4}
    assert keys(tmp_path / "out") == [f"1.tar/00000{n}" for n in range(4)]
    system.rm("/gone", recursive=True)


def test_the_shards_of_data_in_a_bucket_are_asked_for_at_once_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "ROWS_PER_UNIT", 3)
    out, size, asked = "memory://asked/out", files.size, []
    import_data("sidecars", write_pictures(tmp_path / "data"), out, shard_count=4)
    all_here = threading.Barrier(4)

    def ask(path):
        asked.append(path)
        all_here.wait(20)  # raises where they are not asked for together
        return size(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "size", ask)
        patched.setattr(array_record, "ROWS_PER_UNIT", 5)
        units = array_record.plan(out, "train", Options())
        asked.clear()
        found = [item.key for unit in units for item in array_record.read(unit, Options())]
    assert len(units) == 3 and found == [f"{n:03d}" for n in range(COUNT)]
    names = [path.rpartition("/")[2] for path in asked]
    assert sorted(names) == [f"train-{n:05d}-of-00004.array_record" for n in range(4)]
    fsspec.filesystem("memory").rm(out.rpartition("/")[0], recursive=True)
