"""Tables of texts as people have them: loose separators and quotes, names of other folders, dicts
in cells, a field that tells the split, tables that are not read."""

import csv
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import flags_of
from prepare_cases import encode, import_data, reasons_of

from coca_jax.cli import prepare
from coca_jax.config import typed
from coca_jax.data import evaluation_data, filters, holdout, source_index
from coca_jax.data.sources import formats
from coca_jax.data.sources import lists as lines
from coca_jax.data.sources.items import Options
from coca_jax.recipes import base
from coca_jax.training import data_flag


def pictures(folder, count, name="{}.jpg"):
    """A folder of `count` pictures; returns it."""
    for i in range(count):
        path = folder / name.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(i))
    return folder


def texts_of(out, split="train"):
    return [list(record.texts) for record in filters.open_source(str(out), split)]


def test_a_text_with_a_comma_and_no_quotes_is_not_cut(tmp_path):
    folder = pictures(tmp_path / "a", 3)
    (folder / "metadata.csv").write_text(
        'file_name,text\n0.jpg,a dog, running\n1.jpg,"a cat, asleep"\n2.jpg,a bird,,\n'
    )
    result = import_data("imagefolder", folder, tmp_path / "out")
    assert result["quarantined"] == {"bad_record": 1}
    assert texts_of(tmp_path / "out") == [["a cat, asleep"], ["a bird"]]
    assert reasons_of(tmp_path / "out") == {"metadata.csv row 1": "bad_record"}
    rows = list(lines.csv_rows(str(folder / "metadata.csv")))
    assert isinstance(rows[0], csv.Error)
    assert str(rows[0]) == "more cells than columns; quote texts with commas"
    (folder / "list.tsv").write_text("file_name\ttext\n0.jpg\ta dog\trunning\n")
    (row,) = lines.csv_rows(str(folder / "list.tsv"))
    assert str(row) == "more cells than columns; quote texts with tabs"


def test_a_space_behind_the_separator_is_no_part_of_names_and_quotes(tmp_path):
    folder = pictures(tmp_path / "a", 2)
    rows = '0.jpg, "a dog, running"\n1.jpg, a "cat" \n'
    (folder / "metadata.csv").write_text("file_name, text\n" + rows)
    import_data("imagefolder", folder, tmp_path / "out")
    assert texts_of(tmp_path / "out") == [["a dog, running"], ['a "cat"']]
    (folder / "metadata.csv").rename(folder / "list.csv")
    assert formats.guess(str(folder)) == "csv"
    import_data("csv", folder, tmp_path / "out2", text_field="text")
    assert texts_of(tmp_path / "out2") == texts_of(tmp_path / "out")
    # Without it a name may begin with a space.
    (folder / "1.jpg").rename(folder / " 1.jpg")
    (folder / "list.csv").write_text("file_name,text\n 1.jpg,a cat\n")
    import_data("csv", folder, tmp_path / "out3")
    assert texts_of(tmp_path / "out3") == [["a cat"]]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_whose_first_pictures_are_gone_is_read(tmp_path, kind):
    for name in ("cat", "dog"):
        pictures(tmp_path / "a" / name, 4)
    folder = tmp_path / "a"
    (folder / "cat/0.jpg").unlink()
    rows = [(f"{name}/{i}.jpg", f"a nice {name} {i}") for name in ("cat", "dog") for i in range(4)]
    if kind == "csv":
        text = "img,caption\n" + "".join(f"{file},{text}\n" for file, text in rows)
    else:
        text = "".join(json.dumps(dict(img=file, caption=text)) + "\n" for file, text in rows)
    table = folder / f"captions.{kind}"
    table.write_text(text)
    assert formats.guess(str(folder)) == kind
    result = import_data(kind, folder, tmp_path / "out")
    assert (result["written"], result["quarantined"]) == (7, {"missing_image": 1})
    # Evaluation reads the table as training does, and not the names of the folders.
    table.write_text("".join(line for line in text.splitlines(True) if "cat/0" not in line))
    read = evaluation_data.open_source(dict(path=str(folder)), "test")
    assert [record.texts[0] for record in read] == [text for _, text in rows[1:]]
    # Pictures of which none of the first hundred rows names one are no matter of the table.
    table.write_text("img,caption\n" + "".join(f"none {i}.jpg,x\n" for i in range(100)) + text)
    assert kind == "jsonl" or formats.guess(str(folder)) == "imagefolder"


def test_the_captions_of_flickr8k_and_flickr30k_as_kaggle_packs_them(tmp_path):
    folder = pictures(tmp_path / "f8k", 3, "Images/{}_ab.jpg")
    rows = [f"{i}_ab.jpg,A dog {i} caption {c} ." for i in range(3) for c in range(2)]
    (folder / "captions.txt").write_text("image,caption\n" + "\n".join(rows) + "\n")
    for path in (folder, folder / "captions.txt"):
        assert formats.guess(str(path)) == "csv"
        result = import_data("csv", path, tmp_path / f"out-{path.name}", in_place=True)
        assert (result["written"], result["with_text"], result["classes"]) == (6, 6, 0)
    assert texts_of(tmp_path / "out-f8k")[3] == ["A dog 1 caption 1 ."]
    folder = pictures(tmp_path / "f30k", 3, "flickr30k_images/{}.jpg")
    rows = [f'{i}.jpg| {c}| " Dogs , number {i} .' for i in range(3) for c in range(2)]
    header = "image_name| comment_number| comment\n"
    (folder / "results.csv").write_text(header + "\n".join(rows) + "\n")
    assert formats.guess(str(folder)) == "csv"
    result = import_data("csv", folder, tmp_path / "out30")
    assert (result["written"], result["with_text"]) == (6, 6)
    assert texts_of(tmp_path / "out30")[2] == ['" Dogs , number 1 .']


def test_texts_beside_class_folders_are_no_lists(tmp_path):
    for name in ("cat", "dog"):
        pictures(tmp_path / name, 2, name + "{}.jpg")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "readme.txt").write_text("Pictures, of cats and dogs\ncat0.jpg, a cat\n")
    (tmp_path / "train.txt").write_text("cat/cat0.jpg,0\ncat/cat1.jpg,0\n")  # without a header
    (tmp_path / "sizes.csv").write_text("picture,width\ncat0.jpg,40\n")
    assert formats.guess(str(tmp_path)) == "imagefolder"
    (tmp_path / "sizes.csv").unlink()
    assert formats.guess(str(tmp_path)) == "imagefolder"


def test_of_objects_in_a_field_only_the_text_counts(tmp_path):
    """As Karpathy's lists of sentences, their columns in parquet and labels with numbers are."""
    folder, rows = pictures(tmp_path / "a", 5), []
    for i in range(2):
        raw = [f"A dog {i} {verb}." for verb in ("runs", "sits")]
        listed = [dict(tokens=["a", "dog"], raw=one, imgid=i, sentid=7) for one in raw]
        rows.append(dict(file_name=f"{i}.jpg", sentences=listed, label=dict(id=3, name="cat")))
    rows.append(dict(file_name="2.jpg", sentences=dict(en="a dog", de=["ein Hund"], fr=None)))
    rows.append(dict(file_name="3.jpg", sentences=[dict(words="a dog", id=4)]))
    rows.append(dict(file_name="4.jpg", sentences="a dog", label=dict(id=3, title="cat")))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_data("imagefolder", folder, tmp_path / "out", text_field="sentences")
    wanted = [["A dog 0 runs.", "A dog 0 sits."], ["A dog 1 runs.", "A dog 1 sits."]]
    assert texts_of(tmp_path / "out") == [*wanted, ["a dog", "ein Hund"]]
    read = filters.open_source(str(tmp_path / "out"))
    assert [list(record.labels) for record in read] == [["cat"], ["cat"], []]
    listed = (tmp_path / "out/train-quarantine.jsonl").read_text().splitlines()
    told = {one["key"]: (one["reason"], one["detail"]) for one in map(json.loads, listed)}
    why = "an object of id, words: none of them is called raw or caption or text or sentence"
    assert told["3.jpg"] == ("bad_record", f"ValueError: {why}")
    why = "an object of id, title: none of them is called name or label"
    assert told["4.jpg"] == ("bad_label", why)
    # The same of a field of prepared data, that a source or a second import names.
    for row in rows:
        row["text"] = "any"
    del rows[4]["label"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_data("imagefolder", folder, tmp_path / "any")
    entry = dict(path=str(tmp_path / "any"), text_field="sentences")
    read = filters.open_source(entry | dict(limit=3))
    assert [sorted(record.texts) for record in read] == [*wanted, ["a dog", "ein Hund"]]
    with pytest.raises(ValueError, match="3.jpg: an object of id, words"):
        filters.open_source(entry).read_texts([3])
    import_data("prepared", tmp_path / "any", tmp_path / "again", text_field="sentences")
    assert reasons_of(tmp_path / "again") == {"3.jpg": "bad_record"}
    structs = [
        dict(image=dict(bytes=encode(i)), sentences=dict(raw=[f"dog {i}", f"hund {i}"], sentid=[1]))
        for i in range(2)
    ]
    (tmp_path / "p").mkdir()
    pq.write_table(pa.Table.from_pylist(structs), tmp_path / "p/a.parquet")
    import_data("parquet", tmp_path / "p", tmp_path / "pq", text_field="sentences")
    assert texts_of(tmp_path / "pq") == [["dog 0", "hund 0"], ["dog 1", "hund 1"]]


def split_table(folder, values, kind="jsonl"):
    """An imagefolder whose row i has the i-th value in its field `split`; None: no field."""
    pictures(folder, len(values))
    rows = [
        dict(file_name=f"{i}.jpg", text=f"{value} {i}")
        | ({} if value is None else {"split": value})
        for i, value in enumerate(values)
    ]
    if kind == "parquet":
        for i, row in enumerate(rows):
            row |= dict(image=(folder / f"{i}.jpg").read_bytes(), file_name=None)
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=4)
        return folder
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_field_split_in_any_case_with_all_rows_told(tmp_path, kind, capsys):
    # The rows to hold out come last, behind many others.
    values = ["Train"] * 110 + ["restval"] * 3 + ["val"] * 5 + [None] + ["extra"] * 2 + ["TEST"] * 4
    folder = split_table(tmp_path / "a", values, kind)
    out = data_flag.prepared(str(folder), str(tmp_path / "out"))
    assert [len(texts_of(out, split)) for split in ("train", "test")] == [113, 4]
    assert texts_of(out, "test") == [[f"TEST {i}"] for i in range(121, 125)]
    line = "rows not used, by their field 'split': 5 of 'val', 2 of 'extra', 1 without a value"
    assert capsys.readouterr().err.count(f"{folder}: {line}\n") == 1
    data_flag.prepared(str(folder), str(tmp_path / "out"))
    assert "not used" not in capsys.readouterr().err


def test_no_rows_to_train_on_or_to_hold_out_are_no_splits(tmp_path):
    for name, values in (("a", ["test", "val"]), ("b", ["train", "restval"]), ("c", [None] * 3)):
        split_table(tmp_path / name, values)
        assert holdout.find_splits("imagefolder", str(tmp_path / name), Options()) is None
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.parquet").write_bytes(b"damaged")
    assert holdout.find_splits("parquet", str(tmp_path / "d"), Options()) is None


@pytest.fixture
def call(monkeypatch):
    """The command `prepare` in this process: what it returns."""
    flags_of("prepare", monkeypatch)

    def run(**given):
        arguments = ["prepare", *(f"--{name}={value}" for name, value in given.items())]
        monkeypatch.setattr(sys, "argv", arguments)
        prepare.flags.FLAGS.unparse_flags()
        prepare.flags.FLAGS(arguments)
        return prepare.main(["prepare"])

    return run


def test_prepare_writes_the_splits_that_the_field_tells(tmp_path, call, capsys):
    folder = split_table(tmp_path / "a", ["train", "restval", "val", "test", "other"] * 2)
    given = dict(input=folder, processes=1)
    found = call(**given, out=tmp_path / "out")
    assert {name: one["written"] for name, one in found["splits"].items()} == dict(
        train=4, test=2, validation=2
    )
    assert texts_of(tmp_path / "out", "validation") == [["val 2"], ["val 7"]]
    said = capsys.readouterr()
    assert "rows not used, by their field 'split': 2 of 'other'\n" in said.err
    assert (
        "10 examples, by the field 'split': 4 -> [train], 2 -> [test], 2 ->"
        in prepare.summary(found)[0]
    )
    # Whoever names a split, a holdout or the values decides.
    assert call(**given, out=tmp_path / "named", split="train")["written"] == 10
    assert call(**given, out=tmp_path / "where", where="split=val")["written"] == 2
    assert call(**given, out=tmp_path / "held", holdout=0.5)["written"] < 10
    shared = dict(given, out=tmp_path / "shared", shard="0/1")
    assert (call(**shared)["waiting"], call(**shared)["shards"]) == (0, 3)
    capsys.readouterr()
    assert call(**given, out=tmp_path / "out") == found
    assert "holds train, test, validation of it already, and nothing was read" in (
        capsys.readouterr().err
    )


def captioned(folder, word, count=12):
    pictures(folder, count)
    rows = "".join(f"{i}.jpg,{word} {i}\n" for i in range(count))
    (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    return folder


def test_prepare_says_what_is_there_already_and_what_has_changed(tmp_path, call, capsys):
    folder, out = captioned(tmp_path / "a", "old"), tmp_path / "out"
    for given in (dict(out=out), dict(out=f"{out}2", holdout=0.4)):
        given |= dict(input=folder, processes=1)
        first = call(**given)
        assert f"reading {folder}\n" in capsys.readouterr().err
        assert call(**given) == first
        said, names = capsys.readouterr().err, "train, test" if "holdout" in given else "train"
        line = f"{given['out']} holds {names} of it already, and nothing was read"
        assert f"{line}; --overwrite reads it anew\n" in said and "reading" not in said
        captioned(folder, "newer")
        call(**given)
        assert f"and {folder} has changed since; --overwrite reads it anew" in (
            capsys.readouterr().err
        )
        assert texts_of(given["out"])[0][0].startswith("old")
        call(**given, overwrite=True)
        assert texts_of(given["out"])[0][0].startswith("newer")
        captioned(folder, "old")


def test_an_index_of_data_that_have_changed_since_does_not_go_on(tmp_path, capsys):
    folder, out = captioned(tmp_path / "a", "old"), str(tmp_path / "run/data/a")
    data_flag.prepared(str(folder), out)
    kept = texts_of(out)
    assert data_flag.prepared(str(folder), out) == out
    os.utime(folder / "metadata.csv", (1, 1))  # a copy on another machine
    assert data_flag.prepared(str(folder), out) == out
    said = capsys.readouterr().err
    assert said.count("its files have other times than when its index was made") == 1
    captioned(folder, "newer")
    line = f"{folder} has changed since its index was made in {out}; use a new --workdir"
    with pytest.raises(ValueError, match=line):
        data_flag.prepared(str(folder), out)
    with pytest.raises(ValueError, match=line):  # of `fit`
        data_flag.bring_in(data_flag.layout(str(folder)), out)
    assert texts_of(out) == kept
    config = base.get_config()
    config.data.sources = (dict(path=str(folder)),)
    for _ in range(2):
        source_index.of_sources(typed(config), str(tmp_path / "of_config"))
    captioned(folder, "old")
    with pytest.raises(ValueError, match="of_config/data/a in its place to go on without"):
        source_index.of_sources(typed(config), str(tmp_path / "of_config"))
    # One from before the state was kept goes on, as does the index that is named itself.
    path = tmp_path / "run/data/a/manifest.json"
    told = json.loads(path.read_text())
    states = {split.pop("state") for split in told["splits"].values()}
    assert [len(part) for state in states for part in state.split("-")] == [32] * 4
    path.write_text(json.dumps(told))
    assert data_flag.prepared(str(folder), out) == data_flag.prepared(out, "unused") == out


def test_an_index_within_its_data_does_not_change_them(tmp_path):
    for name in ("cat", "dog"):
        pictures(tmp_path / name, 9, name + "{}.jpg")
    out = str(tmp_path / "run/data/a")
    data_flag.prepared(str(tmp_path), out)
    assert data_flag.prepared(str(tmp_path), out) == out


def by_class(folder):
    for name in ("cat", "dog"):
        pictures(folder / name, 2, name + "{}.jpg")
    return folder


def test_fields_of_pictures_that_have_only_folders_are_refused(tmp_path):
    folder = by_class(tmp_path / "a")
    line = f"--text_field=words: {folder} is read by its folder names, without fields. Add"
    with pytest.raises(ValueError, match=line):
        import_data("imagefolder", folder, tmp_path / "out", text_field="words")
    (folder / "more").mkdir()
    (folder / "more/list.tsv").write_text("picture\twords\ncat0\ta cat\n")
    assert formats.guess(str(folder)) == "imagefolder"
    line = "--label_field=words: .* give a table with --input=FILE"
    with pytest.raises(ValueError, match=line):
        data_flag.layout(str(folder), Options(label_field="words"))
    with pytest.raises(ValueError, match="--text_field=words: "):
        evaluation_data.open_source(dict(path=str(folder), text_field="words"), "test")


def test_two_files_of_metadata_in_one_folder_are_refused(tmp_path):
    folder = captioned(tmp_path / "a", "old")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.jpg", "text": "new 0"}\n')
    line = f"{folder} has both metadata.jsonl and metadata.csv, .* --input={folder}/metadata.csv"
    for read in (
        lambda: import_data("imagefolder", folder, tmp_path / "out"),
        lambda: data_flag.layout(str(folder)),
        lambda: evaluation_data.open_source(dict(path=str(folder)), "test"),
    ):
        with pytest.raises(ValueError, match=line):
            read()
    out = data_flag.prepared(str(folder / "metadata.csv"), str(tmp_path / "alone"))
    assert sum(len(texts_of(out, split)) for split in ("train", "test")) == 12
