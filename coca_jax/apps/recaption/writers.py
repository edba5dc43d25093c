"""A shard in the formats that others read: webdataset tar, parquet, ArrayRecord."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from coca_jax.apps.recaption.captioner import unpacked
from coca_jax.apps.recaption.selection import Scored
from coca_jax.data.sources import records
from coca_jax.data.sources.fields import plain_json
from coca_jax.data.sources.items import Item

SUFFIXES = dict(tar="tar", parquet="parquet", array_record="array_record")
EMBEDDINGS = ("image_emb", "text_emb")
_ROWS = 256  # of a parquet row group, or fewer that hold so many bytes: five times that is taken
_GROUP_BYTES = 64 << 20
_MAGIC = (
    (b"\xff\xd8", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"P5", "pgm"),
    (b"P6", "ppm"),
)


class Example(NamedTuple):
    """An image with the texts that it keeps, and what was made of it (see Captioner.part).
    several: whether other images may keep several texts."""

    key: str
    item: Item
    captions: list[Scored]
    result: dict[str, Any]
    several: bool = False

    def fields(self) -> dict[str, Any]:
        """The item's other fields, without what an older work left beside its `recaption`:
        embeddings, which students would take for those of what was made now, and `texts`, which
        readers would take for what is kept now."""
        extra, before = self.item.extra, self.item.extra.get("recaption")
        ours = isinstance(before, dict) and "captions" in before  # else the data's own field
        left = (*EMBEDDINGS, "texts") if ours else EMBEDDINGS
        return {name: value for name, value in extra.items() if name not in left}

    def made(self) -> dict[str, Any]:
        """The result without embeddings, as JSON holds it beside the image."""
        names = ("captions", "originals")
        return {name: self.result[name] for name in names} | {
            "key": self.result["key"],
            "scores": [score for _, score in self.captions],
        }

    def embeddings(self) -> dict[str, np.ndarray]:
        """image_emb float16 [E], text_emb float16 [texts, E], the originals' first; or {}."""
        if "image_emb" not in self.result:
            return {}
        count = len(self.result["originals"]) + len(self.result["captions"])
        return dict(
            image_emb=unpacked(self.result["image_emb"], 1)[0],
            text_emb=unpacked(self.result["text_emb"], count),
        )


def write(to: str, path: str, examples: Iterator[Example]) -> dict[str, Any]:
    """Writes a local file; returns its count of images, of those with_text and with_label, and the
    labels as classes, sorted."""
    counted = _Counted(examples)
    dict(tar=_tar, parquet=_parquet, array_record=_array_record)[to](path, counted)
    return dict(counted.counts, classes=sorted(counted.classes))


class _Counted:
    def __init__(self, examples: Iterator[Example]) -> None:
        self._examples, self.classes = examples, set[str]()
        self.counts = dict(count=0, with_text=0, with_label=0)

    def __iter__(self) -> Iterator[Example]:
        for example in self._examples:
            self.counts["count"] += 1
            self.counts["with_text"] += bool(example.captions)
            self.counts["with_label"] += bool(example.item.labels)
            self.classes.update(example.item.labels)
            yield example


def suffix(image: bytes) -> str:
    """Of a file with these bytes, as `webdataset` names its members."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    if image[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        return "heic"
    return next((name for magic, name in _MAGIC if image.startswith(magic)), "img")


def _tar(path: str, examples: _Counted) -> None:
    """KEY.jpg (or as the image is), KEY.txt the first text, KEY.json all else, KEY.npz embeddings,
    as in DataCompDR."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for one in examples:
            fields = one.fields() | dict(recaption=one.made())
            if one.item.labels:
                fields["labels"] = list(one.item.labels)
            if one.several:  # of one text too: who reads this field finds it beside each image
                fields["texts"] = [text for text, _ in one.captions]
            members = {
                suffix(one.item.image): one.item.image,
                "txt": one.captions[0][0].encode() if one.captions else b"",
                "json": plain_json(fields).encode(),
            }
            arrays = one.embeddings()
            if arrays:
                out = io.BytesIO()
                np.savez(out, **arrays)  # type: ignore[arg-type]
                members["npz"] = out.getvalue()
            for name, data in members.items():
                member = tarfile.TarInfo(f"{one.key}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def _parquet(path: str, examples: _Counted) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    caption = pa.struct(
        dict(
            text=pa.string(),
            log_prob=pa.float32(),
            tokens=pa.int32(),
            checkpoint=pa.int32(),
            prompt=pa.int32(),
            way=pa.int32(),
            score=pa.float32(),
            flags=pa.list_(pa.string()),
        )
    )
    original = pa.struct(dict(text=pa.string(), score=pa.float32()))
    schema = pa.schema(
        dict(
            key=pa.string(),
            source=pa.string(),
            image=pa.binary(),
            text=pa.list_(pa.string()),
            scores=pa.list_(pa.float32()),
            label=pa.list_(pa.string()),
            captions=pa.list_(caption),
            originals=pa.list_(original),
            image_emb=pa.list_(pa.float16()),
            text_emb=pa.list_(pa.list_(pa.float16())),
            extra=pa.string(),
        )
    )
    with pq.ParquetWriter(path, schema) as writer:
        rows: list[dict[str, Any]] = []
        size = 0
        for one in examples:
            arrays = one.embeddings()
            rows.append(
                dict(
                    one.made(),
                    key=one.key,
                    source=one.result["key"],
                    image=one.item.image,
                    text=[text for text, _ in one.captions],
                    label=list(one.item.labels),
                    image_emb=list(arrays["image_emb"]) if arrays else None,
                    text_emb=[list(row) for row in arrays["text_emb"]] if arrays else None,
                    extra=plain_json(one.fields()),
                )
            )
            size += len(one.item.image)
            if len(rows) == _ROWS or size >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _array_record(path: str, examples: _Counted) -> None:
    """As `prepare` writes it; what was made is in `extra`. Raises OSError on a full disk."""
    with records.writing(path):
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
    for one in examples:
        extra = one.fields() | dict(recaption=one.made())
        for name, array in one.embeddings().items():
            extra[name] = one.result[name] if array.size else ""
        texts = tuple(text for text, _ in one.captions)
        record = records.Record(
            one.item.image, texts, tuple(one.item.labels), one.key, plain_json(extra)
        )
        with records.writing(path):
            writer.write(records.serialize(record))
    with records.writing(path):
        writer.close()
