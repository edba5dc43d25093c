"""Data sets of strangers, each file imported as `prepare` imports it, without writing shards."""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import random
import struct
import tarfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import mutate
import pyarrow as pa
import pyarrow.parquet as pq

from coca_jax.data import prepare
from coca_jax.data.sources import in_place, references, registry
from coca_jax.data.sources.items import Item, Options
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.references import Page, Span
from kinds import Kind, encoded

OPTIONS = Options(max_image_bytes=1 << 20)


FOLDERS = ("imagefolder", "sidecars")


def in_place_again(record: Record, item: Item, root: str) -> Record:
    """The record with the image that its reference leads to, which must be that of the item."""
    found = in_place.InPlace(lambda indices: [record], root)([0])[0]
    if found.image != item.image:
        raise AssertionError("a reference leads to other bytes")
    return found


def importer(format: str, name: str, **options: Any) -> Callable[[pathlib.Path], str]:
    """Reads a file `name` of a format; tells how many were kept and why the others were not."""

    def run(path: pathlib.Path) -> str:
        file = path.with_name(name)
        file.write_bytes(path.read_bytes())
        given = Options(**{"max_image_bytes": 1 << 20, **options})
        units = registry.find(format).plan(str(path.parent if format in FOLDERS else file),
                                             "train", given)  # fmt: skip
        job = prepare.Job(0, tuple(units), format, given, "", str(path.parent))
        reasons: Counter[str] = Counter()
        digest = hashlib.blake2b(digest_size=6)
        for number, item in enumerate(prepare.read_items(job)):
            data, record, reason, detail = prepare._judged(number, item, job)
            if record and given.in_place:
                record = in_place_again(record, item, job.root)
            reasons[reason if record is None else "kept"] += 1
            digest.update(data or f"{item.key}{reason}{detail}".encode("utf-8", "replace"))
            if record and b"root:" in record.image:
                raise AssertionError("a file outside the input was read")
        return f"{'+'.join(sorted(reasons))}: {dict(reasons)} {digest.hexdigest()}"

    return run


def tar_seeds() -> list[bytes]:
    """Archives of three examples: plain, packed, with long names and attributes."""
    found = []
    for mode, form in (("w", tarfile.USTAR_FORMAT), ("w", tarfile.GNU_FORMAT),
                       ("w", tarfile.PAX_FORMAT), ("w:gz", tarfile.GNU_FORMAT),
                       ("w:bz2", tarfile.PAX_FORMAT)):  # fmt: skip
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode, format=form) as archive:
            for key in (
                "0",
                "deep/" * 3 + "1",
                "2" * (90 if form == tarfile.USTAR_FORMAT else 180),
            ):
                about = json.dumps(dict(title="a title", width=20, tags=["a", "b"])).encode()
                for suffix, data in (
                    ("png", encoded("PNG")), ("txt", b"a caption"), ("json", about), ("cls", b"3"),
                ):  # fmt: skip
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    if form == tarfile.PAX_FORMAT:
                        info.pax_headers = {"comment": "a comment", "mtime": "1.5"}
                    archive.addfile(info, io.BytesIO(data))
        found.append(out.getvalue())
    return found


def damage_tar(rng: random.Random, seed: bytes) -> bytes:
    """A damaged archive; in half of them the checksum of a damaged header is right."""
    if seed[257:262] != b"ustar" or rng.random() < 0.4:
        return mutate.data(rng, seed)
    out = bytearray(seed)
    heads = [at for at in range(0, len(out) - 511, 512) if out[at + 257 : at + 262] == b"ustar"]
    for at in rng.sample(heads, min(len(heads), rng.randint(1, 3))):
        start, size = rng.choice(
            ((0, 100), (100, 8), (124, 12), (124, 12), (136, 12), (156, 1), (156, 1), (157, 100),
             (257, 8), (265, 32), (345, 155))
        )  # fmt: skip
        if start == 124:
            value = rng.choice((*mutate.NUMBERS[:28], 600 << 20))
            field = (
                b"%011o\0" % value if rng.random() < 0.6 else b"\x80" + value.to_bytes(11, "big")
            )
        elif start == 156:
            field = rng.choice(b"01234567xgLKSDVMN\0Z").to_bytes(1, "big")
        elif start in (0, 157) and rng.random() < 0.5:
            field = rng.choice(mutate.PATHS).encode()[:size].ljust(size, b"\0")
        else:
            field = mutate.data(rng, bytes(out[at + start : at + start + size]), 2)
        out[at + start : at + start + size] = field[:size].ljust(size, b"\0")
        out[at + 148 : at + 156] = b" " * 8
        out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    if rng.random() < 0.2:
        return mutate.data(rng, bytes(out), 2)
    return bytes(out)


ROW = dict(file_name="a.png", text="a caption", label="cat", size=3, more=dict(a=[1, 2.5, None]))


def jsonl_seeds() -> list[bytes]:
    """Rows with captions, lists of them, labels, questions."""
    rows = [
        ROW,
        ROW | dict(text=["one", "two"], label=["a", "b"]),
        ROW | dict(file_name="b.jpg", questions=[dict(question="what?", answer="that")]),
        dict(image="a.png", caption=dict(en="one", de="zwei")),
    ]
    return [json.dumps(rows).encode()]


def damage_jsonl(rng: random.Random, seed: bytes) -> bytes:
    """Rows with other values, and lines that are no JSON."""
    rows = json.loads(seed)
    lines = [mutate.text_of(rng, mutate.tree(rng, rng.choice(rows))) for _ in range(3)]
    joined = rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b"", b"\r")).join(lines)
    return mutate.data(rng, joined, 2) if rng.random() < 0.1 else joined


def json_seeds() -> list[bytes]:
    """An array of rows, COCO's captions, Karpathy's lists."""
    captions = [dict(image_id=i, caption=text) for i, text in enumerate(("one", "two", "three"))]
    images = [dict(id=0, file_name="a.png"), dict(id=1, file_name="b.jpg", width=20)]
    named = dict(filepath=".", filename="a.png", split="restval", sentences=[dict(raw="one")])
    coco = dict(info={}, images=images, annotations=captions)
    return [*jsonl_seeds(), json.dumps(coco).encode(), json.dumps(dict(images=[named])).encode()]


def damage_json(rng: random.Random, seed: bytes) -> bytes:
    """Other values at random places of the list, or other bytes."""
    found = mutate.text_of(rng, mutate.tree(rng, json.loads(seed)))
    return mutate.data(rng, found, 2) if rng.random() < 0.1 else found


def csv_seeds() -> list[bytes]:
    """Commas and tabs, quoted and not."""
    return [
        b'filepath,title,label\na.png,a text,cat\nb.jpg,"two, words",dog\na.png,"a ""word""",x\n',
        b"filepath\ttitle\na.png\ta caption\nb.jpg\tanother one\n",
        b'title,file_name,more\n"two\nlines",a.png,1\nthree,b.jpg,\n',
    ]


def damage_csv(rng: random.Random, seed: bytes) -> bytes:
    """Cells, quotation marks and ends of lines at random."""
    out = seed
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        text = rng.choice((*mutate.TEXTS, ",", "\t", '"', '""', "\n", "\r", "\r\n", "a.png"))
        piece = text.encode("utf-8", "surrogatepass")
        cut = rng.choice((0, 0, 1, 5))
        out = out[:at] + piece + out[at + cut :]
    return mutate.data(rng, out, 3) if rng.random() < 0.3 else out


def parquet_seeds() -> list[bytes]:
    """Tables with images as bytes, as HF's struct and as paths, packed and not."""
    images = [encoded("PNG"), encoded("JPEG"), encoded("WEBP")]
    labels = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}}}
    plain = pa.table({"image": images, "caption": ["one", "two", None], "label": [0, 1, 2]})
    plain = plain.replace_schema_metadata({"huggingface": json.dumps(labels)})
    struct_image = [dict(bytes=one, path="a.png") for one in images]
    nested = pa.table({"image": struct_image, "caption": [["a"], ["b", "c"], []]})
    paths = pa.table({"filepath": ["a.png", "b.jpg", "a.png"], "title": ["x"] * 3})
    found = []
    for table, options in ((plain, {}), (plain, dict(compression="none", row_group_size=2)),
                           (nested, dict(compression="zstd")), (nested, dict(compression="gzip")),
                           (paths, {}), (paths, dict(use_dictionary=False))):  # fmt: skip
        out = io.BytesIO()
        pq.write_table(table, out, **options)
        found.append(out.getvalue())
    return found


def damage_parquet(rng: random.Random, seed: bytes) -> bytes:
    """Bytes at random: of the footer, whose length stays right, of the pages, or anywhere."""
    kind = rng.randrange(4)
    size = int.from_bytes(seed[-8:-4], "little")
    pages, footer = seed[: -8 - size], seed[-8 - size : -8]
    if kind <= 1:
        footer = mutate.data(rng, footer, 3)
        return pages + footer + struct.pack("<I", len(footer)) + b"PAR1"
    if kind == 2:
        return (
            mutate.data(rng, pages, 4)[: len(pages)].ljust(len(pages), b"\0") + seed[len(pages) :]
        )
    return mutate.data(rng, seed)


def sidecar_seeds() -> list[bytes]:
    """What stands beside an image."""
    return [json.dumps(ROW).encode(), json.dumps(dict(caption=["a", "b"], label=3)).encode()]


def reference_seeds() -> list[bytes]:
    """References as an index has them: to a whole file, a range and a page."""
    found = []
    for span in (Span("a.png", 300, 0, 300), Span("s3://b/c.tar", 9999, 512, 40),
                 Span("t.parquet", 999, 4, 90, Page("snappy", 0, 400, 10, 20), 7)):  # fmt: skip
        found.append(references.dump(span, b"image", "/data"))
    return found


def run_reference(path: pathlib.Path) -> str:
    """Reads a reference."""
    found = references.load(path.read_bytes(), "data")
    if found.path.startswith(("/", "..")):
        found = found._replace(path="elsewhere")
    return str(found)


KINDS = {
    "tars": Kind(tar_seeds, damage_tar, importer("webdataset", "input.tar"), 700),
    "parquet": Kind(parquet_seeds, damage_parquet, importer("parquet", "input.parquet"), 700),
    "jsonl": Kind(jsonl_seeds, damage_jsonl, importer("imagefolder", "metadata.jsonl")),
    "json": Kind(json_seeds, damage_json, importer("json", "input.json", in_place=True)),
    "csv": Kind(csv_seeds, damage_csv, importer("csv", "input.csv")),
    "tars_in_place": Kind(
        tar_seeds, damage_tar, importer("webdataset", "input.tar", in_place=True), 700
    ),
    "parquet_in_place": Kind(
        parquet_seeds, damage_parquet, importer("parquet", "input.parquet", in_place=True), 700
    ),
    "sidecars": Kind(sidecar_seeds, mutate.data, importer("sidecars", "a.json", in_place=True)),
    "references": Kind(reference_seeds, mutate.data, run_reference),
}
