"""A work of recaptioning knows the files that it was begun with; captions of any script."""

import dataclasses
import io
import json
import os
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import flags_of
from test_search import encoded

from coca_jax.apps.recaption import job, selection, shard, writers
from coca_jax.apps.recaption import job as whole
from coca_jax.apps.recaption.request import Request
from coca_jax.cli import recaption
from coca_jax.data import prepare, teachers
from coca_jax.data.sources import array_record
from coca_jax.data.sources import manifest as metadata
from coca_jax.data.sources import tars as webdataset
from coca_jax.data.sources.items import Drawn, Item, Options, Unit
from coca_jax.data.sources.records import Record
from coca_jax.runtime import json_files
from coca_jax.runtime.workers import Engine


def write_tar(path, count: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            member, data = tarfile.TarInfo(f"{number}.png"), encoded(number)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    for number in range(2):
        write_tar(tmp_path / f"t/{number:05d}.tar", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "t"


def asked(input="t", out="out", format="webdataset", **how) -> Request:
    return Request(input, format=format, out=out, options=Options(check=False), **how)


def read(request: Request) -> list[tuple[str, list[str]]]:
    """(key, labels) of all that a work reads, as it begins and as it goes on."""

    def found():
        items = [item for job in whole.plan(request) for _, item in shard.selected(job)]
        return [(item.key, list(item.labels)) for item in items]

    first = found()
    whole.begin(request, ["0123"])
    assert found() == first
    return first


def begun(*given) -> list[str]:
    jobs = whole.plan(asked(*given))
    whole.begin(asked(*given), ["0123"])
    return [os.path.relpath(unit.path) for job in jobs for unit in job.units]


def test_files_that_come_go_or_change_are_told_before_any_work(tars):
    there = begun()
    assert begun() == there == ["t/00000.tar", "t/00001.tar"]
    write_tar(tars / "00002.tar", 1)
    with pytest.raises(ValueError) as told:
        whole.plan(asked())
    assert str(told.value) == (
        "--input=t has 1 more file (00002.tar) since --out=out was begun; give another --out"
    )
    write_tar(tars / "00001.tar", 9)
    with pytest.raises(
        ValueError, match=r"has 1 more file \(00002.tar\) and 1 changed \(00001.tar\)"
    ):
        whole.plan(asked())
    (tars / "00000.tar").unlink()
    (tars / "00001.tar").unlink()
    with pytest.raises(
        ValueError, match=r"1 more file .* and 2 fewer files \(00000.tar, ...\) since"
    ):
        whole.plan(asked())
    assert begun("t", "other") == ["t/00002.tar"]


def test_a_start_that_came_no_further_than_its_plan_begins_again(tars):
    whole.plan(asked())
    write_tar(tars / "00002.tar", 1)
    assert len(begun()) == len(begun()) == 3


def test_a_job_that_starts_leaves_the_plan_of_another_that_loads_its_model(tars, monkeypatch):
    really, there = webdataset.plan, []

    def looked(*given):
        there.append(sorted(os.listdir("out/recaption")) if os.path.exists("out") else [])
        return really(*given)

    monkeypatch.setattr(webdataset, "plan", looked)
    jobs = whole.plan(asked())
    first = len(there)
    assert whole.plan(asked()) == jobs and not any(there[:first])
    assert there[first:] == [["input.json", "plan.json"]] * first


def test_a_folder_of_pictures_that_grew_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "p/0.png").write_bytes(encoded(0))
    given = "p", "out", "imagefolder"
    assert begun(*given) == begun(*given)
    (tmp_path / "p/1.png").write_bytes(encoded(1))
    with pytest.raises(ValueError, match=r"--input=p has 1 changed \(p\) since"):
        whole.plan(asked(*given))


def test_a_folder_whose_files_are_others_or_of_another_size_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    for number in range(2):
        (tmp_path / f"p/{number}.png").write_bytes(encoded(number))
        (tmp_path / f"p/{number}.txt").write_text("a caption")
    changed = r"--input=p has 1 changed \(p\) since --out=out was begun; give another --out"
    given = "p", "out", "sidecars"
    assert begun(*given) == begun(*given) == ["p"]
    (tmp_path / "p/notes.md").write_text("nothing that is read")
    os.utime("p/0.png")
    assert begun(*given) == ["p"]
    for old, new in (("p/1.png", "p/2.png"), ("p/0.txt", "p/1.caption")):  # as many as before
        os.rename(old, new)
        with pytest.raises(ValueError, match=changed):
            whole.plan(asked(*given))
        os.rename(new, old)
        assert begun(*given) == ["p"]
    for name, more in (("p/0.png", b" "), ("p/0.txt", b" of another length")):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(before + more)
        with pytest.raises(ValueError, match=changed):
            whole.plan(asked(*given))
        (tmp_path / name).write_bytes(before)
    assert begun(*given) == ["p"]


def test_an_output_in_its_input_is_refused(tars):
    for out in ("t/out", "./t/deep/er", str(tars / "out")):
        with pytest.raises(ValueError, match=f"--out={out} lies in --input=t: the next run"):
            whole.plan(asked(out=out))
    os.symlink(tars, "link")
    with pytest.raises(ValueError, match="lies in --input"):
        whole.plan(asked(out="link/out"))
    assert sorted(os.listdir("t")) == ["00000.tar", "00001.tar"]
    whole.plan(asked(out="t_out"))  # beside it


def test_what_becomes_of_the_members_of_a_tar_that_had_more(tmp_path):
    fields = dict(caption="in json", title="stays", label="beetle", recaption="older")
    files = {
        "a.jpg": encoded(1),
        "a.png": encoded(2),
        "a.npz": b"arrays",
        "a.json": json.dumps(fields).encode(),
        "b.jpg": encoded(3),
        "b.txt": b"in txt",
        "b.cls": b"moth",
        "b.json": json.dumps(fields).encode(),
    }
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    made = dict(originals=[], captions=[dict(text="new", flags=["cut"], score=0.5)], key="")
    kept = selection.texts(dict(made, originals=[dict(text="x", score=0.9)]), "synthetic")
    assert kept == [("new", 0.5)]  # unsound, and beside an original
    items = list(webdataset.read(Unit(str(tmp_path / "in.tar")), Options(check=False)))
    assert [item.texts for item in items] == [["in json"], ["in txt"]]
    examples = (writers.Example(item.key[-1], item, kept, made) for item in items)
    told = dict(count=2, with_text=2, with_label=2, classes=["beetle", "moth"])
    assert writers.write("tar", str(tmp_path / "out.tar"), examples) == told
    with tarfile.open(tmp_path / "out.tar") as tar:
        found = {one.name: tar.extractfile(one).read() for one in tar}
    assert sorted(found) == ["a.json", "a.png", "a.txt", "b.json", "b.png", "b.txt"]
    assert found["a.png"] == encoded(1) and found["a.txt"] == b"new"
    for key, label in (("a", "beetle"), ("b", "moth")):
        told = json.loads(found[f"{key}.json"])
        assert told["title"] == "stays" and told["labels"] == [label]
        assert told.keys() == {"title", "labels", "recaption"} and told["recaption"] != "older"


def test_flags_know_letters_with_marks_and_texts_of_symbols():
    assert not selection.repeats("यह एक बिल्ली है, यह एक कुत्ता है")
    assert selection.repeats("की की की") and selection.repeats("\N{CAT} \N{CAT} \N{CAT}")
    texts = [["की"], ["के"], ["\N{CAT}"], ["\N{DOG}"], ["\N{RABBIT}"], ["cafe\u0301"], ["का"]]
    eye = np.eye(7, dtype=np.float32)
    originals = [[], ["का"], [], [], [], ["Café!"], []]
    found = selection.of_part(texts, originals, [[True]] * 7, eye, eye)
    assert found == [[[]]] * 5 + [[["duplicate"]], [[]]]


def test_a_blank_caption_is_never_kept():
    blank, good = (dict(text=text, score=0.21, flags=[]) for text in (" ", "a bus"))
    original = dict(text="a red bus in a street", score=0.2)
    for rule in ("better", "synthetic", "all"):
        assert selection.texts(dict(originals=[], captions=[blank]), rule) == []
        told = selection.texts(dict(originals=[], captions=[blank, good]), rule)
        assert told == [("a bus", 0.21)]
    one = dict(originals=[original], captions=[blank])
    assert (
        selection.texts(one, "better") == selection.texts(one, "all") == [(original["text"], 0.2)]
    )
    assert selection.texts(one, "synthetic") == []


@pytest.mark.parametrize("score", ["nan", "inf", "-inf", "2.0", "-1.5"])
def test_a_least_score_that_is_no_cosine_is_refused(score):
    with pytest.raises(ValueError, match=f"--min_score={score}: give a cosine similarity, a num"):
        asked(min_score=float(score))
    assert [asked(min_score=one).min_score for one in (-1.0, 1)] == [-1, 1]


def test_an_input_that_stands_there_twice_is_refused(monkeypatch):
    flags_of("recaption", monkeypatch)
    for given in (["--input=a", "--input=b"], ["--input", "a", "--input", "b"]):
        recaption.flags.FLAGS.unparse_flags()
        recaption.flags.FLAGS(["recaption", "--checkpoint=c", "--out=o", *given])
        with pytest.raises(ValueError, match="--input stands there 2 times, of which the"):
            recaption.main(["recaption"])


def test_one_split_is_read_of_an_input_that_tells_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"f/{s}/{c}/{c}.png" for s in ("train", "test") for c in ("cat", "dog")]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(encoded(number))
    rows = [f"{name},{name.split('/')[1]}\n" for name in names]
    (tmp_path / "list.csv").write_text("image,split\n" + "".join(rows))
    for split in ("train", "test"):
        prepare.prepare("imagefolder", "f", "p", split=split, processes=1, progress=False)
    keys = [("cat/cat.png", ["cat"]), ("dog/dog.png", ["dog"])]
    for format, input in (("imagefolder", "f"), ("csv", "list.csv"), ("prepared", "p")):
        with pytest.raises(
            ValueError, match=f"--input={input} tells the splits .*test.*; give --split=NAME"
        ):
            whole.plan(asked(input, "none", format))
        for split in ("train", "test"):
            request = asked(input, f"{split}-{format}", format, split=split, to="array_record")
            found = read(request)
            wanted = [(name, []) for name in names if split in name] if format == "csv" else keys
            assert found == wanted
            name = f"{split}-00000-of-00001.array_record"
            assert whole.name(request, ["job"], whole.plan(request)[0]) == name
        with pytest.raises(ValueError, match="begun with split='test', not 'train'"):
            whole.plan(asked(input, f"test-{format}", format, split="train"))
        with pytest.raises(ValueError, match="begun with split='test', not ''; give the same"):
            whole.plan(asked(input, f"test-{format}", format, to="array_record"))
        with pytest.raises(ValueError, match="no split 'validation'|--split=validation: --input"):
            whole.plan(asked(input, "none", format, split="validation"))
    assert not (tmp_path / "none").exists()


def test_an_input_of_a_training_split_alone_needs_no_flag(tars):
    os.rename("t/00000.tar", "t/train-0.tar")
    os.remove("t/00001.tar")
    assert begun() == ["t/train-0.tar"]
    with pytest.raises(ValueError, match="--split=test: --input=t tells the splits train; give"):
        whole.plan(asked(out="none", split="test"))
    os.rename("t/train-0.tar", "t/0.tar")
    with pytest.raises(ValueError, match="--split=train: --input=t tells no splits; drop --split"):
        whole.plan(asked(out="none", split="train"))


def test_the_output_tells_its_labels_and_its_input_s_order_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("f/cat/0.png", "f/dog/1.png")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(encoded(number))
    prepare.prepare("imagefolder", "f", "p", processes=1, progress=False)
    told = metadata.read_manifest("p")
    told["splits"]["train"]["drawn"] = dict(holdouts=2, seeds=[3])
    metadata.write("p", told | dict(class_names=["dog", "cat"]))
    for format, input, names, drawn in (
        ("imagefolder", "f", ["cat", "dog"], Drawn()),
        ("prepared", "p", ["dog", "cat"], Drawn(2, (3,))),
    ):
        request = asked(input, f"out-{format}", format, to="array_record")
        (job,) = jobs = whole.plan(request)
        made = [
            dict(number=n, key=item.key, captions=[dict(text="a", flags=[], score=0.5)])
            | dict(originals=[])
            for n, item in shard.selected(job)
        ]
        part = dict(results=made, quarantined=[], read=2, last=True, figures={})
        part["digests"] = [str(n) for n in range(len(made))]
        json_files.write_sealed(f"{job.part}/part-00000.json", part)
        shard.write(job, request, float("-inf"), whole.name(request, jobs, job))
        whole.finish(request, jobs, float("-inf"))
        manifest = metadata.read_manifest(request.out)
        assert manifest["class_names"] == names
        assert manifest["splits"]["train"]["with_label"] == 2
        assert metadata.drawn(manifest["splits"]["train"]) == drawn
        records = array_record.open_split(request.out, "train").read([0, 1])
        assert [record.labels for record in records] == [("cat",), ("dog",)]


@pytest.mark.parametrize("to", ["tar", "parquet", "array_record"])
def test_embeddings_and_texts_of_an_earlier_work_are_not_those_of_the_new_one(tmp_path, to):
    older = dict(captions=[], originals=[])
    extra = dict(image_emb="older", text_emb="older", title="stays", recaption=older, texts=["old"])
    made = dict(originals=[], captions=[dict(text="new", flags=[], score=0.5)], key="a")
    item = Item("a", encoded(1), extra=extra)
    writers.write(to, str(tmp_path / "out"), iter([writers.Example("a", item, [], made)]))
    if to == "tar":
        with tarfile.open(tmp_path / "out") as tar:
            found = json.load(tar.extractfile("a.json"))
    elif to == "parquet":
        found = json.loads(pq.read_table(tmp_path / "out")["extra"][0].as_py())
    else:
        (record,) = array_record.ArrayRecordFiles([str(tmp_path / "out")], [1])([0])
        found = json.loads(record.extra)
    assert found.keys() - {"recaption"} == {"title"}
    own = Item("a", encoded(1), extra=dict(texts=["of the data"], recaption="by hand"))
    assert writers.Example("a", own, [], made).fields() == own.extra


@pytest.mark.parametrize("beside", ["", ', "recaption": "yes"', ', "recaption": {"by": "me"}'])
def test_a_field_of_the_data_called_as_an_embedding_is_no_teacher_s(beside):
    record = Record(b"", ("a",), (), "key", '{"image_emb": [0.5, 1]' + beside + "}")
    found = teachers.embeddings([record], ["a"], 4)
    assert not found["teacher_image"].any() and not found["teacher_text"].any()


@pytest.mark.parametrize("rule", ["original", "all", "better"])
def test_a_tar_lists_the_texts_of_an_image_that_keeps_one_too(tars, rule):
    os.remove("t/00001.tar")
    request = asked(text=rule)
    (job,) = jobs = whole.plan(request)
    said = [dict(text="a cat", score=0.5), dict(text="a tabby cat", score=0.4)]
    made = [
        dict(number=n, key=item.key, originals=said[: n + 1])
        | dict(captions=[dict(said[0], flags=[])])
        for n, item in shard.selected(job)
    ]
    part = dict(results=made, quarantined=[], read=2, last=True, figures={})
    part["digests"] = [str(n) for n in range(len(made))]
    json_files.write_sealed(f"{job.part}/part-00000.json", part)
    shard.write(job, request, float("-inf"), whole.name(request, jobs, job))
    with tarfile.open("out/00000.tar") as tar:
        told = [json.load(tar.extractfile(f"{n}.json")).get("texts") for n in range(2)]
    assert told == ([None] * 2 if rule == "better" else [["a cat"], ["a cat", "a tabby cat"]])
    options = Options(text_field="" if rule == "better" else "texts")
    found = prepare.prepare(
        "webdataset", "out/00000.tar", "p", options=options, processes=1, progress=False
    )
    assert found["with_text"] == found["written"] == 2


def test_a_work_that_can_write_nothing_says_why_and_may_begin_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("l", "elsewhere"):
        (tmp_path / folder).mkdir()
    for number in range(2):
        (tmp_path / f"elsewhere/{number}.png").write_bytes(encoded(number))
    os.symlink(tmp_path / "elsewhere", "l/images")
    (tmp_path / "l/list.csv").write_text("image,text\nimages/0.png,a\nimages/1.png,b\n")
    strict = asked("l/list.csv", format="csv", to="parquet")  # refused pictures need no model
    for _ in range(2):
        with pytest.raises(ValueError) as told:
            job.run(strict, whole.plan(strict), Engine(), say=print, progress=False)
        assert str(told.value).startswith(
            "l/list.csv: none of 2 examples can be used: quarantined {'outside_input': 2}, filtered"
            " {}; the first quarantined: images/0.png: 'images/0.png' leads to "
        )
        assert "--allow_paths=FOLDER_OR_URL" in str(told.value) and os.listdir("out") == []
    options = Options(check=False, allow_paths=(str(tmp_path / "elsewhere"),))
    mended = dataclasses.replace(strict, options=options)
    assert read(mended) == [("images/0.png", []), ("images/1.png", [])]
    with pytest.raises(ValueError) as told:
        whole.plan(strict)
    assert str(told.value) == (
        f"--out=out was begun with allow_paths={list(options.allow_paths)}, not []; give the same, "
        "or another --out"
    )
