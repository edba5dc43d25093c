"""Splits that share a folder: what one may be beside another, what is written anew, at once."""

import threading
import time

import pytest
from prepare_cases import encode

from coca_jax.data import prepared, sources
from coca_jax.importers import metadata, splits
from coca_jax.importers.items import Options

QUIET = dict(progress=False, processes=1)


def pictures(folder, numbers, label=lambda i: "cat"):
    """An imagefolder of pictures with a caption and a label each."""
    folder.mkdir()
    rows = ["file_name,text,label"]
    for i in numbers:
        (folder / f"{i}.jpg").write_bytes(encode(i))
        rows.append(f"{i}.jpg,text {i},{label(i)}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return str(folder)


def written(input, out, **keywords):
    return splits.prepare("imagefolder", input, str(out), **QUIET | keywords)


def halved(input, out, share=0.4, **keywords):
    return splits.prepare_with_holdout("imagefolder", input, str(out), share, **QUIET | keywords)


def images(out, split="train"):
    return {record.image for record in sources.open_source(str(out), split)}


def test_nothing_is_held_out_of_a_split_that_has_all(tmp_path):
    folder, out = pictures(tmp_path / "a", range(20)), tmp_path / "p"
    written(folder, out)
    with pytest.raises(ValueError, match="already holds a split 'train' made with other options"):
        halved(folder, out)
    assert list(prepared.read_manifest(str(out))["splits"]) == ["train"]
    rest, held = halved(folder, out, overwrite=True)
    assert rest["written"] + held["written"] == 20 and held["written"] > 2
    assert not images(out) & images(out, "test")
    # Nor does what was held out come back.
    line = "holds a split 'test' of images held out of the same input, .* give --holdout=0.4, or"
    with pytest.raises(ValueError, match=line):
        written(folder, out, overwrite=True)
    halved(folder, out, 0.2, overwrite=True)
    assert not images(out) & images(out, "test") and len(images(out)) > rest["written"]
    written(folder, out, split="none", options=Options(where=(("label", ("cat",)),)))


def test_two_splits_at_once_are_both_there(tmp_path):
    folder, out = pictures(tmp_path / "a", range(3)), tmp_path / "p"
    out.mkdir()
    thread = threading.Thread(target=written, args=(folder, out))
    with metadata.changing(str(out)) as manifest:  # as another process does
        thread.start()
        while thread.is_alive() and not list(out.glob("train-*-of-*.array_record")):
            time.sleep(0.01)
        time.sleep(0.1)  # now it has its turn, and waits
        assert not (out / "manifest.json").exists()
        shard = dict(file="test-00000-of-00001.array_record", count=1, bytes=9, sha256="")
        counts = dict(count=1, with_text=1, with_label=0)
        manifest["splits"]["test"] = counts | dict(shards=[shard])
    thread.join()
    assert sorted(prepared.read_manifest(str(out))["splits"]) == ["test", "train"]
