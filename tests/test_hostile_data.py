"""Data of strangers: no bad row ends an import, no path leads out, nothing unpacks unbounded."""

import csv
import gzip
import io
import json
import os
import pathlib
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from coca_jax.data import evaluation_data, filters, images, prepare
from coca_jax.data.sources import files, tars, tfds
from coca_jax.data.sources import lists as lines
from coca_jax.data.sources.items import Options


def _image(seed=1):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _prepare(format, input, out, **options):
    """(result, [(reason, detail)]) of an import."""
    result = prepare.prepare(
        format, str(input), str(out), options=Options(**options), processes=1, progress=False
    )
    text = (pathlib.Path(out) / "train-quarantine.jsonl").read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    return result, [(entry["reason"], entry["detail"]) for entry in entries]


def _tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


DEEP = "[" * 20_000 + "]" * 20_000  # newer interpreters read some thousands
ROWS = [  # a line of metadata.jsonl, why it cannot be used
    ('{"file_name": "a.png", "text": "half a pair \\ud83d"}', "bad_utf8"),
    ('{"file_name": "a.png", "label": "half a pair \\ud83d"}', "bad_utf8"),
    ('{"file_name": "half a pair \\ud83d.png", "text": "x"}', "missing_image"),
    ('{"file_name": "a.png", "text": "x", "deep": ' + DEEP + "}", "bad_json"),
    ("null", "bad_json"),
    ("{", "bad_json"),
    ('{"text": "x"}', "missing_image"),
    ('{"file_name": 7, "text": "x"}', "missing_image"),
    ('{"file_name": "a\\u0000.png", "text": "x"}', "missing_image"),
    ('{"file_name": "%s.png", "text": "x"}' % ("a" * 5000), "missing_image"),
    ('{"file_name": "absent.png", "text": "x"}', "missing_image"),
    ('{"file_name": ".", "text": "x"}', "outside_input"),
    ('{"file_name": "sub", "text": "x"}', "missing_image"),
    ('{"file_name": "pipe.png", "text": "x"}', "missing_image"),
    ('{"file_name": "/dev/zero", "text": "x"}', "outside_input"),
    ('{"file_name": "/etc/passwd", "text": "x"}', "outside_input"),
    ('{"file_name": "file:///etc/passwd", "text": "x"}', "outside_input"),
    ('{"file_name": "file:/etc/passwd", "text": "x"}', "outside_input"),
    ('{"file_name": "../private.png", "text": "x"}', "outside_input"),
    ('{"file_name": "sub/../../private.png", "text": "x"}', "outside_input"),
    ('{"file_name": "link.png", "text": "x"}', "outside_input"),
    ('{"file_name": "linked/private.png", "text": "x"}', "outside_input"),
    ('{"file_name": "http://169.254.169.254/latest", "text": "x"}', "outside_input"),
    ('{"file_name": "s3://bucket/key", "text": "x"}', "outside_input"),
    ('{"file_name": "nonsense://x", "text": "x"}', "outside_input"),
    ('{"file_name": "simplecache::http://10.0.0.1/x", "text": "x"}', "outside_input"),
    ('{"file_name": "big.png", "text": "x"}', "image_too_big"),
    ('{"file_name": "a.png", "text": {"en": [[1e999, null], {"x": NaN}]}}', "bad_record"),
    ('{"file_name": "a.png", "text": "fine", "odd": "\\ud83d"}', None),
    ('{"file_name": "%s/a.png", "text": "absolute, but inside"}', None),
    ('{"file_name": "sub/../a.png", "text": "roundabout"}', None),
]


@pytest.fixture
def folder(tmp_path):
    """An input with good, odd and hostile files, and private ones beside it."""
    inner = tmp_path / "input"
    (inner / "sub").mkdir(parents=True)
    (inner / "a.png").write_bytes(_image())
    (inner / "big.png").write_bytes(_image() + bytes(100_000))
    (tmp_path / "private.png").write_bytes(_image(2))
    (inner / "link.png").symlink_to(tmp_path / "private.png")
    (inner / "linked").symlink_to(tmp_path)
    os.mkfifo(inner / "pipe.png")
    return inner


def _lines(folder):
    return [(line.replace("%s/a", f"{folder}/a"), reason) for line, reason in ROWS]


def test_rows_of_jsonl(folder, tmp_path):
    rows = _lines(folder)
    text = (
        "\n".join(line for line, _ in rows).encode() + b'\n{"file_name": "a.png", "text": "\xff"}'
    )
    text += b'\n{"file_name": "a.png", "text": "' + b"x" * lines.MAX_ROW_BYTES + b'"}\n'
    (folder / "metadata.jsonl").write_bytes(text)
    result, found = _prepare("imagefolder", folder, tmp_path / "out", max_image_bytes=50_000)
    wanted = [reason for _, reason in rows if reason] + ["bad_utf8", "bad_json"]
    assert [reason for reason, _ in found] == wanted
    assert (result["read"], result["written"]) == (len(rows) + 2, 3)
    lines_of = (tmp_path / "out/train-quarantine.jsonl").read_text().splitlines()
    places = [one["key"] for one in map(json.loads, lines_of) if one["reason"] == "bad_json"]
    numbers = [i for i, (_, reason) in enumerate(rows, 1) if reason == "bad_json"] + [len(rows) + 2]
    assert places == [f"metadata.jsonl line {number}" for number in numbers]
    outside = [detail for reason, detail in found if reason == "outside_input"]
    assert all("`search index` take --allow_paths" in one or "chains" in one for one in outside)
    # With the flag, that place and no other.
    result, found = _prepare(
        *("imagefolder", folder, tmp_path / "out2"),
        allow_paths=(str(tmp_path), "http://nowhere.invalid/images"),
        max_image_bytes=50_000,
    )
    assert result["written"] == 3 + 4
    assert (
        sum(reason == "outside_input" for reason, _ in found) == wanted.count("outside_input") - 5
    )


def test_rows_of_csv(folder, tmp_path):
    rows = [line for line, _ in _lines(folder) if line.startswith('{"file_name": "')]
    rows = [json.loads(line) for line in rows if "deep" not in line]
    rows = [row for row in rows if row["file_name"].isascii()]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["filepath", "title"])
    writer.writerows([row["file_name"], "a caption"] for row in rows)
    text = out.getvalue().encode()
    text += b'a.png,"' + b"x" * 200_000 + b'"\n'  # above the format's limit of a field
    text += b"a.png,one,cell,too many\n" + b"a.png\n" + b"a.png,caf\xe9\n"
    text += b"a.png," + b"x" * lines.MAX_ROW_BYTES + b"\n" + b'a.png,"two\nlines"\n'
    (folder / "list.csv").write_bytes(text)
    result, found = _prepare("csv", folder, tmp_path / "out", max_image_bytes=50_000)
    reasons = [reason for reason, _ in found]
    assert reasons[-5:] == ["bad_record"] * 2 + ["missing_text", "bad_utf8", "bad_record"]
    assert reasons.count("outside_input") == sum(r == "outside_input" for _, r in ROWS)
    texts = [record.texts[0] for record in filters.open_source(str(tmp_path / "out"))]
    assert texts[-1:] == ["two lines"] and result["read"] == result["written"] + len(found)
    (folder / "list.csv").write_bytes("filepath,label\na.png,café\na.png,cafè\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"{'bad_utf8': 2}.* a text or label has.*iconv -f CP1252"):
        _prepare("csv", folder, tmp_path / "labels")


def test_a_quotation_mark_that_is_never_closed_costs_one_row(tmp_path):
    (tmp_path / "a.png").write_bytes(_image())
    row = "a.png,a later one\n"
    text = 'filepath,title\na.png,5" of a pipe\na.png,"lost\n' + row * 10
    (tmp_path / "list.csv").write_text(text)
    result, found = _prepare("csv", tmp_path, tmp_path / "out")
    assert result["written"] == 11 and [reason for reason, _ in found] == ["bad_record"]
    (tmp_path / "list.csv").write_text(text + row * 10_000)  # above the limit of a field
    rows = list(lines.csv_rows(str(tmp_path / "list.csv")))
    assert len(rows) == 1 + 1 + 10 + 10_000
    assert [number for number, one in enumerate(rows) if isinstance(one, csv.Error)] == [1]


def test_members_of_tars(tmp_path):
    good = [("0.png", _image()), ("0.txt", b"good")]
    bad = [
        ("1.png", _image(), "1.json", DEEP.encode(), "bad_json"),
        ("2.png", _image(), "2.json", b'{"text": "\\ud83d"}', "bad_utf8"),
        ("3.png", _image(), "3.txt", b"x" * (lines.MAX_ROW_BYTES + 1), "text_too_long"),
        ("4.png", bytes(300_000), "4.txt", b"large", "image_too_big"),
        ("../../5.png", b"%!PS", "../../5.txt", b"climbs", "unreadable_image"),
    ]
    members = good + [pair for one in bad for pair in (one[:2], one[2:4])]
    _tar(tmp_path / "a.tar", members)
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes(b"neither a tar nor anything else" * 40)
    _tar(tmp_path / "d.tar", good)
    whole = (tmp_path / "d.tar").read_bytes()
    (tmp_path / "e.tar").write_bytes(whole[: 4 * 512])  # at the end of a member
    (tmp_path / "f.tar").write_bytes(whole + whole)
    _tar(tmp_path / "g.tar", good)
    flipped = bytearray(whole)
    flipped[1024 + 150] ^= 1  # the checksum of the second header
    (tmp_path / "g.tar").write_bytes(flipped)
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 500 << 20
    with gzip.open(tmp_path / "h.tar.gz", "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(8):
            file.write(bytes(1 << 20))
    big = tarfile.TarInfo("x.png")
    big.size = tars.MAX_SKIPPED + (1 << 20)
    with gzip.open(tmp_path / "i.tar.gz", "wb", compresslevel=1) as file:
        file.write(whole[:2048])
        file.write(big.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(1 << 20))
    result, found = _prepare("webdataset", tmp_path, tmp_path / "out", max_image_bytes=100_000)
    assert [reason for reason, _ in found[:5]] == [one[4] for one in bad]
    expected = [
        ("damaged_archive", "empty"),
        ("damaged_archive", "invalid header"),
        ("damaged_archive", "no end mark"),
        ("damaged_archive", "behind the archive"),
        ("missing_text", "neither"),  # its caption is behind the damaged header
        ("damaged_archive", "no header at byte 1024"),
        ("damaged_archive", "headers of more than"),
        ("damaged_archive", "a member of"),
    ]
    assert len(found) == 5 + len(expected), found
    for (reason, detail), (wanted, part) in zip(found[5:], expected):
        assert reason == wanted and part in detail, found
    # The good example of a, d, e, f, i; of g there is no caption.
    assert result["written"] == 5


def test_a_tar_that_makes_tarfile_raise_anything(tmp_path):
    example = [("0.png", _image()), ("0.txt", b"good")]
    _tar(tmp_path / "a.tar", example + [("1.png", _image()), ("1.txt", b"not known to be whole")])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    info = tarfile.TarInfo("1.png")
    info.type, info.size = tarfile.XHDTYPE, 512
    attributes = b"30 GNU.sparse.map=1,2,3,x,\n".ljust(512, b"\0")
    pax = info.tobuf(tarfile.USTAR_FORMAT) + attributes + data[:1024]
    (tmp_path / "a.tar").write_bytes(data[: 8 * 512] + pax + bytes(10240))
    result, found = _prepare("webdataset", tmp_path, tmp_path / "out")
    ((reason, detail),) = found
    # From Python 3.13 on, tarfile calls it no header: then the example before it is whole.
    whole = 2 if detail.startswith("BadEnd: no header at byte 4608") else 1
    assert result["written"] == whole and reason == "damaged_archive"


METADATA = [b"{", b"[]", b"null", b'{"info": 1}', b'{"info": {"features": [1]}}',
            b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}}',
            b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1, 2]}}}}',
            b"\xff", DEEP.encode()]  # fmt: skip


def test_parquet(folder, tmp_path):
    table = pa.table({"image": [_image()], "caption": ["good"], "label": [1]})
    for number, metadata in enumerate(METADATA):
        path = folder / f"{number}.parquet"
        pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), path)
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.int64())])
    pq.write_table(
        pa.table({"image": pa.array([dict(bytes=None, path=3)], struct_type), "caption": ["int"]}),
        folder / "a.parquet",
    )
    names = ["a.png", "../private.png", "/etc/passwd", "s3://b/k", "", None]
    pq.write_table(pa.table({"image": names, "caption": ["path"] * 6}), folder / "b.parquet")
    strings = pa.array([b"caf\xe9", b"good"]).view(pa.string())
    pq.write_table(pa.table({"image": [_image()] * 2, "caption": strings}), folder / "c.parquet")
    (folder / "d.parquet").write_bytes(b"PAR1 but no more than that PAR1")
    pq.write_table(
        pa.table({"image": [_image(i) for i in range(40)], "caption": ["x"] * 40}),
        folder / "e.parquet", row_group_size=20, compression="none",
    )  # fmt: skip
    data = bytearray((folder / "e.parquet").read_bytes())
    data[4:60] = bytes(56)  # the first page's header
    (folder / "e.parquet").write_bytes(data)
    result, found = _prepare("parquet", folder, tmp_path / "out")
    assert [reason for reason, _ in found] == [
        *("missing_image", "outside_input", "outside_input", "outside_input"),
        *("missing_image", "missing_image", "bad_utf8", "damaged_archive", "damaged_archive"),
    ]
    assert result["written"] == len(METADATA) + 1 + 1 + 20


def test_a_value_that_stands_once_and_is_used_often_is_unpacked_once_at_a_time(tmp_path):
    big = bytes(30 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 40), pa.array([big]))
    table = pa.table({"image": column, "caption": ["x"] * 40})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", store_schema=False)
    pq.write_table(pa.table({"image": [_image()], "caption": ["x"]}), tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    before = pa.default_memory_pool().max_memory()
    result, found = _prepare("parquet", tmp_path, tmp_path / "out", max_image_bytes=1 << 20)
    assert result["quarantined"] == {"image_too_big": 40}
    assert pa.default_memory_pool().max_memory() - before < 20 * len(big)


def test_bytes_beside_the_image_are_no_fields(tmp_path):
    (tmp_path / "p").mkdir()
    masks = [dict(bytes=_image(2), path="m.png")]
    row = dict(image=_image(), mask=masks[0], all=masks, raw=_image(3), caption="good", note="ü")
    pq.write_table(
        pa.table({name: [value] for name, value in row.items()}), tmp_path / "p/a.parquet"
    )
    _prepare("parquet", tmp_path / "p", tmp_path / "out")
    (found,) = filters.open_source(str(tmp_path / "out"))
    assert (found.image, found.texts) == (_image(), ("good",))
    more = {"mask": {"path": "m.png"}, "all": [{"path": "m.png"}]}
    assert json.loads(found.extra) == {"note": "ü"} | more


def test_a_folder_of_tensorflow_datasets_imports_no_module(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    features = {"pythonClassName": "evil.Feature", "content": {}}
    inner = {"featuresDict": {"features": {"image": features}}}
    (tmp_path / "features.json").write_text(json.dumps({"pythonClassName": "", **inner}))
    with pytest.raises(ValueError, match=r"features.json: a feature of class 'evil.Feature'"):
        tfds._check_features(str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ValueError, match=r"features.json: a feature of class 'evil.Feature'"):
        tfds.splits(tmp_path.name)  # a folder, though its name is one of a data set, too


def test_classes_by_folder_follow_no_link_out(folder, tmp_path):
    (folder / "sub" / "b.png").write_bytes(_image())
    (folder / "sub" / "caf\udce9.png").write_bytes(_image())  # a name that is not UTF-8
    (folder / "sub" / "c.png").symlink_to(tmp_path / "private.png")
    for name in ("link.png", "linked", "pipe.png", "big.png", "a.png"):
        (folder / name).unlink()
    result, found = _prepare("imagefolder", folder, tmp_path / "out")
    assert result["written"] == 2 and [reason for reason, _ in found] == ["outside_input"]
    keys = {record.key for record in filters.open_source(str(tmp_path / "out"))}
    assert keys == {"sub/b.png", "sub/caf\\udce9.png"}


def test_reading_neither_waits_at_a_pipe_nor_reads_a_device(folder):
    for path in (folder / "pipe.png", "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            images.decode(path)
    with pytest.raises(files.TooLarge):
        files.read_bounded(str(folder / "big.png"), 1000)


@pytest.mark.parametrize("format", ["imagefolder", "csv"])
def test_pairs_by_the_names_of_two_files(format, folder, tmp_path):
    (folder / "sub/b.png").write_bytes(_image(3))
    good = [("a.png", "sub/b.png", "first"), ("a.png", "sub/b.png", "second")]
    bad = [("a.png", "", "no second"), ("", "a.png", "no first"), ("a.png", "absent.png", "x"),
           ("a.png", "/etc/passwd", "outside"), ("../private.png", "a.png", "outside"),
           ("a.png", "pipe.png", "x")]  # fmt: skip
    rows = [dict(left=a, right=b, text=text, label="true") for a, b, text in good + bad]
    if format == "csv":
        with open(folder / "list.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, found = _prepare(format, folder, tmp_path / "out", image_field="left,right")
    assert result["written"] == 2
    assert [reason for reason, _ in found] == [
        "missing_image", "missing_image", "missing_image", "outside_input", "outside_input",
        "missing_image",
    ]  # fmt: skip
    pairs = list(filters.open_source(str(tmp_path / "out")))
    assert [(pair.image, pair.second) for pair in pairs] == [(_image(), _image(3))] * 2
    assert [pair.texts for pair in pairs] == [("first",), ("second",)]
    assert len({pair.key for pair in pairs}) == 2
    if format == "imagefolder":  # evaluated on as it lies there, where all rows are good
        rows = [dict(left="a.png", right="sub/b.png", text="an  a", label=[" true ", "true"])]
        (folder / "metadata.jsonl").write_text(json.dumps(rows[0]) + "\n")
        plain = evaluation_data.open_source(
            dict(path=str(folder), image_field="left,right"), "test"
        )
        assert [(pair.image, pair.second) for pair in plain] == [(_image(), _image(3))]
        assert [(pair.texts, pair.labels) for pair in plain] == [(("an a",), ("true",))]
