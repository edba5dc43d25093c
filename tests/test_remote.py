"""Buckets: prepare and training by URL, against an S3 server on this machine."""

import io
import json
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from coca_jax.cli import prepare
from coca_jax.data import filters
from coca_jax.data import prepare as shards
from coca_jax.data.batches import open_stream
from coca_jax.data.sources import array_record, files
from coca_jax.recipes import base
from coca_jax.training import run_vocabulary


def _image(index):
    out = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), index * 5 % 256, np.uint8)).save(out, "PNG")
    return out.getvalue()


def _tar(start, count):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for index in range(start, start + count):
            text = f"caption {index}".encode()
            for name, data in ((f"{index:04d}.png", _image(index)), (f"{index:04d}.txt", text)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def bucket(s3):
    return s3


def _prepare(format, input, out, processes=1):
    return prepare.prepare(format, input, out, processes=processes, progress=False)


def test_prepare_and_train_by_url(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("s3")
    for number in range(3):
        system.pipe_file(f"bucket/tars/{number}.tar", _tar(number * 8, 8))
        (tmp_path / "tars").mkdir(exist_ok=True)
        (tmp_path / f"tars/{number}.tar").write_bytes(_tar(number * 8, 8))
    out = f"{bucket}/prepared/tars"
    result = _prepare("webdataset", f"{bucket}/tars", out, processes=2)
    assert (result["read"], result["written"], result["shards"]) == (24, 24, 3)
    local = str(tmp_path / "local")
    _prepare("webdataset", str(tmp_path / "tars"), local)
    here, there = (array_record.read_manifest(path)["splits"]["train"] for path in (local, out))
    assert here["shards"] == there["shards"]  # names, counts and checksums
    assert not [name for name in system.find("bucket/prepared") if "unfinished" in name]
    before = system.checksum("bucket/prepared/tars/train-00000-of-00003.array_record")
    assert _prepare("webdataset", f"{bucket}/tars", out) == result  # nothing is left to do
    after = system.checksum("bucket/prepared/tars/train-00000-of-00003.array_record")
    assert before == after

    batches = []
    for path in (local, out, out):
        config = base.get_config()
        config.batch_size = 8
        config.model.image_size, config.model.patch_size = 16, 8
        config.model.text.update(vocab_size=400, max_len=16)
        config.data.sources = (dict(path=path, kind="caption"),)
        vocabulary = run_vocabulary.load_or_train(config, str(tmp_path / "run"))
        batches.append(next(open_stream(config, vocabulary)))
    for batch in batches[1:]:
        assert all(np.array_equal(batch[name], batches[0][name]) for name in batch)
    copies = [file for file in (tmp_path / "cache/coca_jax/shards").iterdir() if not file.suffix]
    assert len(copies) == 3  # each shard came once


def test_an_interrupted_import_goes_on_in_the_bucket(bucket, monkeypatch):
    system = fsspec.filesystem("s3")
    for number in range(3):
        system.pipe_file(f"bucket/more/{number}.tar", _tar(number * 4, 4))
    out, written = f"{bucket}/prepared/more", []
    whole = shards.write

    def dies(job, report):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(job.number)
        return whole(job, report)

    monkeypatch.setattr(shards, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        _prepare("webdataset", f"{bucket}/more", out)
    monkeypatch.setattr(
        shards,
        "write",
        lambda job, report: written.append(job.number) or whole(job, report),
    )
    assert _prepare("webdataset", f"{bucket}/more", out)["written"] == 12
    assert written == [0, 1, 2]  # finished shards are not done again
    assert len(list(filters.open_source(out))) == 12


def test_lists_and_tables_in_a_bucket(bucket):
    system = fsspec.filesystem("s3")
    rows = "".join(f"images/{i}.png\tcaption {i}\n" for i in range(5))
    system.pipe_file("bucket/list/train.tsv", ("filepath\ttitle\n" + rows).encode())
    for i in range(5):
        system.pipe_file(f"bucket/list/images/{i}.png", _image(i))
    table = pa.table(
        {"image": [_image(i) for i in range(5)], "caption": [f"caption {i}" for i in range(5)]}
    )
    with files.filesystem(f"{bucket}/table/train.parquet")[0].open(
        "bucket/table/train.parquet", "wb"
    ) as file:
        pq.write_table(table, file)
    lines = "".join(
        json.dumps(dict(file_name=f"images/{i}.png", text=f"caption {i}")) + "\n" for i in range(5)
    )
    system.pipe_file("bucket/list/metadata.jsonl", lines.encode())
    for format, folder in (("csv", "list"), ("parquet", "table"), ("imagefolder", "list")):
        out = f"{bucket}/prepared/{format}"
        assert _prepare(format, f"{bucket}/{folder}", out)["written"] == 5
        found = list(filters.open_source(out))
        assert [r.texts for r in found] == [(f"caption {i}",) for i in range(5)]
        assert [r.image for r in found] == [_image(i) for i in range(5)]


def test_unknown_kinds_of_url_are_named():
    with pytest.raises(ValueError, match="nothing://bucket"):
        files.filesystem("nothing://bucket/a")
