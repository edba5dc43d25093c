"""Splits that share a folder: what one may be beside another, what is written anew, at once."""

import pathlib
import threading
import time

import pytest
from prepare_cases import encode, write_tar

from coca_jax.data import filters, image_files, prepare, quarantine
from coca_jax.data import images as image_data
from coca_jax.data.sources import array_record, formats
from coca_jax.data.sources import manifest as metadata
from coca_jax.data.sources.items import Item, Options
from coca_jax.training import data_flag

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
    return prepare.prepare("imagefolder", input, str(out), **QUIET | keywords)


def halved(input, out, share=0.4, **keywords):
    return prepare.prepare_with_holdout("imagefolder", input, str(out), share, **QUIET | keywords)


def images(out, split="train"):
    return {record.image for record in filters.open_source(str(out), split)}


def test_nothing_is_held_out_of_a_split_that_has_all(tmp_path):
    folder, out = pictures(tmp_path / "a", range(20)), tmp_path / "p"
    written(folder, out)
    with pytest.raises(ValueError, match="already holds a split 'train' made with other options"):
        halved(folder, out)
    assert list(array_record.read_manifest(str(out))["splits"]) == ["train"]
    rest, held = halved(folder, out, overwrite=True)
    assert rest["written"] + held["written"] == 20 and held["written"] > 2
    assert not images(out) & images(out, "test")
    # Nor does what was held out come back.
    line = "holds a split 'test' of images held out of the same input, .* give --holdout=0.4, or"
    with pytest.raises(ValueError, match=line):
        written(folder, out, overwrite=True)
    # Nor is a split cut out of it under another name.
    written(folder, tmp_path / "q")
    line = "holds a split 'train' of the same input, in which the images that --holdout keeps apart"
    with pytest.raises(ValueError, match=line):
        halved(folder, tmp_path / "q", split="val", overwrite=True)
    assert list(array_record.read_manifest(str(tmp_path / "q"))["splits"]) == ["train"]
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
    assert sorted(array_record.read_manifest(str(out))["splits"]) == ["test", "train"]


def test_what_is_written_anew_leaves_neither_classes_nor_shards(tmp_path):
    urls = pictures(tmp_path / "a", range(12), lambda i: f"url{i}")
    pets, out = pictures(tmp_path / "b", range(12), lambda i: ("cat", "dog")[i % 2]), tmp_path / "p"
    halved(urls, out)
    written(pictures(tmp_path / "c", range(3), lambda i: "cow"), out, split="web")

    def names():
        return array_record.read_manifest(str(out))["class_names"]

    assert names() == sorted(["cow", *(f"url{i}" for i in range(12))])
    halved(pets, out, overwrite=True)
    assert names() == ["cat", "cow", "dog"]
    # One that is of before splits told their classes may have any of them.
    with metadata.changing(str(out)) as manifest:
        del manifest["splits"]["web"]["classes"]
    halved(urls, out, overwrite=True)
    assert names() == sorted(["cat", "cow", "dog", *(f"url{i}" for i in range(12))])
    tars = tmp_path / "t"
    tars.mkdir()
    for number in range(4):
        write_tar(tars / f"{number}.tar", 2, 2 * number)
    for count in (1, 4, 2):
        prepare.prepare("webdataset", str(tars), str(out), split="tar", shard_count=count,
                       overwrite=True, **QUIET)  # fmt: skip
        there = sorted(path.name for path in out.glob("tar-*.array_record"))
        assert there == [f"tar-{i:05d}-of-{count:05d}.array_record" for i in range(count)]
    assert len(images(out, "tar")) == 8 and len(images(out, "web")) == 3


def test_a_folder_may_be_a_url_of_this_machine(tmp_path):
    folder = pathlib.Path(pictures(tmp_path / "a a", range(12))).as_uri()
    assert "a%20a" in folder and formats.guess(folder) == "imagefolder"
    assert len(image_files.find([folder])) == 12
    picture = next((tmp_path / "a a").rglob("*.jpg"))
    assert (image_data.decode(picture.as_uri()) == image_data.decode(picture)).all()
    out = f"file://{tmp_path}/b%20c"
    rest, held = halved(folder, out, options=Options(in_place=True))
    assert rest["written"] + held["written"] == 12 == len(images(out) | images(out, "test"))
    assert images(out) == images(tmp_path / "b c")


def test_what_a_holdout_or_sample_left_is_drawn_from_anew(tmp_path):
    folder, half = pictures(tmp_path / "a", range(40)), dict(options=Options(sample=0.5))
    first = halved(folder, tmp_path / "1", 0.5)
    # A first holdout is what it always was.
    share = {encode(i) for i in range(40) if quarantine.is_held_out(encode(i), 0.5)}
    assert share == images(tmp_path / "1", "test") and len(share) == first[1]["written"]
    assert quarantine.place(b"a") == 0.055776611622499375
    left = len(images(tmp_path / "1"))
    for number in (1, 2):  # of what is left, and of what is left of that
        out = str(tmp_path / f"{number + 1}")
        prepare.prepare_with_holdout("prepared", str(tmp_path / f"{number}"), out, 0.5, **QUIET)
        rest, held = images(out), images(out, "test")
        assert rest | held == images(tmp_path / f"{number}") and not rest & held
        assert 0.1 * left < len(held) < 0.9 * left
        left = len(rest)
    counts = [written(folder, tmp_path / "s1", **half)["written"]]
    for number in (1, 2):
        place = str(tmp_path / f"s{number}"), str(tmp_path / f"s{number + 1}")
        counts.append(prepare.prepare("prepared", *place, **QUIET, **half)["written"])
        assert 0.2 * counts[-2] < counts[-1] < 0.8 * counts[-2]
    other = dict(options=Options(sample=0.5, seed=1))  # is another sample already
    prepare.prepare("prepared", str(tmp_path / "s1"), str(tmp_path / "o"), **QUIET, **other)
    keys = [r.key for r in filters.open_source(str(tmp_path / "o"))]
    asked = [Item(r.key) for r in filters.open_source(str(tmp_path / "s1"))]
    assert keys == [one.key for one in asked if not quarantine.wanted(one, other["options"])]


def test_a_holdout_of_what_an_earlier_one_left_as_plain_files_says_so(tmp_path):
    left = [i for i in range(50) if not quarantine.is_held_out(encode(i), 0.3)]
    taken = [i for i in range(50) if i not in left]
    a, b = pictures(tmp_path / "a", left), pictures(tmp_path / "b", taken)
    why = "as they are equal or what an earlier holdout"
    with pytest.raises(ValueError, match=rf"{why} left \(try a larger share\); give another share"):
        halved(a, tmp_path / "p", 0.3)
    with pytest.raises(ValueError, match=rf"{why} took \(try a smaller share\)"):
        halved(b, tmp_path / "q", 0.5)
    with pytest.raises(ValueError, match=f"{why} left .*; give more pictures, or what"):
        data_flag.bring_in(data_flag.layout(a), str(tmp_path / "run/a"), holdout=0.3)


@pytest.mark.parametrize(
    "damage, why",
    [
        (dict(drawn=[1]), "what was drawn of split 'train' is no count and seeds: "),
        (dict(drawn=dict(holdouts=1 << 80, seeds=[])), "what was drawn of split 'train' is no"),
        (dict(drawn=dict(holdouts=1, seeds=["a"])), "what was drawn of split 'train' is no count"),
        (dict(classes=[1]), "the classes of split 'train' are no list of texts"),
    ],
)
def test_a_manifest_that_counts_otherwise_is_damaged(damage, why, tmp_path):
    written(pictures(tmp_path / "a", range(2)), tmp_path / "p")
    with metadata.changing(str(tmp_path / "p")) as manifest:
        manifest["splits"]["train"] |= damage
    with pytest.raises(ValueError, match=f"manifest.json is damaged: {why}"):
        prepare.prepare("prepared", str(tmp_path / "p"), str(tmp_path / "q"), **QUIET)
