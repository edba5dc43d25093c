"""prepare: every format, processes, kills, remote paths, TensorFlow Datasets, the commands."""

import csv
import io
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tarfile
import time

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import flags_of, tiny_config
from PIL import Image
from prepare_cases import add_member, digests_of, encode, import_data, reasons_of, write_tar

from coca_jax.cli import prepare as command
from coca_jax.data import filters
from coca_jax.data.sources import array_record
from coca_jax.data.sources.items import Options

ROOT = pathlib.Path(__file__).parent.parent


def test_the_same_pairs_from_every_format(tmp_path):
    count = 7
    captions = [f'caption {i}, with "quotes" and é' for i in range(count)]
    images = [encode(i) for i in range(count)]
    folder = tmp_path / "imagefolder"
    folder.mkdir()
    for i, image in enumerate(images):
        (folder / f"{i}.jpg").write_bytes(image)
    rows = [dict(file_name=f"{i}.jpg", text=captions[i], label=["x", "y"]) for i in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for suffix, delimiter in (("tsv", "\t"), ("csv", ",")):
        with open(folder / f"list.{suffix}", "w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["filepath", "title"])
            writer.writerows([f"{i}.jpg", captions[i]] for i in range(count))
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        for i, image in enumerate(images):
            add_member(archive, f"{i}.jpg", image)
            add_member(archive, f"{i}.txt", captions[i].encode())
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array([dict(bytes=im, path=None) for im in images], struct_type),
            "caption": captions,
            "label": list(range(count)),
        }
    )
    classes = [f"class {i}" for i in range(count)]
    info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": classes}}}}
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(info)}),
        tmp_path / "p.parquet",
        row_group_size=3,
    )
    # img2dataset's parquet output
    pq.write_table(pa.table({"jpg": images, "caption": captions}), tmp_path / "i.parquet")
    for format, input in (
        ("imagefolder", folder),
        ("csv", folder / "list.tsv"),
        ("csv", folder / "list.csv"),
        ("webdataset", tmp_path / "w.tar"),
        ("parquet", tmp_path / "p.parquet"),
        ("parquet", tmp_path / "i.parquet"),
    ):
        out = tmp_path / "out" / pathlib.Path(input).name
        result = import_data(format, input, out)
        assert (result["read"], result["written"], result["quarantined"]) == (count, count, {})
        found = list(filters.open_source(str(out)))
        assert [r.image for r in found] == images  # bytes are copied
        assert [r.texts for r in found] == [(c,) for c in captions]
        if input == tmp_path / "p.parquet":
            assert [r.labels for r in found] == [(c,) for c in classes]
            manifest = json.loads((out / "manifest.json").read_text())
            assert manifest["class_names"] == classes
    # A folder a class, without metadata.
    for name in ("cat", "big_dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "a.jpg").write_bytes(images[0])
    import_data("imagefolder", tmp_path / "classes", tmp_path / "out" / "classes")
    found = list(filters.open_source(str(tmp_path / "out" / "classes")))
    assert sorted(r.labels for r in found) == [("big dog",), ("cat",)]


def test_prepared_data_give_their_other_fields_and_their_only_split(tmp_path):
    (tmp_path / "raw").mkdir()
    rows = []
    for number, kind in enumerate((0, 1, 9)):
        (tmp_path / f"raw/{number}.jpg").write_bytes(encode(number))
        row = dict(
            file_name=f"{number}.jpg", text="plain", alt=f"no. {number}", kind=kind, site="x"
        )
        rows.append(json.dumps(row) + "\n")
    (tmp_path / "raw/metadata.jsonl").write_text("".join(rows))
    first, again = str(tmp_path / "first"), tmp_path / "again"
    import_data("imagefolder", tmp_path / "raw", first)
    fields = dict(text_field="alt", label_field="kind", class_names=("cat", "dog"))
    result = import_data("prepared", first, again, **fields)
    assert (result["written"], result["quarantined"]) == (2, {"bad_label": 1})
    assert list(reasons_of(again).values()) == ["bad_label"]
    found = filters.open_source(str(again)).read(range(2))
    assert [(r.texts, r.labels, r.image) for r in found] == [
        ((f"no. {n}",), (name,), encode(n)) for n, name in enumerate(("cat", "dog"))
    ]
    assert all(json.loads(r.extra)["site"] == "x" for r in found)
    (unit,) = array_record.plan(first, "", Options())  # where nobody names a split
    assert (unit.path, unit.stop) == (f"{first}@train", 3)
    import_data("imagefolder", tmp_path / "raw", first, split="val")
    with pytest.raises(ValueError, match=r"no split ''; it has \['train', 'val'\]"):
        array_record.plan(first, "", Options())


def test_where_sample_and_shrinking(tmp_path):
    write_tar(tmp_path / "a.tar", 60)
    result = import_data(
        "webdataset", tmp_path / "a.tar", tmp_path / "w", where=(("width", ("3", "5")),)
    )
    assert result["written"] == 2 and result["filtered"] == {"where": 58}
    result = import_data("webdataset", tmp_path / "a.tar", tmp_path / "s", sample=0.5)
    assert 18 <= result["written"] <= 42
    import_data("webdataset", tmp_path / "a.tar", tmp_path / "m", max_side=20)
    sizes = {Image.open(io.BytesIO(r.image)).size for r in filters.open_source(str(tmp_path / "m"))}
    assert sizes == {(20, 15)}


def test_results_do_not_depend_on_processes(tmp_path):
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", 20, i * 20)
    one = import_data("webdataset", tmp_path / "*.tar", tmp_path / "one", dedup="content")
    two = import_data(
        "webdataset", tmp_path / "*.tar", tmp_path / "two", dedup="content", processes=2
    )
    assert one["shards"] == 4 and one | {"out": ""} == two | {"out": ""}
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "two")
    # The same command again does nothing; another one for the same split is refused.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").iterdir()}
    assert import_data("webdataset", tmp_path / "*.tar", tmp_path / "one", dedup="content") == one
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "one").iterdir()}
    with pytest.raises(ValueError, match="--overwrite"):
        import_data("webdataset", tmp_path / "*.tar", tmp_path / "one")
    import_data("webdataset", tmp_path / "0.tar", tmp_path / "one", split="test")
    assert len(list(filters.open_source(str(tmp_path / "one"), "test"))) == 20


@pytest.mark.slow
def test_killed_and_rerun_gives_the_same_bytes(tmp_path):
    kills = int(os.environ.get("COCA_JAX_KILLS", "3"))
    for i in range(6):
        write_tar(tmp_path / f"{i}.tar", 150, i * 150)
    command = [
        *(sys.executable, "-m", "coca_jax.cli.prepare", "--format=webdataset", "--processes=2"),
        f"--input={tmp_path}/*.tar",
    ]

    def run(out):
        return subprocess.Popen(
            [*command, f"--out={out}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    started = time.time()
    assert run(tmp_path / "whole").wait() == 0
    usual = time.time() - started
    whole = digests_of(tmp_path / "whole")
    rng = random.Random(0)
    for kill in range(kills):
        out = tmp_path / f"killed{kill}"
        process = run(out)
        time.sleep(usual * rng.uniform(0.2, 0.95))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert run(out).wait() == 0
        assert digests_of(out) == whole, kill


def test_in_memory_file_system_in_and_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    write_tar(tmp_path / "a.tar", 5)
    memory.pipe_file("/bucket/a.tar", (tmp_path / "a.tar").read_bytes())
    for i in range(3):
        memory.pipe_file(f"/bucket/images/{i}.jpg", encode(i))
    rows = "".join(f"{i}.jpg\tcaption {i}\n" for i in range(3))
    memory.pipe_file("/bucket/images/list.tsv", ("filepath\ttitle\n" + rows).encode())
    for format, input, count in (
        ("webdataset", "memory://bucket", 5),
        ("csv", "memory://bucket/images", 3),
        ("imagefolder", "memory://bucket/images", 3),
    ):
        options = {} if format != "imagefolder" else dict(class_names=("a", "b"))
        out = f"memory://out/{format}"
        if format == "imagefolder":
            memory.pipe_file(
                "/bucket/images/metadata.jsonl",
                b'{"file_name": "0.jpg", "label": 1}\n{"file_name": "9.jpg", "label": 0}\n'
                b'{"file_name": "1.jpg", "label": 7}\n',
            )
        result = import_data(format, input, out, **options)
        assert result["read"] == count
        if format == "imagefolder":
            assert result["quarantined"] == {"missing_image": 1, "bad_label": 1}
        found = list(filters.open_source(out))
        assert found[0].image == encode(0)
        again = list(filters.open_source(out))
        assert [r.key for r in again] == [r.key for r in found]


def test_tensorflow_datasets_reads_the_result_and_its_tensorflow_sees_no_gpu(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", 5)
    import_data("webdataset", tmp_path / "a.tar", tmp_path / "out")
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder_from_directory(str(tmp_path / "out"))
    data = builder.as_data_source("train")
    assert len(data) == builder.info.splits["train"].num_examples == 5
    assert [bytes(t).decode() for t in data[3]["text"]] == ["caption 3"]
    assert data[3]["image"].shape == (30, 40, 3)
    # And back: a TFDS data set as an input, and as a source without importing it.
    hidden = []
    tensorflow = pytest.importorskip("tensorflow")
    monkeypatch.setattr(tensorflow.config, "set_visible_devices", lambda *a: hidden.append(a))
    result = import_data("tfds", tmp_path / "out", tmp_path / "again")
    assert result["written"] == 5
    assert ([], "GPU") in hidden
    found = list(filters.open_source(str(tmp_path / "again")))
    assert [r.texts for r in found] == [(f"caption {i}",) for i in range(5)]
    assert found[2].image == encode(2)


def test_a_data_set_of_tfds_trains_by_its_name(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    write_tar(tmp_path / "a.tar", 5)
    import_data("webdataset", tmp_path / "a.tar", tmp_path / "tfds" / "mine" / "1.0.0")
    entry = dict(tfds="mine", data_dir=str(tmp_path / "tfds"), text_field="text")
    source = filters.open_source(entry)
    assert (source.name, len(source)) == ("tfds mine [train]", 5)
    for index, record in zip((3, 0), source.read([3, 0]), strict=True):
        assert record.texts == (f"caption {index}",) and record.image == encode(index)
        assert record.key == str(index)
    with pytest.raises(ValueError, match="no field .title.; it has .*'text'"):
        filters.open_source(entry | dict(text_field="title"))
    for wrong in (dict(tfds="absent"), dict(split="test")):
        with pytest.raises(ValueError, match="; use `coca-jax prepare") as error:
            filters.open_source(entry | wrong)
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    for name in ("absent", "tfds:absent"):
        with pytest.raises(ValueError, match="^tfds:absent: .*Dataset absent not found"):
            import_data("tfds", name, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^tfds:tfds/mine is a folder without"):
        import_data("tfds", "tfds/mine", tmp_path / "out")


def test_whatever_imports_tensorflow_keeps_it_off_gpus():
    package = pathlib.Path(__file__).parent.parent / "coca_jax"
    imports = re.compile(r"^\s*(import|from) (tensorflow|seqio)", re.M)
    found = [p for p in package.rglob("*.py") if imports.search(p.read_text())]
    off = 'set_visible_devices([], "GPU")'
    assert found and [p for p in found if off not in p.read_text()] == []


@pytest.fixture
def call(monkeypatch):
    """The command in this process: what it returns."""
    flags_of("prepare", monkeypatch)

    def run(*asked, **given):
        arguments = ["prepare", *(f"--{name}={value}" for name, value in given.items())]
        monkeypatch.setattr(sys, "argv", arguments)
        command.flags.FLAGS.unparse_flags()
        command.flags.FLAGS(arguments)
        return command.main(["prepare", *asked])

    return run


def test_flags_choose_examples_hold_some_out_and_share_the_work(call, tmp_path, capsys):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", 12, 12 * number)
    both = dict(input=tmp_path / "*.tar", processes=1)
    found = call(**both, out=tmp_path / "w", where="width=3,5,20")
    assert (found["written"], found["filtered"]) == (3, {"where": 21})
    found = call(**both, out=tmp_path / "h", holdout=0.3)
    assert found["written"] + found["held_out"]["written"] == 24
    assert 1 < found["held_out"]["written"] < 16
    shared = dict(both, out=tmp_path / "s", shards=2)
    told = [call(**shared, shard=f"{number}/2")["waiting"] for number in range(2)]
    assert told == [1, 0]
    said = capsys.readouterr().err
    assert "1 of 2 shards are not there yet; the same command without --shard joins" in said
    assert "all 2 shards are there; the same command" in said
    assert call(**shared)["written"] == 24


def test_flags_that_cannot_be_are_a_line(call, tmp_path):
    (tmp_path / "names.txt").write_text("")
    given = dict(input=tmp_path, out=tmp_path / "out", format="imagefolder")
    for asked, more, says in (
        ((), dict(where="width"), "--where=width: write field=value or field=value,value"),
        ((), dict(class_names=tmp_path / "names.txt"), "names.txt: it is empty"),
        ((), dict(class_names="none.txt"), "--class_names=none.txt: no such file; give"),
        ((), dict(sample=1.5), "--sample=1.5: give a share above 0, at most 1"),
        ((), dict(input=""), "--input is missing"),
        (("vocabulary",), dict(out=""), "prepare vocabulary needs --input and --out"),
        (("inspect",), {}, "prepare inspect needs --config=NAME or --work"),
        (
            ("look",),
            {},
            "unexpected argument 'look'; give --input=look, or 'vocabulary' or 'inspect'",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            call(*asked, **given | more)
    for uses, fix in ((), "put a pattern in quotes"), (("vocabulary",), "separate them by commas"):
        for twice in (["--input=a", "--input=b"], ["--input", "a", "--input", "b"]):
            command.flags.FLAGS.unparse_flags()
            command.flags.FLAGS(["prepare", f"--out={tmp_path / 'out'}", *twice])
            with pytest.raises(ValueError, match=f"--input stands there 2 times.*; {fix}"):
                command.main(["prepare", *uses])
    recipe = tiny_config()
    recipe.data.sources = (dict(builtin="scenes"),)
    with pytest.raises(ValueError, match="--step=0: steps count from 1"):
        command.inspect(recipe, 0)
    assert not (tmp_path / "out").exists()


def test_commands(commands, tmp_path):
    write_tar(tmp_path / "a.tar", 12)

    def run(*arguments):
        done = commands.run(["prepare", *arguments], tmp_path)
        return done.returncode, done.stdout.strip().splitlines(), done.stderr

    code, lines, _ = run(
        "--format=webdataset", f"--input={tmp_path}/a.tar", f"--out={tmp_path}/out", "--processes=1"
    )
    assert code == 0 and json.loads(lines[-1])["written"] == 12
    code, lines, _ = run(
        "vocabulary", f"--input={tmp_path}/out", "--size=400", f"--out={tmp_path}/v.model"
    )
    assert code == 0 and json.loads(lines[-1])["sentences"] == 12
    (tmp_path / "recipe.py").write_text(
        "from coca_jax.recipes import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        f"    config.batch_size = 4\n    config.data.sources = (dict(path='{tmp_path}/out'),)\n"
        "    return config\n"
    )
    code, lines, _ = run("inspect", f"--config={tmp_path}/recipe.py", "--step=4")
    examples = json.loads(lines[-1])["examples"]
    assert code == 0 and [e["epoch"] for e in examples] == [1] * 4
    assert all(e["text"] == f"caption {e['index']}" for e in examples)
    code, _, error = run("--format=webdataset", f"--input={tmp_path}/none", f"--out={tmp_path}/x")
    assert code == 2
    assert error.splitlines()[-1] == f"error: {tmp_path}/none: no such file or folder"
