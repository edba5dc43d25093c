"""Data read in place: the records and batches of a copy, over damages, processes and buckets."""

import dataclasses
import gzip
import io
import json
import random
import shutil
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import data_config, equal, take
from PIL import Image

from coca_jax.config import typed
from coca_jax.data import files, formats, prepared, range_cache, references, run_vocabulary, sources
from coca_jax.data.loaders import open_stream
from coca_jax.data.mixture import Mixture
from coca_jax.importers import indexes, own_data, shards, unprepared
from coca_jax.importers.items import Options
from coca_jax.importers.splits import prepare, prepare_with_holdout
from coca_jax.searching import pictures

KEPT = ("count", "with_text", "with_label", "read", "quarantined", "filtered")


def picture(seed, side=20):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side, side)).save(out, "JPEG")
    return out.getvalue()


def write_tar(path, first, count, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for n in range(first, first + count):
            told = json.dumps(dict(url=f"http://x/{n}", width=20)).encode()
            for suffix, data in (("jpg", picture(n)), ("txt", f"no. {n}".encode()), ("json", told)):
                info = tarfile.TarInfo(f"{n:06d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def make(format, input, out, *, in_place, **options):
    options = Options(in_place=in_place, **options)
    return prepare(format, str(input), str(out), options=options, processes=1, progress=False)


def both(format, input, out, split="train", **options):
    """The sources of a copy and of an index, whose accounts must agree."""
    for name in ("copy", "index"):
        make(format, input, out / name, in_place=name == "index", **options)
    told = [prepared.read_manifest(str(out / name)) for name in ("copy", "index")]
    assert [told[0]["splits"][split][key] for key in KEPT] == [
        told[1]["splits"][split][key] for key in KEPT
    ]
    assert told[0]["class_names"] == told[1]["class_names"]
    left_out = [
        (out / name / f"{split}-quarantine.jsonl").read_text() for name in ("copy", "index")
    ]
    assert left_out[0] == left_out[1]
    return [sources.open_source(str(out / name), split) for name in ("copy", "index")]


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three tars of 14 pictures with captions."""
    root = tmp_path_factory.mktemp("tars")
    for number in range(3):
        write_tar(root / f"{number:03d}.tar", number * 14, 14)
    return root


@pytest.fixture(scope="module")
def made(tars, tmp_path_factory):
    """A copy and an index of them, with splits train and test."""
    out = tmp_path_factory.mktemp("made")
    for name in ("copy", "index"):
        options = Options(in_place=name == "index")
        where = ("webdataset", str(tars), str(out / name))
        prepare_with_holdout(*where, 0.2, options=options, processes=1, progress=False)
    return out


def test_an_index_has_the_records_of_a_copy(made):
    for split in ("train", "test"):
        copy, index = (sources.open_source(str(made / name), split) for name in ("copy", "index"))
        assert len(copy) > 4 and list(copy) == list(index)
        wanted = [3, 0, 3]
        assert index.read(wanted) == copy.read(wanted)
        texts = index.read_texts(wanted)
        assert [r.texts for r in texts] == [r.texts for r in copy.read(wanted)]
        assert not any(r.image for r in texts)
    assert not (made / "index" / "features.json").exists()  # TFDS would show references as images


def test_relative_names_and_links(tars, tmp_path, monkeypatch):
    monkeypatch.chdir(tars)
    (tmp_path / "link").symlink_to(tars)
    for number, path in enumerate(("000.tar", ".", f"{tmp_path}/link", f"file://{tars}/000.tar")):
        out = str(tmp_path / str(number))
        make("webdataset", path, out, in_place=True)
        monkeypatch.chdir(tmp_path)
        assert sources.open_source(out).read([5])[0].image == picture(5)
        records = prepared.open_split(out, "train")
        assert records.read([0])[0].image == picture(0)
        monkeypatch.chdir(tars)


def test_search_indexes_the_pictures_of_all_splits(made, tars):
    found = [one for group in pictures.groups(str(made / "index"), ()) for one in group.read()]
    there = [one for group in pictures.groups(str(tars), ()) for one in group.read()]
    assert len(found) == 42 and {one.image for one in found} == {one.image for one in there}
    assert len({one.name for one in found}) == 42


def test_batches_are_those_of_a_copy_for_any_number_of_processes_and_after_a_resume(made, tmp_path):
    config = typed(data_config(dict(path=str(made / "copy"))))
    vocabulary = run_vocabulary.load_or_train(config, str(tmp_path))
    whole = take(open_stream(config, vocabulary), 12)  # into the third pass
    config = typed(data_config(dict(path=str(made / "index"))))
    assert all(map(equal, whole, take(open_stream(config, vocabulary), 12)))
    assert all(map(equal, whole[7:], take(open_stream(config, vocabulary, start_step=7), 5)))
    for count in (2, 4):
        parts = [
            take(open_stream(config, vocabulary, process_index=p, process_count=count), 2)
            for p in range(count)
        ]
        for step in range(2):
            joined = {
                key: np.concatenate([part[step][key] for part in parts])
                for key in ("image", "index", "tokens", "source")
            }
            assert equal(joined, whole[step])


def test_image_files_that_lists_name(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for n in range(9):
        (folder / f"{n}.jpg").write_bytes(picture(n))
        rows.append(dict(file_name=f"{n}.jpg", second=f"{(n + 1) % 9}.jpg", text=f"no. {n}"))
    lines = [json.dumps(row) for row in rows]
    lines += [json.dumps(dict(file_name="gone.jpg", text="x")), "{"]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    copy, index = both("imagefolder", folder, tmp_path / "a")
    assert len(copy) == 9 and list(copy) == list(index)
    pairs = both("imagefolder", folder, tmp_path / "b", image_field="file_name,second")
    assert list(pairs[0]) == list(pairs[1]) and pairs[1].read([2])[0].second == picture(3)
    (folder / "list.csv").write_text("filepath,title\n" + "".join(f"{n}.jpg,t{n}\n" for n in "012"))
    copy, index = both("csv", folder / "list.csv", tmp_path / "c")
    assert len(copy) == 3 and list(copy) == list(index)


@pytest.mark.parametrize(
    ("codec", "version", "encoding"),
    [
        *(("none", "1.0", "PLAIN"), ("snappy", "1.0", "PLAIN"), ("zstd", "2.0", "dictionary")),
        *(("lz4", "1.0", "dictionary"), ("gzip", "2.0", "DELTA_LENGTH_BYTE_ARRAY")),
    ],
)
def test_parquet_with_bytes_in_pages(codec, version, encoding, tmp_path):
    pictures = [picture(n) for n in range(30)] + [None] + [picture(3)] * 2
    column = [dict(bytes=data, path="x.jpg") for data in pictures]
    table = pa.table(dict(image=column, other=pictures[::-1], text=["a", "b", "c"] * 11))
    chosen = dict(use_dictionary=encoding == "dictionary")
    if encoding != "dictionary":
        chosen["column_encoding"] = {name: encoding for name in ("image.bytes", "other")}
    pages = dict(data_page_size=2000, dictionary_pagesize_limit=4000, write_batch_size=4)
    file = tmp_path / "a.parquet"
    pq.write_table(
        *(table, file), row_group_size=12, compression=codec, data_page_version=version,
        **chosen, **pages,
    )  # fmt: skip
    copy, index = both("parquet", file, tmp_path / "out")
    assert len(copy) == 32 and list(copy) == list(index)
    order = random.Random(0).sample(range(32), 32)
    assert index.read(order) == copy.read(order)
    pairs = both("parquet", file, tmp_path / "pairs", image_field="image,other")
    assert list(pairs[0]) == list(pairs[1]) and pairs[1].read([0])[0].second == picture(3)


def test_damaged_tars_are_handled_as_a_copy_handles_them(tmp_path):
    rng = random.Random(0)
    write_tar(tmp_path / "whole.tar", 0, 5)
    whole = (tmp_path / "whole.tar").read_bytes()
    reasons: set[str] = set()
    for number in range(30):
        data = bytearray(whole)
        at = rng.randrange(len(data) - 600)
        how = number % 3
        if how == 0:
            data[at : at + 40] = rng.randbytes(40)
        elif how == 1:
            del data[at : at + rng.choice((1, 512, 2000))]
        else:
            del data[at:]
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "damaged.tar").write_bytes(data)
        write_tar(folder / "good.tar", 50, 2)
        copy, index = both("webdataset", folder, folder / "out")
        assert len(copy) >= 2 and list(copy) == list(index), number
        told = prepared.read_manifest(str(folder / "out/index"))["splits"]["train"]
        reasons |= set(told["quarantined"])
    assert {"damaged_archive", "missing_text"} <= reasons


def test_what_was_changed_since_is_named_and_another_stands_in(tars, tmp_path):
    data = shutil.copytree(tars, tmp_path / "data")
    make("webdataset", data, data / "index", in_place=True)
    shutil.move(data, tmp_path / "moved")  # an index in the folder of its data moves with them
    data = tmp_path / "moved"
    source = sources.open_source(str(data / "index"))
    record = source.read([0])[0]
    assert record.image == picture(0)
    tar = data / "000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole.replace(record.image[-40:-20], bytes(20)))
    with pytest.raises(ValueError, match="000.tar: the bytes from 512 on are not those that were"):
        sources.open_source(str(data / "index")).read([0])
    config = typed(data_config(dict(path=str(data / "index")), max_bad_fraction=0.5, batch=42))
    vocabulary = run_vocabulary.load_or_train(config, str(tmp_path))
    batch = next(open_stream(config, vocabulary))
    assert 0 not in batch["index"] and len(set(batch["index"])) == 41
    tar.write_bytes(whole + bytes(512))
    with pytest.raises(ValueError, match="index the data again"):
        sources.open_source(str(data / "index")).read([1])


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{}", b"[1]", b'["a",1,2,3,4,5,6]', b'["a",10,5,6,0]', b'["../a",9,0,9,0]'),
        *(
            b'["a/../../b",9,0,9,0]',
            b'["s3://a::b",9,0,9,0]',
            b'["a",1e9,0,9,0]',
            b"[" * 9999,
            b'["http://x/y",9,0,9,0]',
        ),
        b'["a",99,0,9,0,["snappy",0,5,3,9]]',
    ],
)
def test_references_that_cannot_be(data):
    with pytest.raises(ValueError, match="reference"):
        references.load(data, "/data")


def test_compressed_archives_say_so_and_are_copied(tmp_path, capsys):
    write_tar(tmp_path / "data/0.tar.gz", 0, 30, "w:gz")
    with pytest.raises(ValueError, match="0.tar.gz is compressed .* `coca-jax prepare` without"):
        make("webdataset", tmp_path / "data", tmp_path / "out", in_place=True)
    shutil.move(tmp_path / "data/0.tar.gz", tmp_path / "data/0.tar")
    with pytest.raises(ValueError, match="0.tar is compressed"):
        make("webdataset", tmp_path / "data", tmp_path / "out", in_place=True)
    with pytest.raises(ValueError, match="--max_side=9 encodes"):
        make("webdataset", tmp_path / "data", tmp_path / "out", in_place=True, max_side=9)
    path = own_data.prepared(str(tmp_path / "data"), str(tmp_path / "run"))
    assert "importing it into" in capsys.readouterr().err
    assert "root" not in prepared.read_manifest(path)["splits"]["train"]


def test_data_that_a_flag_names_are_read_in_place(tmp_path, capsys):
    write_tar(tmp_path / "data/mine.tar", 0, 40)
    named, workdir = [str(tmp_path / "data/mine.tar")], str(tmp_path / "run")
    config = own_data.apply(typed(data_config(dict(path="x"))), named, workdir)
    path = config.data.sources[0].path
    told = prepared.read_manifest(path)["splits"]
    assert told["train"]["count"] + told["test"]["count"] == 40 and told["test"]["count"] > 0
    assert told["train"]["root"] == told["test"]["root"] == str(tmp_path / "data")
    assert f"read in place, as webdataset: making an index of it in {path}" in (
        capsys.readouterr().err
    )
    assert own_data.apply(config, named, workdir).data.sources == config.data.sources
    assert "index" not in capsys.readouterr().err  # which is there


def test_shards_by_braces(tars, tmp_path):
    assert files.find(f"{tars}/{{000..001}}.tar", ()) == [f"{tars}/000.tar", f"{tars}/001.tar"]
    assert files.find(f"{tars}/00{{0,2}}.tar", ()) == [f"{tars}/000.tar", f"{tars}/002.tar"]
    with pytest.raises(FileNotFoundError, match="2 of 5 files are missing, the first .*003.tar"):
        files.find(f"{tars}/{{000..004}}.tar", ())
    with pytest.raises(ValueError, match="more than a million"):
        files.find(f"{tars}/{{0..9999999}}.tar", ())
    pattern = f"{tars}/{{000..001}}.tar"
    assert own_data.folder_names([pattern, f"{tars}/t-{{0,1}}.tar"]) == ["data", "t-"]
    assert make("webdataset", pattern, tmp_path, in_place=True)["written"] == 28
    assert prepared.read_manifest(str(tmp_path))["splits"]["train"]["root"] == str(tars)


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_bucket(kind, tars, made, tmp_path, monkeypatch, request):
    bucket = request.getfixturevalue(kind)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem(kind)
    for tar in sorted(tars.glob("*.tar")):
        system.pipe_file(f"bucket/in_place/{tar.name}", tar.read_bytes())
    url, out = f"{bucket}/in_place/{{000..002}}.tar", f"{bucket}/indexes/tars"
    result = prepare_with_holdout(
        *("webdataset", url, out, 0.2), options=Options(in_place=True), processes=1, progress=False
    )
    copy, index = sources.open_source(str(made / "copy")), sources.open_source(out)
    assert result[0]["written"] == len(copy)
    asked: list[int] = []
    system = files.filesystem(url)[0]
    cat_ranges = system.cat_ranges

    def counted(paths, starts, ends, **keywords):
        asked.append(len(paths))
        if len(asked) <= 2:
            return [ConnectionError("no answer")] * len(paths)
        return cat_ranges(paths, starts, ends, **keywords)

    monkeypatch.setattr(system, "cat_ranges", counted)
    monkeypatch.setattr(range_cache, "PAUSES", (0.01,) * 3)
    everything = list(range(len(copy)))
    assert index.read(everything) == copy.read(everything)
    assert asked == [3, 3, 3]  # a request a tar, after two tries that failed
    assert sources.open_source(out).read(everything) == copy.read(everything)
    assert len(asked) == 3  # all was kept
    monkeypatch.setenv("COCA_JAX_SHARD_CACHE_GIB", str(1 / 1024))
    kept = list((tmp_path / "cache/coca_jax/shards").iterdir())
    assert sum(file.stat().st_blocks * 512 for file in kept) < 3 << 20
    assert Mixture(typed(data_config(dict(path=out)))).sizes == [len(copy)]
    system.rm("bucket/in_place/000.tar")
    for file in kept:
        file.unlink()
    with pytest.raises(OSError, match="in_place/000.tar cannot be read: FileNotFoundError"):
        sources.open_source(out).read([0])


def test_data_that_are_not_prepared_are_sources_and_evaluated_on(tars, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "data/0.tar", 0, 6)
    entry = dict(path=str(tmp_path / "data"), kind="caption")
    assert unprepared.choose_split(entry) == "test" and unprepared.splits(entry) == []
    assert unprepared.counts(entry) == dict(caption=6, label=0)
    source = unprepared.open_source(entry, "test")
    assert [record.image for record in source] == [picture(n) for n in range(6)]
    write_tar(tmp_path / "data/0.tar", 6, 7)  # other files, another index
    assert len(unprepared.open_source(entry, "test")) == 7
    config = typed(data_config(entry, dict(path=f"{tars}/000.tar", split="train")))
    found = indexes.of_sources(config, str(tmp_path / "run"))
    assert Mixture(found).sizes == [7, 14]
    assert [entry.path for entry in found.data.sources] == [
        str(tmp_path / "run/data/data"),
        str(tmp_path / "run/data/000"),
    ]
    assert indexes.of_sources(found, str(tmp_path / "run")) is found
    assert indexes.of_sources(config, str(tmp_path / "run")) == found
    (tmp_path / "data/1.tar.gz").touch()
    with pytest.raises(ValueError, match="1.tar.gz is compressed .* `coca-jax prepare` without"):
        unprepared.open_source(entry, "test")


def test_texts_in_files_beside_images_are_those_of_a_tar(tmp_path):
    """img2dataset's output `files` beside its output `webdataset`, with its lists in parquet."""
    told = dict(url="http://x/1", width=20, caption="no.")
    for shard in range(2):
        write_tar(tmp_path / f"tars/{shard:05d}.tar", shard * 7, 7)
        folder = tmp_path / f"files/{shard:05d}"
        with tarfile.open(tmp_path / f"tars/{shard:05d}.tar") as archive:
            archive.extractall(folder, filter="data")
        pq.write_table(pa.table(dict(key=["1"], **{k: [v] for k, v in told.items()})),
                       tmp_path / f"files/{shard:05d}.parquet")  # fmt: skip
    assert formats.guess(str(tmp_path / "files")) == "sidecars"
    tar = both("webdataset", tmp_path / "tars", tmp_path / "a")[0]
    copy, index = both("sidecars", tmp_path / "files", tmp_path / "b")
    assert list(copy) == list(index) and [r.key for r in copy][:2] == [
        "00000/000000",
        "00000/000001",
    ]
    assert [r._replace(key="") for r in copy] == [r._replace(key="") for r in tar]
    (tmp_path / "files/00000/000003.txt").unlink()
    (tmp_path / "files/00000/000003.txt").symlink_to("/etc/passwd")
    (tmp_path / "files/00000/000004.json").write_text("{")
    (tmp_path / "files/00001/000010.txt").write_bytes(b"\xff")
    for name in ("00000/000005.txt", "00000/000005.json"):
        (tmp_path / "files" / name).unlink()
    both("sidecars", tmp_path / "files", tmp_path / "c")
    lines = (tmp_path / "c/index/train-quarantine.jsonl").read_text().splitlines()
    assert {entry["key"]: entry["reason"] for entry in map(json.loads, lines)} == {
        "00000/000003": "outside_input",
        "00000/000004": "bad_json",
        "00000/000005": "missing_text",
        "00001/000010": "bad_utf8",
    }


def test_lists_of_json_lines_packed_or_not(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    noise = lambda n: random.Random(n).randbytes(600).hex()  # noqa: E731
    for n in range(5):
        (folder / f"{n}.jpg").write_bytes(picture(n))
    rows = [
        json.dumps(dict(image=f"{n}.jpg", caption=f"no. {n}", noise=noise(n))) for n in range(5)
    ]
    whole = ("\n".join([*rows[:3], "{", "", *rows[3:]]) + "\n").encode()
    frames = [pa.compress(part, "zstd", asbytes=True) for part in (whole[:60], whole[60:])]
    gzipped = gzip.compress(whole)
    found = {}
    for name, data in (
        ("list.jsonl", whole),
        ("list.jsonl.zst", b"".join(frames)),
        ("list.jsonl.gz", gzipped),
        ("metadata.jsonl.zst", frames[0] + frames[1]),
        ("cut.jsonl.gz", gzipped[:-12]),
    ):
        (folder / name).write_bytes(data)
        format = formats.guess(str(folder))
        assert format == ("imagefolder" if name.startswith("metadata") else "jsonl")
        copy, index = both(format, folder, tmp_path / name)
        assert list(copy) == list(index)
        found[name] = [(record.key, record.texts) for record in copy]
        told = prepared.read_manifest(str(tmp_path / name / "copy"))["splits"]["train"]
        assert set(told["quarantined"]) - {"bad_json"} == (
            {"damaged_archive"} if name.startswith("cut") else set()
        )
        (folder / name).unlink()
    good = [(f"{n}.jpg", (f"no. {n}",)) for n in range(5)]
    cut = found.pop("cut.jsonl.gz")
    assert all(records == good for records in found.values()) and cut == good[:4]
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert formats.guess(str(folder)) == "imagefolder"


def test_a_holdout_goes_through_the_data_once(tars, tmp_path, monkeypatch):
    def tree(folder):
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    options = Options(in_place=True, holdout=0.2)
    where = ("webdataset", str(tars))
    keywords = dict(processes=1, progress=False)
    held = dataclasses.replace(options, held_out=True)
    prepare(*where, str(tmp_path / "a"), split="test", options=held, **keywords)
    prepare(*where, str(tmp_path / "a"), options=options, **keywords)
    read: list[int] = []
    read_items = shards.read_items

    def dies_at_the_third(job):
        read.append(job.number)
        if len(read) == 3:
            raise KeyboardInterrupt
        return read_items(job)

    monkeypatch.setattr(shards, "read_items", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_with_holdout(*where, str(tmp_path / "b"), 0.2, options=options, **keywords)
    prepare_with_holdout(*where, str(tmp_path / "b"), 0.2, options=options, **keywords)
    assert read == [0, 1, 2, 2] and tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_view_of_an_index_reads_no_image(tars, tmp_path):
    data = shutil.copytree(tars, tmp_path / "data")
    make("webdataset", data, tmp_path / "index", in_place=True)
    (data / "000.tar").unlink()
    entry = dict(path=str(tmp_path / "index"), where={"url": ["http://x/3", "http://x/20"]})
    source = sources.open_source(entry | dict(text_field="width"))
    assert [record.texts for record in source.read_texts(range(len(source)))] == [("20",)] * 2
    with pytest.raises(FileNotFoundError, match="000.tar"):
        source.read([0])
    shutil.move(data, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="an index of what lies in .*/data, which is not"):
        sources.open_source(entry)
    manifest = tmp_path / "index/manifest.json"
    manifest.write_text(manifest.read_text().replace(str(data), "http://169.254.169.254/latest"))
    with pytest.raises(ValueError, match="neither here nor in a bucket"):
        sources.open_source(entry)
    # A run in a bucket goes on on any machine, and so has a copy.
    write_tar(tmp_path / "few/0.tar", 0, 40)
    out = own_data.prepared(str(tmp_path / "few"), "memory://run/data/few")
    assert "root" not in prepared.read_manifest(out)["splits"]["train"]
