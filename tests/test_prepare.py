"""prepare: every format, every fault, kills, duplicates, remote paths, the commands."""

import csv
import hashlib
import io
import json
import os
import pathlib
import random
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from coca_jax import prepare
from coca_jax.configs import base
from coca_jax.data import records, run_vocabulary, sources
from coca_jax.data.loaders import open_stream
from coca_jax.importers import dedup, tar_members
from coca_jax.importers.items import Options

ROOT = pathlib.Path(__file__).parent.parent


def _pixels(seed, size=(40, 30)):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def _bytes(seed, format="JPEG", size=(40, 30)):
    out = io.BytesIO()
    _pixels(seed, size).save(out, format)
    return out.getvalue()


def _prepare(format, input, out, **options):
    split = options.pop("split", "train")
    keys = {k: options.pop(k) for k in ("shard_count", "processes", "overwrite") if k in options}
    keys.setdefault("processes", 1)
    return prepare.prepare(
        format,
        str(input),
        str(out),
        split=split,
        options=Options(**options),
        progress=False,
        **keys,
    )


def _add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _tar(path, count, start=0):
    with tarfile.open(path, "w") as archive:
        for index in range(start, start + count):
            _add(archive, f"{index:05d}.jpg", _bytes(index))
            _add(archive, f"{index:05d}.txt", f"caption {index}".encode())
            _add(archive, f"{index:05d}.json", json.dumps({"width": index}).encode())


def _reasons(out, split="train"):
    lines = (pathlib.Path(out) / f"{split}-quarantine.jsonl").read_text().splitlines()
    return {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}


def _tree(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(pathlib.Path(folder).rglob("*"))
        if p.is_file()
    }


def test_the_same_pairs_from_every_format(tmp_path):
    count = 7
    captions = [f'caption {i}, with "quotes" and é' for i in range(count)]
    images = [_bytes(i) for i in range(count)]
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
            _add(archive, f"{i}.jpg", image)
            _add(archive, f"{i}.txt", captions[i].encode())
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
    # img2dataset's parquet and tfrecord outputs
    pq.write_table(pa.table({"jpg": images, "caption": captions}), tmp_path / "i.parquet")
    with open(tmp_path / "i.tfrecord", "wb") as file:
        for image, caption in zip(images, captions):
            example = records._Example()
            example.features.feature["jpg"].bytes_list.value.append(image)
            example.features.feature["caption"].bytes_list.value.append(caption.encode())
            example.features.feature["width"].int64_list.value.append(40)
            data = example.SerializeToString()
            file.write(struct.pack("<Q", len(data)) + bytes(4) + data + bytes(4))
    for format, input in (
        ("imagefolder", folder),
        ("csv", folder / "list.tsv"),
        ("csv", folder / "list.csv"),
        ("webdataset", tmp_path / "w.tar"),
        ("parquet", tmp_path / "p.parquet"),
        ("parquet", tmp_path / "i.parquet"),
        ("tfrecord", tmp_path / "i.tfrecord"),
    ):
        out = tmp_path / "out" / pathlib.Path(input).name
        result = _prepare(format, input, out)
        assert (result["read"], result["written"], result["quarantined"]) == (count, count, {})
        found = list(sources.open_source(str(out)))
        assert [r.image for r in found] == images  # bytes are copied
        assert [r.texts for r in found] == [(c,) for c in captions]
        if input == tmp_path / "p.parquet":
            assert [r.labels for r in found] == [(c,) for c in classes]
            manifest = json.loads((out / "manifest.json").read_text())
            assert manifest["class_names"] == classes
        if format == "tfrecord":
            assert json.loads(found[0].extra) == {"width": 40}
    # A folder a class, without metadata.
    for name in ("cat", "big_dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "a.jpg").write_bytes(images[0])
    _prepare("imagefolder", tmp_path / "classes", tmp_path / "out" / "classes")
    found = list(sources.open_source(str(tmp_path / "out" / "classes")))
    assert sorted(r.labels for r in found) == [("big dog",), ("cat",)]


def test_faults_end_in_quarantine_with_reasons(tmp_path):
    good, bomb = _bytes(1), io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    whole = _bytes(2, size=(300, 200))
    members = {
        "good": (good, b"a good one"),
        "truncated": (whole[: len(whole) // 2], b"cut"),
        "zero": (b"", b"nothing"),
        "bomb": (bomb.getvalue(), b"400 megapixels"),
        "longtext": (good, b"word " * 100_000),
        "html": (b"<html>not found</html>", b"wrong extension"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n", b"a program, not a picture"),
        "utf8": (good, b"caf\xe9"),
        "notext": (good, None),
        "emptytext": (good, b"  \n"),
        "noimage": (None, b"text only"),
        "tiny": (_bytes(3, size=(4, 4)), b"too small"),
        "wide": (_bytes(4, size=(400, 16)), b"a banner"),
    }
    encodings = {4: "utf-8-sig", 5: "utf-16"}  # as editors on Windows write
    for i in range(7):  # among them a PNG with the wrong extension
        text = f"a fine one {i}".encode(encodings.get(i, "utf-8"))
        members[f"fine{i}"] = (_bytes(i, "PNG" if i == 3 else "JPEG"), text)
    path = tmp_path / "faults.tar"
    with tarfile.open(path, "w") as archive:
        for key, (image, text) in members.items():
            if image is not None:
                _add(archive, f"{key}.jpg", image)
            if text is not None:
                _add(archive, f"{key}.txt", text)
        _add(archive, "good.jpg", good)  # its key once more
        _add(archive, "good.txt", b"again")
        _add(archive, "lost.jpg", whole)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(whole[-200:])])  # the archive is half-written
    result = _prepare(
        "webdataset", path, tmp_path / "out", max_pixels=100_000_000, min_side=8, max_aspect=4.0
    )
    reasons = {}
    for line in (tmp_path / "out/train-quarantine.jsonl").read_text().splitlines():
        entry = json.loads(line)
        reasons.setdefault(entry["key"].split("/")[1], []).append(entry["reason"])
    assert reasons == {
        "truncated": ["damaged_image"],
        "zero": ["empty_image"],
        "bomb": ["too_many_pixels"],
        "longtext": ["text_too_long"],
        "html": ["unreadable_image"],
        "postscript": ["unreadable_image"],
        "utf8": ["bad_utf8"],
        "notext": ["missing_text"],
        "emptytext": ["missing_text"],
        "noimage": ["missing_image"],
        "tiny": ["image_too_small"],
        "wide": ["aspect"],
        "good": ["duplicate_key"],
        "lost": ["damaged_archive"],
    }
    assert (result["read"], result["written"]) == (22, 8)
    assert sum(result["quarantined"].values()) == 14
    left = {"a good one", *(f"a fine one {i}" for i in range(7))}
    assert {r.texts[0] for r in sources.open_source(str(tmp_path / "out"))} == left
    config = base.get_config()  # and training on what is left works
    config.batch_size, config.model.image_size = 8, 16
    config.model.text.update(vocab_size=400, max_len=24)
    config.data.max_bad_fraction = 0.0
    config.data.sources = (dict(path=str(tmp_path / "out")),)
    found = run_vocabulary.load_or_train(config, str(tmp_path / "run"))
    batches = open_stream(config, found)
    for _ in range(2):
        batch = next(batches)
        assert {found.decode(tokens) for tokens in batch["tokens"]} == left
        assert len(np.unique(batch["image"], axis=0)) == 8 - 1  # 'good' and 'fine1' look the same
    assert batches.skipped() == [0]


def test_where_sample_and_shrinking(tmp_path):
    _tar(tmp_path / "a.tar", 60)
    result = _prepare(
        "webdataset", tmp_path / "a.tar", tmp_path / "w", where=(("width", ("3", "5")),)
    )
    assert result["written"] == 2 and result["filtered"] == {"where": 58}
    result = _prepare("webdataset", tmp_path / "a.tar", tmp_path / "s", sample=0.5)
    assert 18 <= result["written"] <= 42
    _prepare("webdataset", tmp_path / "a.tar", tmp_path / "m", max_side=20)
    sizes = {Image.open(io.BytesIO(r.image)).size for r in sources.open_source(str(tmp_path / "m"))}
    assert sizes == {(20, 15)}


def test_duplicates_by_content_by_look_and_against_evaluation(tmp_path):
    images = [_bytes(i, size=(96, 72)) for i in range(6)]
    again = io.BytesIO()
    Image.open(io.BytesIO(images[1])).resize((80, 60)).save(again, "JPEG", quality=60)
    images += [images[0], again.getvalue()]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, image in enumerate(images):
            _add(archive, f"{i}.jpg", image)
            _add(archive, f"{i}.txt", b"text")
    (tmp_path / "eval").mkdir()
    Image.open(io.BytesIO(images[3])).save(tmp_path / "eval" / "e.png")
    for mode, excluded, reasons in (
        ("none", (), {}),
        ("content", (), {"a.tar/6": "duplicate_image"}),
        ("perceptual", (), {"a.tar/6": "duplicate_image", "a.tar/7": "near_duplicate"}),
        ("none", (str(tmp_path / "eval"),), {"a.tar/3": "in_evaluation"}),
    ):
        out = tmp_path / f"{mode}{len(excluded)}"
        _prepare("webdataset", tmp_path / "a.tar", out, dedup=mode, exclude=excluded)
        assert _reasons(out) == reasons


def test_looks_tell_images_apart():
    found = [dedup.look(np.asarray(_pixels(i, (64, 64)))) for i in range(200)]
    bits = np.unpackbits(np.stack(found), axis=1)
    apart = [(bits[i] != bits[j]).sum() for i in range(200) for j in range(i)]
    assert min(apart) > 12


def test_results_do_not_depend_on_processes(tmp_path):
    for i in range(4):
        _tar(tmp_path / f"{i}.tar", 20, i * 20)
    one = _prepare("webdataset", tmp_path / "*.tar", tmp_path / "one", dedup="content")
    two = _prepare("webdataset", tmp_path / "*.tar", tmp_path / "two", dedup="content", processes=2)
    assert one["shards"] == 4 and one | {"out": ""} == two | {"out": ""}
    assert _tree(tmp_path / "one") == _tree(tmp_path / "two")
    # The same command again does nothing; another one for the same split is refused.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").iterdir()}
    assert _prepare("webdataset", tmp_path / "*.tar", tmp_path / "one", dedup="content") == one
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "one").iterdir()}
    with pytest.raises(ValueError, match="--overwrite"):
        _prepare("webdataset", tmp_path / "*.tar", tmp_path / "one")
    _prepare("webdataset", tmp_path / "0.tar", tmp_path / "one", split="test")
    assert len(list(sources.open_source(str(tmp_path / "one"), "test"))) == 20


@pytest.mark.slow
def test_killed_and_rerun_gives_the_same_bytes(tmp_path):
    kills = int(os.environ.get("COCA_JAX_KILLS", "3"))
    for i in range(6):
        _tar(tmp_path / f"{i}.tar", 150, i * 150)
    command = [
        *(sys.executable, "-m", "coca_jax.prepare", "--format=webdataset", "--processes=2"),
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
    whole = _tree(tmp_path / "whole")
    rng = random.Random(0)
    for kill in range(kills):
        out = tmp_path / f"killed{kill}"
        process = run(out)
        time.sleep(usual * rng.uniform(0.2, 0.95))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert run(out).wait() == 0
        assert _tree(out) == whole, kill


def test_in_memory_file_system_in_and_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    _tar(tmp_path / "a.tar", 5)
    memory.pipe_file("/bucket/a.tar", (tmp_path / "a.tar").read_bytes())
    for i in range(3):
        memory.pipe_file(f"/bucket/images/{i}.jpg", _bytes(i))
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
        result = _prepare(format, input, out, **options)
        assert result["read"] == count
        if format == "imagefolder":
            assert result["quarantined"] == {"missing_image": 1, "bad_label": 1}
        found = list(sources.open_source(out))
        assert found[0].image == _bytes(0)
        again = list(sources.open_source(out))
        assert [r.key for r in again] == [r.key for r in found]


def test_tensorflow_datasets_reads_the_result_and_its_tensorflow_sees_no_gpu(tmp_path, monkeypatch):
    _tar(tmp_path / "a.tar", 5)
    _prepare("webdataset", tmp_path / "a.tar", tmp_path / "out")
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
    result = _prepare("tfds", tmp_path / "out", tmp_path / "again")
    assert result["written"] == 5
    assert ([], "GPU") in hidden
    found = list(sources.open_source(str(tmp_path / "again")))
    assert [r.texts for r in found] == [(f"caption {i}",) for i in range(5)]
    assert found[2].image == _bytes(2)


def test_whatever_imports_tensorflow_keeps_it_off_gpus():
    package = pathlib.Path(__file__).parent.parent / "coca_jax"
    imports = re.compile(r"^\s*(import|from) (tensorflow|seqio)", re.M)
    found = [p for p in package.rglob("*.py") if imports.search(p.read_text())]
    off = 'set_visible_devices([], "GPU")'
    assert found and [p for p in found if off not in p.read_text()] == []


def test_errors_name_the_remedy(tmp_path):
    _tar(tmp_path / "a.tar", 3)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        _prepare("webdataset", tmp_path / "absent", tmp_path / "o1")
    with pytest.raises(FileNotFoundError, match="parquet"):
        _prepare("parquet", tmp_path, tmp_path / "o2")
    with pytest.raises(ValueError, match="none of 3 examples"):
        _prepare("webdataset", tmp_path / "a.tar", tmp_path / "o3", require="label")
    with pytest.raises(ValueError, match="--format=zip"):
        _prepare("zip", tmp_path, tmp_path / "o4")


def test_commands(commands, tmp_path):
    _tar(tmp_path / "a.tar", 12)

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
        "from coca_jax.configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        f"    config.batch_size = 4\n    config.data.sources = (dict(path='{tmp_path}/out'),)\n"
        "    return config\n"
    )
    code, lines, _ = run("inspect", f"--config={tmp_path}/recipe.py", "--step=4")
    examples = json.loads(lines[-1])["examples"]
    assert code == 0 and [e["epoch"] for e in examples] == [1] * 4
    assert all(e["text"] == f"caption {e['index']}" for e in examples)
    code, _, error = run("--format=webdataset", f"--input={tmp_path}/none", f"--out={tmp_path}/x")
    assert code == 2 and error.strip().splitlines()[-1].startswith("error: --input=")


def _folder(folder, rows, **fields):
    folder.mkdir()
    for i in range(rows):
        (folder / f"{i}.jpg").write_bytes(_bytes(i))
    lines = [
        json.dumps({"file_name": f"{i}.jpg"} | {k: v(i) for k, v in fields.items()})
        for i in range(rows)
    ]
    if fields:
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_data_without_texts_are_told_apart_with_what_would_give_them(tmp_path, capsys):
    odd = _folder(tmp_path / "odd", 3, description=lambda i: f"thing {i}", id=lambda i: i)
    message = "fields are description, id: name one with --text_field or --label_field"
    with pytest.raises(ValueError, match=f"none of 3 .* {message}"):
        _prepare("imagefolder", odd, tmp_path / "o1")
    empty = _folder(tmp_path / "empty", 3, text=lambda i: "  ")
    with pytest.raises(ValueError, match="none has a caption or a class name"):
        _prepare("imagefolder", empty, tmp_path / "o2")
    assert not (tmp_path / "o1").exists() or not list((tmp_path / "o1").glob("*.array_record"))
    capsys.readouterr()
    numbers = _folder(tmp_path / "numbers", 4, label=lambda i: i % 2)
    _prepare("imagefolder", numbers, tmp_path / "o3")
    assert "class names are numbers (0, 1, ...)" in capsys.readouterr().err
    half = _folder(tmp_path / "half", 4, text=lambda i: "a thing" if i % 2 else "")
    _prepare("imagefolder", half, tmp_path / "o4")
    said = capsys.readouterr().err
    assert "2 of 4 examples left out (2 missing_text)" in said and "train-quarantine.jsonl" in said


def test_headers_of_tars_are_read_as_tarfile_reads_them():
    """By the short way for plain files, and by tarfile's own for all others."""
    rng, buffers = random.Random(0), []
    for name in ("a.jpg", "ä.txt", "n" * 100, "d/" * 60 + "x", "l" * 300):
        for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.type = 9 << 20, 17, rng.choice((b"0", b"\0", b"5"))
            try:
                data = info.tobuf(format)
            except ValueError:  # a name that USTAR cannot have
                continue
            buffers += [data[i : i + 512] for i in range(0, len(data), 512)]
    for buffer in list(buffers):
        for at in (*rng.sample(range(512), 20), *range(124, 136), *range(148, 157), 345):
            damaged = bytearray(buffer)
            damaged[at] = rng.choice(b"\0 0789\xff\x80a")
            buffers.append(bytes(damaged))
            damaged[148:156] = b"%06o\0 " % (256 + sum(damaged) - sum(damaged[148:156]))
            buffers.append(bytes(damaged))

    def read(kind, buffer):
        try:
            found = kind.frombuf(buffer, "utf-8", "surrogateescape")
            return found.name, found.size, found.type
        except tarfile.HeaderError as error:
            return type(error)

    same, lenient = 0, 0
    for buffer in [b"", b"\0" * 512, b"x" * 100, *buffers]:
        found, wanted = read(tar_members._Header, buffer), read(tarfile.TarInfo, buffer)
        same += found == wanted
        # A plain file's owner and dates are not looked at.
        lenient += found != wanted and wanted is tarfile.InvalidHeaderError and found[2] == b"0"
    assert same + lenient == len(buffers) + 3 and same > 0.9 * len(buffers)
