"""Folders of pictures as people and their tools leave them: splits by names, texts beside pictures,
class folders, what a line says of them."""

import json
import os
import tarfile

import pytest
from prepare_cases import encode, import_data, write_tar

from coca_jax.data import (
    evaluation_data,
    filters,
    holdout,
    image_files,
    prepare,
    quarantine,
)
from coca_jax.data.sources import files, formats, image_folder, lists
from coca_jax.data.sources.items import Options
from coca_jax.training import data_flag


def beside(folder, texts, suffix=".txt", first=0):
    """A picture for each name, numbered, with its text beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, text) in enumerate(texts.items(), first):
        (folder / f"{name}.jpg").write_bytes(encode(number))
        if text is not None:
            (folder / f"{name}{suffix}").write_text(text)
    return folder


def in_folders(root, folders, count=3):
    """`count` pictures in each of the folders, all of them different."""
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            (root / folder / f"{i}.jpg").write_bytes(encode(100 * number + i))
    return root


def brought(format, input, out, split="train", **options):
    """{key: (texts, labels)} of what is imported, its images being those of the input."""
    import_data(format, input, out, split=split, **options)
    found = list(filters.open_source(str(out), split))
    return {record.key: (record.texts, record.labels) for record in found}


def test_names_of_images_make_no_splits_and_names_of_tars_do(tmp_path, capsys):
    names = [f"test_{i:02d}" for i in range(4)] + [f"train_{i:02d}" for i in range(4, 12)]
    folder = beside(tmp_path / "a", {name: f"text of {name}" for name in names})
    assert prepare.splits_of("sidecars", str(folder)) == []
    found = brought("sidecars", folder, tmp_path / "p")
    assert found == {name: ((f"text of {name}",), ()) for name in names}
    found = brought("sidecars", f"{folder}/*_1?.jpg", tmp_path / "r")
    assert sorted(found) == ["train_10", "train_11"]
    # Of tars some may tell a split; the others are not read.
    for number, name in enumerate(("bus", "plane", "train", "val")):
        write_tar(tmp_path / f"{name}.tar", 2, start=2 * number)
    assert len(brought("webdataset", tmp_path, tmp_path / "q")) == 2
    assert len(brought("webdataset", tmp_path, tmp_path / "q", "val")) == 2


def test_the_field_split_beside_pictures_is_looked_for_in_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "ROWS_PER_UNIT", 2)
    rows = {f"{n}": json.dumps(dict(text=f"no. {n}", split=s)) for n, s in enumerate(8 * ["train"])}
    rows |= {"8": json.dumps(dict(text="no. 8", split="test"))}
    folder = beside(tmp_path / "a", rows, ".json")
    told = holdout.find_splits("sidecars", str(folder), Options())
    assert told.rows == dict(train=8, test=1) and told.values["test"] == ("test",)


def test_a_folder_is_listed_once_however_many_units_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "ROWS_PER_UNIT", 2)
    folder, asked, walk = in_folders(tmp_path / "a", ("cat", "dog")), [], os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: asked.append(a) or walk(*a, **k))
    units = image_folder.plan(str(folder), "", Options())
    listed = len(asked)
    found = [item for unit in units for item in image_folder.read(unit, Options())]
    names = [f"{name}/{n}.jpg" for name in ("cat", "dog") for n in range(3)]
    assert [item.key for item in found] == names and [unit.rows for unit in units] == [2, 2, 2]
    assert [item.image for item in found] == [(folder / name).read_bytes() for name in names]
    assert len(asked) == listed  # none of the units lists it again


def test_a_byte_order_mark_costs_no_line_and_no_file(tmp_path):
    rows = [json.dumps(dict(file_name=f"{n}.jpg", text=f"no. {n}")) for n in range(2)]
    for name, texts, suffix in (("a", "ab", ".json"), ("b", "01", ".none")):
        beside(tmp_path / name, dict.fromkeys(texts, '\ufeff{"text": "one"}'), suffix)
    (tmp_path / "b/metadata.jsonl").write_text("\ufeff" + "\n".join(rows))
    found = brought("sidecars", tmp_path / "a", tmp_path / "p")
    assert found == {name: (("one",), ()) for name in "ab"}
    found = brought("imagefolder", tmp_path / "b", tmp_path / "q")
    assert found == {f"{n}.jpg": ((f"no. {n}",), ()) for n in range(2)}


def test_texts_that_were_edited_are_evaluated_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entry = dict(path=str(tmp_path / "a"), kind="caption")

    def read():
        found = evaluation_data.open_source(entry, "test")
        return [text for record in found for text in record.texts]

    beside(tmp_path / "a/below", {"1": "one", "2": "two"})
    beside(tmp_path / "a", {"3": "three"}, first=2)
    assert sorted(read()) == ["one", "three", "two"]
    folder = (tmp_path / "a/below").stat()
    (tmp_path / "a/below/1.txt").write_text("a longer one")
    os.utime(tmp_path / "a/below", ns=(folder.st_atime_ns, folder.st_mtime_ns))
    assert sorted(read()) == ["a longer one", "three", "two"]
    text = tmp_path / "a/3.txt"  # of the same size
    edited = text.stat().st_mtime_ns + 10**9
    text.write_text("drei!")
    os.utime(text, ns=(edited, edited))
    assert sorted(read()) == ["a longer one", "drei!", "two"]
    (tmp_path / "a/run.log").write_text("of a run")  # is neither a picture nor a text of one
    assert sorted(read()) == ["a longer one", "drei!", "two"]
    assert len(list((tmp_path / "cache/coca_jax/indexes").glob("*.lock"))) == 3


@pytest.mark.parametrize(
    "root, folders, found",
    [
        ("", ("Training", "Testing"), ["test", "train"]),
        ("", ("TRAIN", "Valid"), ["train", "valid"]),
        ("images", ("train", "Dev"), ["dev", "train"]),
        ("a/images", ("train", "test"), []),  # below two folders
        ("", ("train2017", "val2017"), []),
    ],
)
def test_folders_are_splits_in_any_case_and_in_a_single_folder(root, folders, found, tmp_path):
    data = tmp_path / "a"
    in_folders(data / root, [f"{folder}/{name}" for folder in folders for name in ("ok", "bad")])
    for junk in ("__MACOSX/train/ok/._0.jpg", ".ipynb_checkpoints/0.jpg", "@eaDir/0.jpg"):
        (data / junk).parent.mkdir(parents=True)
        (data / junk).write_bytes(b"no picture")
    assert formats.guess(str(data)) == "imagefolder"
    assert prepare.splits_of("imagefolder", str(data)) == found
    read = {}
    for split in found or ["train"]:
        read[split] = brought("imagefolder", data, tmp_path / "p", split)
    if found:
        counts = {split: len(records) for split, records in read.items()}
        assert counts == dict.fromkeys(found, 6)
        labels = {labels for records in read.values() for _, labels in records.values()}
        assert labels == {("ok",), ("bad",)}
    else:
        assert len(read["train"]) == 6 * len(folders)
    assert len(image_files.find([str(data)])) == 6 * len(folders) < len(list(data.rglob("*.jpg")))


def test_a_validation_set_is_found_by_all_its_names(tmp_path):
    in_folders(tmp_path / "a", ["train/ok", "train/bad", "val/ok", "val/bad"])
    for number, split in enumerate(("val", "validation", "dev")):
        found = brought("imagefolder", tmp_path / "a", tmp_path / f"{number}", split)
        assert sorted(found) == [f"{name}/{i}.jpg" for name in ("bad", "ok") for i in range(3)]


def test_a_split_that_folders_do_not_tell_is_refused(tmp_path):
    in_folders(tmp_path / "a", ["train/ok", "train/bad", "val/ok", "dev/ok"])
    there = "none of dev, train, val"
    for split, why in (("test", there), ("trian", there), ("validation", "both dev and val")):
        line = f"a: the split '{split}' is {why}, which are its folders; give --split"
        with pytest.raises(ValueError, match=line):
            brought("imagefolder", tmp_path / "a", tmp_path / "p", split)
        with pytest.raises(ValueError, match=line):
            evaluation_data.open_source(dict(path=str(tmp_path / "a")), split)
    assert not (tmp_path / "p").exists()
    counts = {"train": 6, "val": 3, "dev": 3, "Training": 6}
    for split, count in counts.items():
        assert len(brought("imagefolder", tmp_path / "a", tmp_path / split, split)) == count
    assert len(evaluation_data.open_source(dict(path=str(tmp_path / "a/train")), "test")) == 6


def test_the_folders_of_images_with_texts_are_splits(tmp_path):
    texts = {"red train": "a red train", "test tube": "a tube", "4": "a four"}
    for number, folder in enumerate(("train", "test", "validation")):
        beside(tmp_path / "side" / folder, texts, first=10 * number)
    found = {
        split: set(brought("sidecars", tmp_path / "side", tmp_path / "out", split))
        for split in ("train", "test", "validation")
    }
    assert found == {
        split: {f"{split}/{name}" for name in texts} for split in ("train", "test", "validation")
    }


def test_a_name_that_is_there_is_no_pattern(tmp_path):
    texts = {"a": "one", "b": "two"}
    beside(tmp_path / "photos [2020]", texts)
    beside(tmp_path / "what? *", texts)
    for name in ("photos [2020]", "what? *"):
        folder = tmp_path / name
        assert formats.guess(str(folder)) == "sidecars"
        assert set(brought("sidecars", folder, tmp_path / f"of {name[0]}")) == {"a", "b"}
    write_tar(tmp_path / "all [1].tar", 4)
    found = brought("webdataset", tmp_path / "all [1].tar", tmp_path / "of tar", in_place=True)
    assert len(found) == 4
    assert files.is_pattern(str(tmp_path / "photos [12]*"))


def test_texts_called_caption_are_read(tmp_path):
    folder = beside(tmp_path / "a/10_sks dog", {"1": "one", "2": "two"}, ".caption")
    beside(folder, {"3": "three"}, ".CAPTION", first=2)
    (folder / "2.txt").write_text("a txt comes first")
    assert formats.guess(str(tmp_path / "a")) == "sidecars"
    found = brought("sidecars", tmp_path / "a", tmp_path / "p")
    assert sorted(texts for texts, _ in found.values()) == [
        ("a txt comes first",),
        ("one",),
        ("three",),
    ]


def test_a_text_beside_a_picture_is_a_caption_a_line_and_that_of_a_tar_is_one(tmp_path):
    folder = beside(tmp_path / "a", {"1": "a red bird\r\n\r\n a bird \n", "2": "one line"})
    (folder / "2.json").write_text('{"caption": "not\\nthis"}')
    beside(folder, {"3": '{"caption": "two\\nlines", "alt": "of\\nJSON"}'}, ".json", first=2)
    found = brought("sidecars", folder, tmp_path / "p")
    assert [texts for texts, _ in found.values()] == [
        ("a red bird", "a bird"),
        ("one line",),
        ("two lines",),
    ]
    found = brought("sidecars", folder, tmp_path / "q", text_field="alt")
    assert [texts for texts, _ in found.values()] == [("of JSON",)]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("1.jpg", "1.txt"):
            archive.add(folder / name, name)
    found = brought("webdataset", tmp_path / "a.tar", tmp_path / "r")
    assert [texts for texts, _ in found.values()] == [("a red bird a bird",)]


def test_a_run_on_few_pictures_says_what_to_do_and_leaves_nothing(tmp_path):
    folder, out = tmp_path / "few", tmp_path / "run/data/few"
    numbers = [n for n in range(40) if not quarantine.is_held_out(encode(n), data_flag.HOLDOUT)][
        :12
    ]
    for number in numbers:
        beside(folder, {f"{number}": f"text {number}"}, first=number)
    (tmp_path / "run").mkdir()
    line = r"few: a share of 0.1 of the pictures .* leaves none of 12 for the split 'test'; give"
    with pytest.raises(ValueError, match=line) as raised:
        data_flag.prepared(str(folder), str(out))
    assert f"`coca-jax prepare --holdout=0.3 --out=DIR --input={folder}`" in str(raised.value)
    assert "--input=" not in str(raised.value).partition("`")[0]
    assert not list((tmp_path / "run").iterdir())


def test_suffixes_in_any_case_are_told_and_read(tmp_path):
    for number, name in enumerate(("0.jpg", "1.Jpg", "2.JPG")):
        (tmp_path / "p/cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "p/cat" / name).write_bytes(encode(number))
    (tmp_path / "c").mkdir()
    (tmp_path / "c/0.Png").write_bytes(encode(3, "PNG"))
    (tmp_path / "c/LIST.CSV").write_text("file_name,text\n0.Png,a cat\n")
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "t/A.TAR", 2)
    found = {name: formats.guess(str(tmp_path / name)) for name in "pct"}
    assert found == dict(p="imagefolder", c="csv", t="webdataset")
    for name, count in (("p", 3), ("c", 1), ("t", 2)):
        result = import_data(found[name], tmp_path / name, tmp_path / f"out-{name}")
        assert (result["read"], result["written"]) == (count, count)


def test_a_list_among_images_is_read_instead_of_the_folder(tmp_path):
    folder = beside(tmp_path / "p", dict.fromkeys("abcde"))
    rows = [json.dumps(dict(image=f"{name}.jpg", caption="x", score=-1.0)) for name in "abcde"]
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n")
    assert formats.guess(str(folder)) == "jsonl"
    (folder / "captions.jsonl").write_text("\n".join(rows[:2]) + "\n")
    (folder / "captions.jsonl").rename(folder / "notes.jsonl")
    assert formats.guess(str(folder)) == "jsonl"
    (folder / "notes.jsonl").unlink()
    for name, mark in (("notes.tsv", "\t"), ("notes.txt", "\t"), ("notes.csv", ",")):
        (folder / name).write_text(f"file_name{mark}text\na.jpg{mark}x\nb.jpg{mark}y\n")
        assert formats.guess(str(folder)) == "csv"
        (folder / name).unlink()
    assert len(image_folder.plan(str(folder), "", Options())[0].names) == 5  # as the line says
    for name in "abcde":  # the pictures lie elsewhere: there is nothing but the captions
        (folder / f"{name}.jpg").unlink()
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n")
    assert formats.guess(str(folder)) == "jsonl"
