"""Each use of `prepare` refuses the flags that it does not read, and says what it leaves unread."""

import threading

import pyarrow.parquet as pq
import pytest
from conftest import flags_of, tiny_config
from fsspec.implementations.memory import MemoryFileSystem
from prepare_cases import encode, import_data, write_tar
from test_tables import split_table, texts_of

from coca_jax.cli import prepare as command
from coca_jax.data import filters, prepare, vocabulary
from coca_jax.data.sources import array_record, parquet
from coca_jax.data.sources.items import Options
from coca_jax.training import data_flag


@pytest.fixture
def call(monkeypatch):
    """The command in this process: what it returns."""
    flags_of("prepare", monkeypatch)

    def run(*uses, **given):
        command.flags.FLAGS.unparse_flags()
        command.flags.FLAGS(["prepare", *(f"--{name}={value}" for name, value in given.items())])
        return command.main(["prepare", *uses])

    return run


@pytest.fixture
def folder(tmp_path):
    rows = ["file_name,text,other"]
    (tmp_path / "a").mkdir()
    for number in range(8):
        (tmp_path / "a" / f"{number}.jpg").write_bytes(encode(number))
        rows.append(f"{number}.jpg,text {number},other")
    (tmp_path / "a" / "metadata.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "a"


def test_flags_that_a_use_does_not_read_are_refused(call, folder, tmp_path):
    place = dict(input=folder, out=tmp_path / "out")
    for uses, given, says in (
        ((), place | dict(distance=40), "--distance=40: it is of --dedup=perceptual and --ex"),
        ((), place | dict(distance=40, dedup="content"), "--distance=40: it is of"),
        ((), place | dict(seed=1), "--seed=1: it is of --sample; leave it out"),
        ((), place | dict(size=400), "--size=400: `prepare` does not read it; leave it out"),
        ((), place | dict(step=2), "--step=2: `prepare` does not read it"),
        (("vocabulary",), place | dict(text_field="other"), "--text_field=other: `prepare voc"),
        (("vocabulary",), place | dict(where="a=b"), "--where=a=b: `prepare vocabulary` does"),
        (("vocabulary",), place | dict(shard="0/2"), "--shard=0/2: `prepare vocabulary` does"),
        (("inspect",), dict(workdir="a", split="test"), "--split=test: `prepare inspect` does not"),
        (("inspect",), dict(workdir="a", input="b"), "--input=b: `prepare inspect` does not"),
    ):
        with pytest.raises(ValueError, match=says):
            call(*uses, **given)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="out is prepared, and its images are those that it was"):
        call(**place, processes=1)
        call(input=tmp_path / "out", out=tmp_path / "again", image_field="zzz", processes=1)


def test_a_holdout_of_the_split_that_it_writes_is_refused_by_its_name(call, folder, tmp_path):
    """The two splits of one name were two owners of one folder, of which the second was refused."""
    given = dict(input=folder, out=tmp_path / "out", processes=1)
    says = "^--split=test is what --holdout writes; give another --split$"
    with pytest.raises(ValueError, match=says):
        call(**given, holdout=0.25, split="test")
    found = call(**given, holdout=0.25, split="train")
    assert found["written"] + found["held_out"]["written"] == 8


def test_a_split_of_the_field_that_is_in_an_evaluation_set_is_left_out_with_a_line(
    tmp_path, call, capsys
):
    """It ended the import, each time anew, in the name of a --where that nobody gave."""
    folder = split_table(tmp_path / "a", ["train"] * 5 + ["test"])
    given = dict(input=folder, out=tmp_path / "out", processes=1, dedup="perceptual")
    for _ in range(2):  # the second finds `train` there
        found = call(**given, exclude=folder / "5.jpg")
        assert list(found["splits"]) == ["train"] and found["written"] == 5
        said = capsys.readouterr()
        assert f"{folder}: nothing is left of [test]: 1 in_evaluation\n" in said.err
    assert [one.texts for one in filters.open_source(str(tmp_path / "out"))] == [
        (f"train {n}",) for n in range(5)
    ]
    for more, says in (
        (
            dict(exclude=folder),
            r"6 examples .*: quarantined {'in_evaluation': 6}, filtered {}; the",
        ),
        (
            dict(min_text=50),
            "6 examples .*: none has a caption or a class name; their fields are spl",
        ),
        (dict(where="text=zzz"), "6 examples .*, filtered {'where': 6}"),
    ):
        with pytest.raises(ValueError, match=says):
            call(**given | dict(out=tmp_path / "none"), **more)
        assert not (tmp_path / "none/manifest.json").exists()
    # A split from before would stay, with what is excluded now.
    call(**given | dict(out=tmp_path / "old"))
    says = r"nothing is left of \[test\]: 1 in_evaluation; .*old has that split from before: give"
    with pytest.raises(ValueError, match=says):
        call(**given | dict(out=tmp_path / "old"), exclude=folder / "5.jpg", overwrite=True)
    # What is broken is no choice of the user's; the other split is there.
    (folder / "5.jpg").unlink()
    says = r"nothing is left of \[test\]: 1 missing_image; the first: .*5.jpg"
    with pytest.raises(ValueError, match=says):
        call(**given | dict(out=tmp_path / "broken"))
    assert list(array_record.read_manifest(str(tmp_path / "broken"))["splits"]) == ["train"]


def test_counts_of_classes_are_those_of_the_split_and_the_same_again(call, tmp_path):
    for name, pictures in (("a", 1), ("b", 8), ("c", 8)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(pictures):
            (tmp_path / f"in/{name}/{number}.png").write_bytes(encode(ord(name) * 10 + number))
    given = dict(input=tmp_path / "in", out=tmp_path / "out", holdout=0.3, processes=1)
    first = call(**given)
    told = array_record.read_manifest(str(tmp_path / "out"))
    of_splits = [len(told["splits"][split]["classes"]) for split in ("train", "test")]
    assert of_splits == [2, 3] and len(told["class_names"]) == 3
    assert [first["classes"], first["held_out"]["classes"]] == of_splits
    assert call(**given) == first


def test_inspect_refuses_sources_that_train_refuses(folder, tmp_path, capsys):
    """It printed them as what trains."""
    import_data("imagefolder", folder, tmp_path / "p")
    recipe, place = tiny_config(), dict(path=str(tmp_path / "p"))
    for more, says in (
        (dict(answers=("a",)), r"sources\[0\].answers=\('a',\) is for kind=.question."),
        (dict(data_dir="d"), r"sources\[0\].data_dir='d' is for data by tfds"),
    ):
        recipe.data.sources = (place | more,)
        with pytest.raises(ValueError, match=says):
            command.inspect(recipe, 1)
    assert capsys.readouterr().out == ""
    recipe.data.sources = (place,)
    assert len(command.inspect(recipe, 1)["examples"]) == recipe.batch_size


def test_a_vocabulary_says_what_its_flags_lack(call, folder, tmp_path):
    place = dict(out=tmp_path / "words.model", size=300)
    with pytest.raises(FileNotFoundError, match="data source nowhere: no such folder; "):
        call("vocabulary", input="nowhere", **place)
    (tmp_path / "list.tsv").write_text("filepath\ttitle\n0.jpg\ta\n")
    with pytest.raises(ValueError, match="run `coca-jax prepare --format=csv --input="):
        call("vocabulary", input=tmp_path / "list.tsv", **place)
    rows = [f"{n}.jpg," + "".join(chr(0x4E00 + n * 60 + i) for i in range(60)) for n in range(8)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]) + "\n")
    call(input=folder, out=tmp_path / "p", processes=1)
    with pytest.raises(ValueError, match=r"give [0-9]+ or more \(.*; --size of `prepare voc"):
        call("vocabulary", input=tmp_path / "p", **place)


def test_a_vocabulary_is_of_a_split_and_replaces_no_file(call, folder, tmp_path):
    call(input=folder, out=tmp_path / "p", split="test", processes=1)
    place = dict(input=tmp_path / "p", out=tmp_path / "words.model", size=400)
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['test'\]"):
        call("vocabulary", **place)
    (tmp_path / "words.model").write_text("precious")
    with pytest.raises(ValueError, match="words.model is there already; give --overwrite, or an"):
        call("vocabulary", **place, split="test")
    assert (tmp_path / "words.model").read_text() == "precious"
    assert call("vocabulary", **place, split="test", overwrite=True)["sentences"] == 8
    assert vocabulary.load(str(tmp_path / "words.model")).size > 256


def test_data_are_not_prepared_into_a_folder_of_something_else(call, folder, tmp_path):
    """Its manifest would make that folder count as prepared data. What an earlier command wrote or
    began goes on."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "metadata.jsonl").write_text('{"file_name": "1.jpg", "text": "mine"}\n')
    for given in ({}, dict(overwrite=True), dict(shard="0/2"), dict(holdout=0.5)):
        with pytest.raises(ValueError) as error:
            call(input=folder, out=theirs, **given)
        said = f"--out={theirs} holds something else (metadata.jsonl); give a new folder"
        assert str(error.value) == said
    assert [path.name for path in theirs.iterdir()] == ["metadata.jsonl"]
    for name in ("new", "empty", "begun"):
        (out := tmp_path / name).mkdir(exist_ok=name != "new")
        (out / ".DS_Store").touch()
        if name == "begun":  # and was killed while the shards got their names
            begun = call(input=folder, out=out, shard="0/2")
            assert begun["waiting"] == 0 and not (out / "manifest.json").exists()
            (out / "train-00000-of-00001.array_record").write_bytes(b"")
        for more in ({}, {}, dict(split="other")):  # what is there stays; a second split
            assert call(input=folder, out=out, **more)["written"] == 8


def test_many_shards_are_asked_for_at_a_time():
    """One after the other, ten thousand in a bucket take minutes."""
    together = threading.Barrier(8, timeout=30)

    def ask(number):
        together.wait()
        return number

    assert prepare.of_each(ask, range(32)) == list(range(32))


def test_many_shards_get_their_names_at_a_time(tmp_path, monkeypatch):
    """A bucket copies each: one after the other, ten thousand take a quarter of an hour."""
    together, rename = threading.Barrier(4, timeout=10), MemoryFileSystem.mv
    for number in range(8):
        write_tar(tmp_path / f"{number}.tar", 1, number)

    def mv(self, old, new):
        if "/train-0" in new:  # and not when it is written
            together.wait()
        rename(self, old, new)

    monkeypatch.setattr(MemoryFileSystem, "mv", mv)
    told = import_data("webdataset", tmp_path, out := "memory://renamed/out")
    assert told["shards"] == told["written"] == 8
    texts = [record.texts for record in filters.open_source({"path": out, "split": "train"})]
    assert texts == [(f"caption {number}",) for number in range(8)]


def test_a_large_row_group_is_not_read_once_for_each_unit(tmp_path, monkeypatch):
    """pandas writes a million rows in one group, which are 245 units: each went through all."""
    split_table(tmp_path / "a", ["train"] * 40, "parquet")
    pq.write_table(pq.read_table(tmp_path / "a/a.parquet"), tmp_path / "a/a.parquet")
    monkeypatch.setattr(parquet, "ROWS_PER_UNIT", 4)
    batches, read = parquet._batches, []

    def counted(*of):
        for batch in batches(*of):
            read.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(parquet, "_batches", counted)
    out = tmp_path / "out"
    told = import_data("parquet", tmp_path / "a/a.parquet", out, shard_count=2)
    assert (told["read"], told["written"], told["shards"]) == (40, 40, 2)
    assert texts_of(str(out), "train") == [[f"train {i}"] for i in range(40)]
    assert sum(read) == 32 + 40  # batches of 16: 20 rows, and all of them; it was 10 x 40
    read.clear()
    found = data_flag.layout(str(tmp_path / "a/a.parquet")).items(Options())
    assert len(list(found)) == sum(read) == 40  # as `fit` looks at it
    gap = [parquet.Unit("a", 0, 4, 4), parquet.Unit("a", 8, 12, 4), parquet.Unit("b", 12, 16, 4)]
    assert parquet.joined(gap) == gap
