"""Lists of pictures as one JSON value, as COCO, Karpathy and many others give them."""

import json

import pytest
from prepare_cases import encode, import_data, reasons_of

from coca_jax.data import filters
from coca_jax.data.sources import formats, lists
from coca_jax.data.sources.items import Options
from coca_jax.training import data_flag


def coco(folder, count=4):
    """COCO's layout, with two captions a picture, interleaved; returns the list for training."""
    for split, numbers in (("train2017", range(count)), ("val2017", range(count, count + 2))):
        (folder / split).mkdir(parents=True)
        for i in numbers:
            (folder / split / f"{i:012d}.jpg").write_bytes(encode(i))
        told = dict(
            info={},
            images=[dict(id=10 + i, file_name=f"{i:012d}.jpg", width=40) for i in numbers],
            annotations=[
                dict(id=0, image_id=10 + i, caption=f"{word} {i}")
                for word in ("a", "the")
                for i in numbers
            ],
        )
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / f"annotations/captions_{split}.json").write_text(json.dumps(told))
    return folder / "annotations/captions_train2017.json"


def karpathy(folder, splits=("restval", "train", "val", "test")):
    """Karpathy's list of pictures in folders, with two sentences each; returns it."""
    images = []
    for i, split in enumerate(splits):
        (folder / "val2014").mkdir(parents=True, exist_ok=True)
        (folder / f"val2014/{i}.jpg").write_bytes(encode(i))
        sentences = [dict(tokens=["a"], raw=f"{word} {i}", sentid=i) for word in ("a", "the")]
        images.append(
            dict(filepath="val2014", filename=f"{i}.jpg", split=split, sentences=sentences)
        )
    (folder / "dataset_coco.json").write_text(json.dumps(dict(images=images, dataset="coco")))
    return folder / "dataset_coco.json"


def records_of(out, split="train"):
    return list(filters.open_source(str(out), split))


@pytest.mark.parametrize("in_place", [False, True])
def test_the_captions_of_coco(tmp_path, in_place):
    path = coco(tmp_path / "coco")
    assert formats.guess(str(path)) == "json"
    result = import_data("json", path, tmp_path / "out", in_place=in_place)
    assert (result["read"], result["written"], result["with_text"]) == (4, 4, 4)
    found = records_of(tmp_path / "out")
    assert [one.texts for one in found] == [(f"a {i}", f"the {i}") for i in range(4)]
    assert [one.image for one in found] == [encode(i) for i in range(4)]
    assert (found[2].key, json.loads(found[2].extra)) == ("000000000002.jpg", dict(id=12, width=40))
    both = str(path).replace("train2017", "*2017")
    assert import_data("json", both, tmp_path / "both", in_place=in_place)["written"] == 6


def beside(pictures, path, count=20):
    """Pictures in a folder, and a COCO list of their captions at a path."""
    pictures.mkdir(parents=True)
    for i in range(count):
        (pictures / f"{i}.jpg").write_bytes(encode(i))
    images = [dict(id=i, file_name=f"{i}.jpg") for i in range(count)]
    captions = [dict(image_id=i, caption=f"a dog {i}") for i in range(count)]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(images=images, annotations=captions)))


@pytest.mark.parametrize(
    ("given", "pictures", "file"),
    [
        ("d", "d", "d/captions_train2017.json"),
        ("d", "d/photos", "d/captions.json"),
        ("d", "d/photos", "d/annotations/captions.json"),
        ("d/photos", "d/photos", "d/captions.json"),
        ("d/photos", "d/photos", "d/annotations/captions.json"),
    ],
)
def test_a_list_in_or_next_to_a_folder_of_pictures_is_read(tmp_path, given, pictures, file):
    beside(tmp_path / pictures, tmp_path / file)
    other = dict(images=[dict(file_name="x.jpg")], annotations=[dict(caption="of another folder")])
    (tmp_path / "other.json").write_text(json.dumps(other))
    out = data_flag.prepared(str(tmp_path / given), str(tmp_path / "out"))
    found = [*records_of(out), *records_of(out, "test")]
    assert sorted(one.texts for one in found) == sorted((f"a dog {i}",) for i in range(20))


def test_the_folder_of_coco_has_its_splits(tmp_path):
    coco(tmp_path / "coco")
    out = data_flag.prepared(str(tmp_path / "coco"), str(tmp_path / "out"))
    assert [one.texts for one in records_of(out)] == [(f"a {i}", f"the {i}") for i in range(4)]
    assert [one.texts[0] for one in records_of(out, "test")] == ["a 4", "a 5"]
    import_data("json", tmp_path / "coco/val2017", tmp_path / "one", split="validation")
    names = [one.key for one in records_of(tmp_path / "one", "validation")]
    assert names == ["000000000004.jpg", "000000000005.jpg"]


def test_a_list_in_parts_and_its_damaged_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "ROWS_PER_UNIT", 2)
    path = coco(tmp_path / "coco")
    told = json.loads(path.read_text())
    told["images"] += ["x", dict(id=99, file_name="none.jpg"), dict(id=98, file_name="../a.jpg")]
    told["annotations"] += [dict(image_id=7, caption="lost"), dict(image_id=10), 5]
    path.write_text(json.dumps(told))
    result = import_data("json", path, tmp_path / "out", shard_count=3)
    assert (result["read"], result["written"], result["shards"]) == (10, 4, 2)
    assert [one.texts[0] for one in records_of(tmp_path / "out")] == [f"a {i}" for i in range(4)]
    name = path.name
    assert reasons_of(tmp_path / "out") == {
        **{f"{name} row {row}": "bad_record" for row in (5, 8, 9, 10)},
        **{"none.jpg": "missing_image", "../a.jpg": "missing_image"},
    }
    # What is outside the folder above `annotations` is not read.
    (tmp_path / "a.jpg").write_bytes(encode(9))
    for one in told["images"][:4]:
        one["file_name"] = "../../a.jpg"
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="'outside_input': 4"):
        import_data("json", path, tmp_path / "out2")


def test_the_lists_of_karpathy_tell_their_splits(tmp_path):
    path = karpathy(tmp_path / "coco")
    out = data_flag.prepared(str(path), str(tmp_path / "out"))
    wanted = [("a 0", "the 0"), ("a 1", "the 1")]
    assert [one.texts for one in records_of(out)] == wanted
    assert [(one.key, *one.texts) for one in records_of(out, "test")] == [
        ("val2014/3.jpg", "a 3", "the 3")
    ]
    # Their folder has no classes, as `val2014` would be.
    assert formats.guess(str(tmp_path / "coco")) == "json"
    path.rename(tmp_path / "list")
    (tmp_path / "coco/dataset_info.json").write_text('{"images": 4, "filename": "a"}')
    assert formats.guess(str(tmp_path / "coco")) == "imagefolder"
    (tmp_path / "list").rename(path)
    # In a folder `annotations` too; its pictures lie in the one above.
    (tmp_path / "coco/annotations").mkdir()
    moved = path.rename(tmp_path / "coco/annotations" / path.name)
    assert import_data("json", moved, tmp_path / "moved")["written"] == 4


def test_an_array_of_objects_as_lines_have_them(tmp_path):
    (tmp_path / "a/images").mkdir(parents=True)
    rows = []
    for i in range(3):
        (tmp_path / f"a/images/{i}.jpg").write_bytes(encode(i))
        rows.append(dict(image=f"{i}.jpg", caption=[f"a {i}", f"the {i}"], label="cat", n=i))
    (tmp_path / "a/list.json").write_text("\ufeff" + json.dumps([*rows, 3], indent=1))
    (tmp_path / "a/list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = import_data("json", tmp_path / "a/list.json", tmp_path / "out")
    assert result["quarantined"] == {"bad_record": 1}
    import_data("jsonl", tmp_path / "a/list.jsonl", tmp_path / "lines")
    assert records_of(tmp_path / "out") == records_of(tmp_path / "lines")
    # Lines are lines whatever their file is called.
    lines = (tmp_path / "a/list.jsonl").rename(tmp_path / "a/lines.json")
    import_data("jsonl", lines, tmp_path / "named")
    assert records_of(tmp_path / "named") == records_of(tmp_path / "lines")
    with pytest.raises(ValueError, match="lines.json is no JSON .*Extra data.*format=jsonl"):
        import_data("json", lines, tmp_path / "none")


def test_what_is_no_such_list_is_one_line(tmp_path):
    path = coco(tmp_path / "coco")
    with pytest.raises(FileNotFoundError, match="coco: no JSON list of captions for split 'test'"):
        lists.plan_json(str(tmp_path / "coco"), "test", Options())
    with pytest.raises(ValueError, match="no rows in it, as --format=csv reads it"):
        import_data("csv", path, tmp_path / "out")
    for value, line in (
        (dict(data=[], info={}), "x.json holds an object of data, info; give an array of objects"),
        ("text", "x.json holds text; give an array"),
        (dict(images=[dict(id=1)], annotations=[dict(image_id=1, bbox=[])]), "has a caption; give"),
        ([], "no rows in it, as --format=json"),
    ):
        (tmp_path / "x.json").write_text(json.dumps(value))
        with pytest.raises(ValueError, match=line):
            import_data("json", tmp_path / "x.json", tmp_path / "out")


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_in_a_file_for_lines_is_told_how_it_is_read(tmp_path, indent):
    rows = [dict(image=f"{i}.jpg", text=f"a dog {i}") for i in range(3)]
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encode(i))
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps(rows, indent=indent))
    with pytest.raises(
        ValueError, match="list.jsonl line 1: .*; an array of objects is read with --format=json"
    ):
        import_data("jsonl", path, tmp_path / "out")
    assert import_data("json", path, tmp_path / "out")["written"] == 3
