"""Data read in place, format by format: the records of a copy, over damages and lists."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_place_cases import both, make, picture, write_tar

from coca_jax.data import evaluation_data, filters, source_index
from coca_jax.data.sources import (
    array_record,
    formats,
    image_folder,
    lists,
    manifest,
    parquet,
    references,
)
from coca_jax.data.sources.items import Options, Unit, resuming_reads
from coca_jax.training import data_flag


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


def test_parquet_names_pictures_as_lists_do(tmp_path):
    """`metadata.parquet` of Hugging Face's image folders."""
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    names = [f"{number}.jpg" for number in range(3)]
    pq.write_table(pa.table(dict(file_name=names, text=list("abc"))), tmp_path / "metadata.parquet")
    copy, index = both("parquet", tmp_path, tmp_path / "out")
    assert list(copy) == list(index) and [[*record.texts] for record in copy] == [
        ["a"],
        ["b"],
        ["c"],
    ]


def test_parquet_with_images_in_one_column_or_another(tmp_path):
    pictures = [picture(n) for n in range(12)]
    columns = dict(image=[None] * 12, jpg=[None] * 12, png=[b"none of these"] * 12)
    for n, data in enumerate(pictures):
        columns["jpg" if n % 3 else "image"][n] = data
    file = tmp_path / "a.parquet"
    small = dict(use_dictionary=False, data_page_size=1, write_batch_size=2, row_group_size=8)
    pq.write_table(pa.table(columns | dict(text=["a"] * 12)), file, **small)
    copy, index = both("parquet", file, tmp_path / "out")
    assert [record.image for record in index] == pictures and list(copy) == list(index)


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
        told = array_record.read_manifest(str(folder / "out/index"))["splits"]["train"]
        reasons |= set(told["quarantined"])
    assert {"damaged_archive", "missing_text"} <= reasons


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


@pytest.mark.parametrize("name", ["a::b.jpg", os.fsdecode(b"caf\xe9.jpg"), "'\\\n.jpg"])
def test_any_name_of_a_local_file_is_read_in_place(name, tmp_path):
    (tmp_path / "a/cat").mkdir(parents=True)
    (tmp_path / "a/cat" / name).write_bytes(picture(0))
    copy, index = both("imagefolder", tmp_path / "a", tmp_path)
    assert index.read([0]) == copy.read([0]) and copy.read([0])[0].image == picture(0)


def test_compressed_archives_say_so_and_are_copied(tmp_path, capsys):
    write_tar(tmp_path / "data/0.tar.gz", 0, 30, "w:gz")
    with pytest.raises(ValueError, match="0.tar.gz is compressed .* `coca-jax prepare` without"):
        make("webdataset", tmp_path / "data", tmp_path / "out", in_place=True)
    shutil.move(tmp_path / "data/0.tar.gz", tmp_path / "data/0.tar")
    with pytest.raises(ValueError, match="0.tar is compressed"):
        make("webdataset", tmp_path / "data", tmp_path / "out", in_place=True)
    with pytest.raises(ValueError, match="--max_side=9 encodes"):
        make("webdataset", tmp_path / "data", tmp_path / "out", in_place=True, max_side=9)
    path = data_flag.prepared(str(tmp_path / "data"), str(tmp_path / "run"))
    assert "importing it into" in capsys.readouterr().err
    assert "root" not in array_record.read_manifest(path)["splits"]["train"]


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


def test_lists_of_json_lines(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    noise = lambda n: random.Random(n).randbytes(600).hex()  # noqa: E731
    for n in range(5):
        (folder / f"{n}.jpg").write_bytes(picture(n))
    rows = [
        json.dumps(dict(image=f"{n}.jpg", caption=f"no. {n}", noise=noise(n))) for n in range(5)
    ]
    whole = ("\n".join([*rows[:3], "{", "", *rows[3:]]) + "\n").encode()
    found = {}
    for name, data in (
        ("list.jsonl", whole),
        ("metadata.jsonl", whole),
    ):
        (folder / name).write_bytes(data)
        format = formats.guess(str(folder))
        assert format == ("imagefolder" if name.startswith("metadata") else "jsonl")
        copy, index = both(format, folder, tmp_path / name)
        assert list(copy) == list(index)
        found[name] = [(record.key, record.texts) for record in copy]
        told = array_record.read_manifest(str(tmp_path / name / "copy"))["splits"]["train"]
        assert set(told["quarantined"]) == {"bad_json"}
        (folder / name).unlink()
    good = [(f"{n}.jpg", (f"no. {n}",)) for n in range(5)]
    assert all(records == good for records in found.values())
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert formats.guess(str(folder)) == "imagefolder"


@pytest.mark.parametrize(("data", "input"), [("within", ""), ("beside", "/*.tar")])
def test_an_index_in_a_bucket_within_its_data_opens(data, input, tmp_path):
    write_tar(tmp_path / "0.tar", 0, 3)
    url = f"memory://{data}_index"
    fsspec.filesystem("memory").pipe_file(f"/{data}_index/0.tar", (tmp_path / "0.tar").read_bytes())
    make("webdataset", url + input, f"{url}/of/it", in_place=True)
    found = filters.open_source(f"{url}/of/it")
    assert [record.image for record in found] == [picture(n) for n in range(3)]


def test_what_was_prepared_inside_the_input_is_no_part_of_it(tmp_path):
    (tmp_path / "train.jpg").write_bytes(picture(0))
    rows = [dict(file_name="train.jpg", text="a"), dict(file_name="gone.jpg", text="b")]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("first", "second"):
        made = make("jsonl", tmp_path, tmp_path / name, in_place=False)
        assert (made["read"], made["written"], made["quarantined"]) == (2, 1, {"missing_image": 1})
        assert (tmp_path / name / "train-quarantine.jsonl").exists()
    assert formats.guess(str(tmp_path)) == "jsonl"
    # A list of that name is read as any other.
    shutil.copy(tmp_path / "list.jsonl", tmp_path / "of-quarantine.jsonl")
    assert make("jsonl", tmp_path, tmp_path / "third", in_place=False)["read"] == 4


TABLE = (
    "\ufefffile_name,text\n"
    + "".join(f'{n}.jpg,"no. {n}\nof several lines"\r\n{n}.jpg,one,too,many\n' for n in range(6))
    + '7.jpg,"never closed\n8.jpg,a\rb,x\n9.jpg,last\n'
)


def test_each_unit_of_a_table_starts_where_its_rows_do(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "ROWS_PER_UNIT", 3)
    path = tmp_path / "metadata.csv"
    path.write_text(TABLE, newline="")
    units = lists.csv_units(str(path), "")

    def items(unit):
        found = [one.item for one in image_folder.located(unit, Options())]
        return [(one.key, tuple(one.texts), one.problem) for one in found]

    whole = items(dataclasses.replace(units[0], stop=99))
    assert [item for unit in units for item in items(unit)] == whole
    assert sum(not problem for _, _, problem in whole) == 9 and whole[-1][0] == "9.jpg"
    assert [unit.start for unit in units[:5]] == [0, 3, 6, 9, 12]
    assert sum(unit.rows for unit in units) == len(whole)
    # Of an import that an earlier version has begun, none says where it starts.
    assert items(units[2]) == items(dataclasses.replace(units[2], offset=0))
    data = path.read_bytes()
    head = data.index(b"\n") + 1
    path.write_bytes(data[:head] + b'"' * (units[3].offset - head) + data[units[3].offset :])
    assert all(items(unit) == whole[unit.start : unit.stop] for unit in units[3:])


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "metadata.csv"])
def test_an_image_that_was_corrected_beside_a_list_is_a_change(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(picture(n))
    names = [*(f"{n}.jpg" for n in range(3)), "gone.jpg"]
    lines = [json.dumps(dict(file_name=one, text="x")) for one in names]
    if name.endswith(".csv"):
        lines = ["file_name,text", *(f"{one},x" for one in names)]
    (folder / name).write_text("\n".join(lines) + "\n")
    path = str(folder if name == "metadata.csv" else folder / name)
    format, out = formats.guess(path), str(tmp_path / "out")

    def now():
        return source_index.state_of_input(format, path, out, Options())

    def seen():
        return [record.image for record in evaluation_data.open_source(entry, "test")]

    entry = dict(path=path, kind="caption")
    if name != "metadata.csv":  # a folder is not indexed, and refuses a row whose image is gone
        assert seen() == [picture(n) for n in range(3)]
    first = now()
    make(format, path, out, in_place=True)
    about = (folder / "1.jpg").stat()
    os.utime(folder / "1.jpg", (1, 1))
    assert manifest.have_changed(first, now(), times=True)
    assert not manifest.have_changed(first, now())
    other = picture(7).ljust(about.st_size + 10, b"\0")
    (folder / "1.jpg").write_bytes(other)
    assert manifest.have_changed(first, now())
    assert not manifest.have_changed(first[:65], now(), times=True)  # as it was kept once
    if name != "metadata.csv":
        assert seen() == [picture(0), other, picture(2)]
    (folder / "1.jpg").write_bytes(picture(1))
    assert not manifest.have_changed(first, now())
    (folder / "gone.jpg").write_bytes(picture(4))
    assert manifest.have_changed(first, now())


def test_each_image_of_a_long_list_is_asked_whether_it_changed(tmp_path):
    names = [f"{n}.jpg" for n in range(8_200)]  # more than are asked for at a time
    (tmp_path / names[0]).write_bytes(b"x")
    for name in names[1:]:
        os.link(tmp_path / names[0], tmp_path / name)
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(dict(file_name=one, text="x")) + "\n" for one in names))

    def now():
        return source_index.state_of_input("jsonl", str(path), str(tmp_path / "out"), Options())

    first, own = now(), now().split("-")[:2]
    size = (tmp_path / names[0]).stat().st_size
    told = "".join(f"{name!r} {size}\n" for name in names).encode()
    assert first.split("-")[2] == hashlib.blake2b(told, digest_size=16).hexdigest()
    for name in (names[0], names[511], names[512], names[8_191], names[8_192], names[-1]):
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(b"xy")
        after = now()
        assert after != first and after.split("-")[:2] == own
        first = after


def test_of_pictures_with_texts_beside_them_no_plan_of_classes_is_made(tmp_path, monkeypatch):
    """It goes through all of them, and evaluation asks a dozen times what the data are."""
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
        (tmp_path / f"{number}.txt").write_text(f"no. {number}")
    monkeypatch.setattr(image_folder, "plan", lambda *_: pytest.fail("made a plan"))
    entry = dict(path=str(tmp_path), kind="caption")
    assert evaluation_data.splits(entry) == [] and evaluation_data.choose_split(entry) == "test"
    assert evaluation_data.counts(entry) == dict(caption=3, label=0)
    assert len(evaluation_data.open_source(entry, "test")) == 3


def test_parquet_is_gone_on_with_where_the_unit_before_ended(tmp_path, monkeypatch):
    """Of a row group, however large, pyarrow reads all for its first row."""
    file, opened = tmp_path / "a.parquet", []
    table = pa.table(dict(image=[picture(n) for n in range(40)], text=[str(n) for n in range(40)]))
    pq.write_table(table, file, row_group_size=30)
    really_open = parquet._open
    monkeypatch.setattr(parquet, "_open", lambda handle: opened.append(1) or really_open(handle))

    def texts(start, stop):
        unit = Unit(str(file), start, stop, stop - start)
        return [int(item.texts[0]) for item in parquet.read(unit, Options(check=False))]

    with resuming_reads():
        for start, stop in ((0, 7), (7, 19), (23, 33), (33, 36)):
            assert texts(start, stop) == [*range(start, stop)]
        assert len(opened) == 1
        assert texts(2, 5) == [2, 3, 4]  # from the beginning of the group
        pq.write_table(table.slice(0, 39), file, row_group_size=9)
        assert texts(5, 40) == [*range(5, 39)] and len(opened) == 2
    assert texts(0, 3) == texts(0, 3) and len(opened) == 4
