"""How a work of recaptioning ends, what is told then, and who may work at it."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import resource
import tarfile
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import flags_of
from test_recaption_inputs import asked, encoded, tars  # noqa: F401

from coca_jax.apps.recaption import job as running
from coca_jax.apps.recaption import job as whole
from coca_jax.apps.recaption import selection, shard, writers
from coca_jax.cli import recaption
from coca_jax.data import prepare
from coca_jax.data.sources import array_record, manifest, parquet
from coca_jax.data.sources.items import Item, Options
from coca_jax.runtime import json_files, lease
from coca_jax.runtime.workers import Engine


class Captioner:
    """Has a caption for each picture without a model.

    Attributes:
        made: keys of the pictures that were captioned, by whichever work.
    """

    made: list[str] = []

    def __init__(self, request):
        self.request, self.seconds = request, {}

    def checksums(self):
        return ["0123"]

    def timed(self, what):
        return contextlib.nullcontext()

    def read(self, item):
        if item.problem:
            raise ValueError(f"{item.problem}: {item.detail}")
        return ()

    def ask(self, images, keys):
        return None  # no API writes the captions

    def part(self, pictures, look, answers=None):
        self.made.extend(one.key for one in pictures)
        return [
            dict(
                number=one.number,
                key=one.key,
                captions=[dict(text=f"picture {one.number}", score=0.6, flags=[])],
                originals=[dict(text=text, score=0.5) for text in one.texts],
            )
            for one in pictures
        ], {}


@pytest.fixture(autouse=True)
def without_a_model(monkeypatch):
    monkeypatch.setattr(running, "Captioner", Captioner)
    monkeypatch.setattr(Captioner, "made", [])


def tree(root):
    paths = (path for path in pathlib.Path(root).rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in paths}


def do(request, share="", say=lambda line: None):
    return running.run(request, whole.plan(request), Engine(share=share), say=say, progress=False)


def test_a_work_of_which_all_is_filtered_says_so(tars):  # noqa: F811
    request = asked(min_score=0.9)
    for job in (jobs := whole.plan(request)):
        made = [
            dict(number=n, key=item.key, originals=[dict(text="a", score=0.5)])
            | dict(captions=[dict(text="b", score=0.6, flags=[])])
            for n, item in shard.selected(job)
        ]
        bad = [dict(key="bad", reason="unreadable_image", detail="no picture")]
        part = dict(results=made, quarantined=bad, read=3, last=True, figures={})
        part["digests"] = [str(n) for n in range(len(made))]
        json_files.write_sealed(f"{job.part}/part-00000.json", part)
    with pytest.raises(ValueError) as told:
        running.run(request, jobs, Engine(), say=print, progress=False)
    assert str(told.value) == (
        "t: none of 6 examples can be used: quarantined {'unreadable_image': 2}, filtered {'below "
        "--min_score=0.9': 4}; the first quarantined: bad: no picture; the highest score of a text "
        "is 0.6"
    )


def test_a_second_work_at_one_output_is_refused_and_one_of_another_shard_is_not(tars, monkeypatch):  # noqa: F811
    flags_of("recaption", monkeypatch)
    given = ["recaption", "--checkpoint=c", "--input=t", "--out=out"]

    def work(share: str, *beside: str) -> list[str]:
        """Starts works of shares while one of `share` is under way; those that are let in."""
        let_in: list[str] = []

        def run(request, jobs, engine, **how):
            let_in.append(engine.share)
            for other in beside if len(let_in) == 1 else ():
                recaption.flags.FLAGS.unparse_flags()
                recaption.flags.FLAGS([*given, f"--shard={other}"])
                with contextlib.suppress(lease.Held):
                    recaption.main(["recaption"])
            return dict(waiting=1)

        monkeypatch.setattr(running, "run", run)
        recaption.flags.FLAGS.unparse_flags()
        recaption.flags.FLAGS([*given, f"--shard={share}"])
        assert recaption.main(["recaption"])["waiting"] == 1
        return let_in

    assert work("", "", "") == [""]
    assert work("0/2", "0/2", "1/2") == ["0/2", "1/2"]
    assert work("", "0/2", "1/2") == [""]
    assert work("0/2", "", "1/3", "0/12", "1/2") == ["0/2", "1/2"]
    assert sorted(os.listdir("out/recaption")) == ["input.json", "plan.json"]


def sources_of(to: str, path: str, count: int) -> list[str]:
    """What each image that was written is in the input."""
    if to == "parquet":
        return pq.read_table(path)["source"].to_pylist()
    if to == "tar":
        with tarfile.open(path) as tar:
            told = [tar.extractfile(one).read() for one in tar if one.name.endswith("json")]
    else:
        found = array_record.ArrayRecordFiles([path], [count])(range(count))
        told = [one.extra for one in found]
    return [json.loads(one)["recaption"]["key"] for one in told]


@pytest.mark.parametrize("to", writers.SUFFIXES)
def test_every_format_says_which_image_of_the_input_each_one_is(tars, to):  # noqa: F811
    os.mkdir("f")
    for name in ("b", "a"):
        (tars.parent / f"f/{name}.png").write_bytes(encoded(ord(name)))
    of_tars = [["00000.tar/0", "00000.tar/1"], ["00001.tar/0", "00001.tar/1"]]
    for input, format, wanted in (
        ("t", "webdataset", of_tars),
        ("f", "imagefolder", [["a.png", "b.png"]]),
    ):
        request = asked(input, f"out-{input}", format, to=to)
        shards = do(request)["shards"]
        found = [(os.path.join(request.out, one["file"]), one["count"]) for one in shards]
        assert [sources_of(to, *one) for one in found] == wanted


@pytest.mark.parametrize("to", writers.SUFFIXES)
def test_a_file_that_was_lost_since_is_written_again(tars, to):  # noqa: F811
    request = asked(to=to)
    first, wanted = do(request), tree("out")
    one, other = (os.path.join("out", shard["file"]) for shard in first["shards"])
    assert whole.finished(request)["shards"] == first["shards"]
    del Captioner.made[:]
    for lost, keys in (
        ([one], ["00000.tar/0", "00000.tar/1"]),
        ([other, "out/recaption.json"], ["00001.tar/0", "00001.tar/1"]),
        (["out/quarantine.jsonl"], []),
        (["out/manifest.json"] if to == "array_record" else ["out/recaption.json"], []),
    ):
        for path in lost:
            os.remove(path)
        said = []
        assert not whole.finished(request) and do(request, say=said.append)["count"] == 4
        assert tree("out") == wanted and Captioner.made == keys
        again = (
            f"1 of its files are gone or have another size, and are written again: {lost[0][4:]}"
        )
        assert (said[:1] == [f"out: {again}"]) == bool(keys)
        del Captioner.made[:]
    with open(one, "r+b") as file:
        file.truncate(1000)
    assert not whole.finished(request)
    assert do(request, "1/2") | dict(spent={}) == dict(waiting=1, spent={})  # another job's
    assert Captioner.made == [] and do(request, "0/2")["count"] == 4
    assert tree("out") == wanted and whole.finished(request)


def test_what_was_lost_of_a_work_whose_input_is_gone_is_not_written_empty(tars):  # noqa: F811
    do(asked())
    os.rename("t", "elsewhere")
    whole.plan(asked())
    wanted = tree("out")
    os.remove("out/00001.tar")
    with pytest.raises(FileNotFoundError, match="^t: no such file or folder"):
        whole.plan(asked())
    os.rename("elsewhere", "t")
    do(asked())
    assert tree("out") == wanted


def test_a_field_that_no_image_of_tars_has_is_told_before_and_at_the_end(tars, monkeypatch, capsys):  # noqa: F811
    with tarfile.open(tars / "00001.tar", "w") as tar:
        for name, data in (("0.png", encoded(5)), ("0.json", b'{"alt": "red", "title": "x"}')):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    flags_of("recaption", monkeypatch)
    for field, told in (("alt", 1), ("atl", 0), ("", 1)):
        for before, input in ((bool(field), "t"), (False, "./t/")):  # again, where all is there
            recaption.flags.FLAGS.unparse_flags()
            given = ["--checkpoint=c", f"--out=out-{field}", f"--text_field={field}"]
            recaption.flags.FLAGS(["recaption", f"--input={input}", *given])
            assert recaption.main(["recaption"])["with_original"] == told
            lines = [line for line in capsys.readouterr().err.splitlines() if "text_field" in line]
            wanted = [f"warning: t: --text_field={field}: none of the first 64 images has a text"]
            wanted = wanted * before + [f"warning: t: --text_field={field}: no image has"] * (
                not told
            )
            assert [one[: len(start)] for one, start in zip(lines, wanted, strict=True)] == wanted


@pytest.mark.parametrize("format", ["webdataset", "csv", "prepared"])
def test_a_work_goes_on_with_its_paths_in_another_spelling(tars, format):  # noqa: F811
    input = {"webdataset": "t", "csv": "list.csv", "prepared": "p"}[format]
    if format != "webdataset":
        (tars.parent / "0.png").write_bytes(encoded(0))
        pathlib.Path("list.csv").write_text("image,text\n0.png,red\n")
    if format == "prepared":
        prepare.prepare("csv", "list.csv", "p", processes=1, progress=False)

    def spelled(input, *checkpoints):
        request = asked(input, format=format, to="parquet", checkpoints=checkpoints)
        return whole.as_begun(request)

    do(spelled(input, "runs/a", "b/"))
    wanted = tree("out")
    os.remove("out/00000.parquet")
    os.remove("out/recaption.json")
    here = os.getcwd()
    do(spelled(f"{here}/./{input}", "./runs/a/", f"{here}/b"))
    assert tree("out") == wanted
    for others in (("other", "runs/a", "b"), (input, "b", "runs/a"), (input, "runs/a")):
        with pytest.raises(ValueError, match=r"--out=out was begun with (input|checkpoints)="):
            whole.plan(spelled(*others))


def test_an_image_whose_text_is_not_utf8_is_left_out_unless_another_is_taken(tars):  # noqa: F811
    with tarfile.open(tars / "00001.tar", "w") as tar:
        for name, data in (
            ("0.png", encoded(5)),
            ("0.txt", "caf\u00e9".encode("latin-1")),
            ("0.json", b'{"alt": "red"}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = do(asked())
    assert (found["count"], found["quarantined"]) == (2, {"bad_utf8": 1})
    request = asked(out="other")
    options = dataclasses.replace(request.options, text_field="alt")
    found = do(dataclasses.replace(request, options=options))
    assert (found["count"], found["quarantined"], found["with_original"]) == (3, {}, 1)


@pytest.mark.parametrize("to", ["tar", "parquet", "array_record"])
def test_a_class_folder_whose_name_is_no_utf8_is_a_label(tmp_path, monkeypatch, to):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate((b"f/caf\xe9", b"f/dog")):
        os.makedirs(name)
        pathlib.Path(os.fsdecode(name), f"{number}.png").write_bytes(encoded(number))
    request = asked("f", format="imagefolder", to=to)
    (job,) = jobs = whole.plan(request)
    said = dict(captions=[dict(text="a", flags=[], score=0.5)], originals=[])
    made = [dict(said, number=n, key=item.key) for n, item in shard.selected(job)]
    part = dict(results=made, quarantined=[], read=2, last=True, figures={})
    part["digests"] = [str(n) for n in range(len(made))]
    json_files.write_sealed(f"{job.part}/part-00000.json", part)
    shard.write(job, request, float("-inf"), whole.name(request, jobs, job))
    whole.finish(request, jobs, float("-inf"))
    wanted = [[r"caf\udce9"], ["dog"]]
    if to == "parquet":
        assert pq.read_table("out/00000.parquet")["label"].to_pylist() == wanted
    elif to == "tar":
        with tarfile.open("out/00000.tar") as tar:
            found = [json.load(tar.extractfile(f"0000000000{n}.json"))["labels"] for n in range(2)]
        assert found == wanted
    else:
        records = array_record.open_split("out", "train").read([0, 1])
        assert [list(record.labels) for record in records] == wanted
        assert manifest.read_manifest("out")["class_names"] == [r"caf\udce9", "dog"]


def test_an_image_of_a_parquet_that_keeps_no_text_has_none_when_it_is_read(tmp_path):
    """The captions that it did not keep lie in a column beside `text`."""
    said = [dict(text="a cat", score=0.5)]
    made = dict(key="a", captions=[dict(text="a dog", flags=[], score=0.6)], originals=said)
    item, kept = Item("a", encoded(1)), [[("a cat", 0.5)], []]
    examples = [writers.Example(str(n), item, one, made) for n, one in enumerate(kept)]
    writers.write("parquet", str(tmp_path / "0.parquet"), iter(examples))
    (unit,) = parquet.plan(str(tmp_path), "", options := Options())
    assert [list(one.texts) for one in parquet.read(unit, options)] == [["a cat"], []]
    options = Options(text_field="captions")
    assert [list(one.texts) for one in parquet.read(unit, options)] == [["a dog"], ["a dog"]]


def test_a_row_group_holds_no_more_of_large_images(tmp_path, monkeypatch):
    """Of 256 photographs of 8 MB each one took 10 GB of memory."""
    monkeypatch.setattr(writers, "_GROUP_BYTES", 5000)
    items = [Item(str(n), bytes([n]) * (2000 if n < 6 else 1)) for n in range(250)]
    made = dict(key="a", captions=[], originals=[])
    path = str(tmp_path / "0.parquet")
    writers.write("parquet", path, (writers.Example(one.key, one, [], made) for one in items))
    with pq.ParquetFile(path) as table:
        groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        assert groups == [3, 3, 244]
        assert table.read(["image"])["image"].to_pylist() == [one.image for one in items]


def test_a_list_with_a_row_a_caption_is_no_collapse(tmp_path, monkeypatch):
    """Of 240 captions of 40 pictures 40 differ, a sixth: the alarm is of less than a fifth."""

    class OfPictures(Captioner):
        def part(self, pictures, look, answers=None):
            found, told = super().part(pictures, look)
            for one, picture in zip(found, pictures):
                one["captions"] = [dict(text=f"drawn {picture.key}", score=0.6, flags=[])]
            return found, told

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "Captioner", OfPictures)
    rows = ["image,caption"]
    for number in range(40):
        pathlib.Path(f"{number}.png").write_bytes(encoded(number))
        rows += [f"{number}.png,words {row} on {number}" for row in range(6)]
    pathlib.Path("rows.csv").write_text("\n".join(rows))
    told = do(asked("rows.csv", "out", "csv"))
    assert told["count"] == 240 and told["collapse"]["captions"] == 40
    assert told["collapse"]["distinct"] == 1 and told["collapse"]["warning"] == ""


class Poor(Captioner):
    """Scores its captions above the originals; every other one begins alike."""

    def part(self, pictures, look, answers=None):
        found, told = super().part(pictures, look)
        for one in found[::2]:
            one["captions"][0] |= dict(text=f"a photo of {one['number']}")
        return found, told


class Mismatched(Captioner):
    def part(self, pictures, look, answers=None):
        found, _ = super().part(pictures, look)
        return found, dict(match=0.6 * len(pictures), matched=len(pictures))


@pytest.mark.parametrize(
    ("captioner", "why"),
    [
        (Poor, "50% of 40 captions start with the same three words ('a photo of'; 0% of the"),
        (Mismatched, "fits its own image better than another in 60% of cases (chance 50%"),
    ],
)
def test_a_model_that_would_make_texts_worse_is_stopped_or_keeps_them(
    tmp_path, monkeypatch, captioner, why
):
    """Of 600 human captions 222 were replaced by "a photo of ..." of a model outside its domain."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "Captioner", captioner)
    rows = ["image,caption"]
    for number in range(40):
        pathlib.Path(f"{number}.png").write_bytes(encoded(number))
        rows.append(f"{number}.png,words on {number}")
    pathlib.Path("rows.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="stopped after 40 images") as told:
        do(asked("rows.csv", "out", "csv"))
    assert why in str(told.value) and "--text=synthetic" in str(told.value)
    assert not pathlib.Path("out/recaption").exists()
    told = do(asked("rows.csv", "out", "csv", text="synthetic"))  # where that is asked for
    assert told["replaced"] == 40 and why in told["collapse"]["warning"]
    # A later shard of a work keeps its originals, and the work goes on.
    monkeypatch.setattr(shard, "_check_first", lambda job, request: None)
    told = do(asked("rows.csv", "kept", "csv"))
    assert (told["count"], told["replaced"], told["kept_by_alarm"]) == (40, 0, 40)


def test_a_model_that_matches_texts_to_images_is_trusted():
    eye = np.eye(4, dtype=np.float32)
    assert selection.match(eye, eye, list("abcd")) == (4.0, 4)
    assert selection.match(eye, eye[[1, 0, 2, 3]], list("abcd")) == (
        pytest.approx(7 / 3 + 1 / 3),
        4,
    )
    assert selection.match(eye, eye, ["same"] * 4) == (0.0, 0)
    assert selection.warning_of_match(0.5, 31) == selection.warning_of_match(0.75, 100) == ""


def test_shards_are_tidied_many_at_a_time(tars, monkeypatch):  # noqa: F811
    """A bucket takes tens of milliseconds to say of each that nothing of it is left."""
    request, clear, together = asked(), shard.clear, threading.Barrier(2, timeout=30)
    jobs = whole.plan(request)
    assert len(jobs) == 2
    do(request)
    tidied = []

    def waits(job):
        together.wait()
        clear(job)
        tidied.append(job.number)

    monkeypatch.setattr(shard, "clear", waits)
    least = whole.threshold(request, jobs)
    assert whole.finish(request, jobs, least)["count"] and sorted(tidied) == [0, 1]


@pytest.mark.parametrize("to", writers.SUFFIXES)
def test_a_shard_that_a_full_disk_does_not_take_is_an_error_of_the_disk(tmp_path, to):
    made = dict(key="a", captions=[], originals=[])
    examples = [writers.Example("a", Item("a", os.urandom(200_000)), [], made)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            writers.write(to, str(tmp_path / "out"), iter(examples))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
