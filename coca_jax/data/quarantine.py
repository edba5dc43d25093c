"""Whether an item can train: the reasons why not, and the record of one that can."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from coca_jax.data import images, order, videos
from coca_jax.data.sources import files, references
from coca_jax.data.sources.fields import class_number, plain_json, selected
from coca_jax.data.sources.items import Item, Options
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.source import Problem
from coca_jax.runtime import storage

_NOT_UTF8 = (
    "a text or label has bytes that are not UTF-8; convert the file (iconv -f CP1252 -t UTF-8, if "
    "it is from a spreadsheet in Western Europe)"
)


def wanted(item: Item, options: Options) -> str:
    """'' for an item that the selection keeps, else what leaves it out: 'where', 'sample', or the
    side of a holdout on which it is, 'held_out' or 'not_held_out'.

    An item with a problem is kept, to be listed once: on the side that is not held out, and where
    its fields are known, with those that have the wanted values.
    """
    if options.holdout:
        by = item.key.encode() if options.unread else item.image
        held = not item.problem and is_held_out(by, options.holdout, item.drawn.holdouts)
        if held != options.held_out:
            return "held_out" if held else "not_held_out"
    for field, values in options.where:
        known = not item.problem or field in item.extra
        if known and not selected({field: values}, item.extra, item.texts, item.labels):
            return "where"
    if item.problem:
        return ""
    if options.sample < 1.0:
        digest = order.key_of(item.key.encode())
        again = item.drawn.seeds.count(options.seed)
        key = order.key_of([options.seed, digest & (2**63 - 1), *([again] if again else [])])
        if order.uniform(np.array([key], np.uint64), 1)[0, 0] >= options.sample:
            return "sample"
    return ""


def is_held_out(image: bytes, share: float, earlier: int = 0) -> bool:
    """Whether an encoded image, or the key of one that is not read, is among the share that is held
    out: a function of its bytes, and of how many holdouts there were before."""
    return place(image, earlier) < share


def place(image: bytes, earlier: int = 0) -> float:
    """Where the bytes of an image put it, uniformly in [0, 1); after holdouts, which leave a part
    of that, elsewhere."""
    salt = earlier.to_bytes(8, "little")
    digest = hashlib.blake2b(image, digest_size=8, person=b"holdout", salt=salt).digest()
    return int.from_bytes(digest, "big") / 2**64


def record(item: Item, options: Options) -> tuple[Record | None, str, str]:
    """The record of a good item, or the reason and detail of its quarantine."""
    if item.problem:
        return None, item.problem, item.detail
    size = len(item.image)
    unread = not size and item.span is not None and item.span.crc == references.UNKNOWN
    if unread and item.span and not item.span.page:
        size = item.span.size
    if not size and not unread:
        return None, "empty_image", "zero bytes"
    texts, labels = texts_and_labels(item)
    if any(len(text) > options.max_text for text in texts):
        return None, "text_too_long", f"{max(map(len, texts))} characters"
    if any("\ufffd" in text for text in (*texts, *labels)):
        return None, "bad_utf8", _NOT_UTF8
    try:
        "".join((*texts, *item.labels)).encode()
    except UnicodeEncodeError:
        return None, "bad_utf8", "a text or label has half a surrogate pair"
    texts = [text for text in texts if len(text) >= max(options.min_text, 1)]
    if options.require == "text" and not texts:
        return None, "missing_text", "no caption of the wanted length"
    if options.require == "label" and not labels:
        return None, "missing_label", "no class name"
    if not texts and not labels and not _asks(item.extra):
        other = ", ".join(sorted(item.extra)[:8])
        other = f"; its other fields: {other}" if other else ""
        return None, "missing_text", f"neither a caption nor a class name{other}"
    if unread:  # what only its bytes tell is looked at when training reads it
        second_size = item.second_span.size if item.second_span and not item.second_span.page else 0
        size, data, reason, detail = max(size, second_size), b"", "", ""
        if size > options.max_image_bytes:
            reason, detail = "image_too_big", f"{size} bytes"
    else:
        data, reason, detail = _checked(item.image, options)
    if not reason and item.second:
        second, reason, detail = _checked(item.second, options)
    else:
        second = b""
    if reason:
        return None, reason, detail
    extra = plain_json(dict(item.extra)) if item.extra else "{}"
    return Record(data, tuple(texts), tuple(labels), item.key, extra, second), "", ""


def texts_and_labels(item: Item) -> tuple[list[str], list[str]]:
    """An item's texts, and its labels once each, as records have them: blanks are single spaces."""
    texts = [" ".join(text.split()) for text in item.texts]
    labels = [" ".join(label.split()) for label in item.labels]
    return texts, list(dict.fromkeys(label for label in labels if label))


def _asks(extra: Mapping[str, Any]) -> bool:
    """Whether a field lists questions, as sources of that kind read them."""
    lists = (value for value in extra.values() if isinstance(value, list))
    return any(isinstance(one, dict) and "question" in one for found in lists for one in found[:1])


def _checked(data: bytes, options: Options) -> tuple[bytes, str, str]:
    """What is kept of an encoded image or clip, or the reason and detail of its quarantine."""
    if len(data) > options.max_image_bytes:
        return data, "image_too_big", f"{len(data)} bytes"
    image = None
    try:
        if images.is_video_file(data):
            _, height, width = videos.sniff(data, options.max_pixels)
        else:
            image = images.open_image(data, options.max_pixels)
            width, height = image.size
    except ValueError as error:
        big = str(error).startswith("too many pixels")
        return data, "too_many_pixels" if big else "unreadable_image", str(error)
    if min(width, height) < options.min_side:
        return data, "image_too_small", f"{width} x {height}"
    if options.max_aspect and max(width, height) > options.max_aspect * min(width, height):
        return data, "aspect", f"{width} x {height}"
    try:
        if image is None or videos.is_animation(image, data):  # never encoded again
            if options.check:
                videos.verify(data)
        elif options.max_side and max(width, height) > options.max_side:
            data = _shrink(image, options.max_side)
        elif options.check:
            if image.format == "JPEG":  # checks all the data, spares most of the arithmetic
                image.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))
            image.load()
    except Exception as error:  # PIL's decoders raise all sorts on damaged data
        many = str(error).startswith("too many frames")
        return data, "too_many_frames" if many else "damaged_image", str(error)
    return data, "", ""


def _shrink(image: Image.Image, max_side: int) -> bytes:
    """Encodes a smaller image: JPEG, or PNG where there is transparency."""
    alpha = images.has_alpha(image)
    pixels = Image.fromarray(images.to_rgba(image))
    pixels.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if alpha:
        pixels.save(out, "PNG")
    else:
        pixels.save(out, "JPEG", quality=92)
    return out.getvalue()


# What people read about an import: one line, and the quarantine file.


HOW_TO_CAPTION = (
    "captions are read from metadata.jsonl or metadata.csv next to the images (file_name, text), "
    "from .txt members, from .txt files next to them (--format=sidecars) or from the columns text, "
    "caption or title; class names from the column label or from one folder per class"
)


def nothing_usable(
    input: str, read: int, listed: Sequence[Mapping[str, str]], filtered: Mapping[str, int]
) -> str:
    """The message for an input of which nothing can be used. listed: the quarantined examples."""
    reasons = Counter(entry["reason"] for entry in listed)
    text = f"{input}: none of {read} examples can be used: "
    if set(reasons) == {"missing_text"} and not filtered:
        fields = Counter(entry["detail"].partition("other fields: ")[2] for entry in listed)
        there = fields.most_common(1)[0][0]
        how = f"their fields are {there}: name one with --text_field or --label_field"
        return f"{text}none has a caption or a class name; {how if there else HOW_TO_CAPTION}"
    # A duplicate key says best what is wrong with an archive whose members are out of order.
    listed = sorted(listed, key=lambda entry: entry["reason"] != "duplicate_key")
    first = f"; the first quarantined: {listed[0]['key']}: {listed[0]['detail']}" if listed else ""
    return f"{text}quarantined {dict(reasons)}, filtered {dict(filtered)}{first}"


def of_split(out: str, split: str, manifest: Mapping[str, Any]) -> list[str]:
    """Warnings about a split that was written: what was left out, and numbers as class names."""
    found, classes = manifest["splits"][split], manifest["class_names"]
    lines = []
    if left_out := sum(found["quarantined"].values()):
        why = ", ".join(f"{count} {reason}" for reason, count in found["quarantined"].items())
        place = files.join(out, f"{split}-quarantine.jsonl")
        lines.append(f"{left_out} of {found['read']} examples left out ({why}): see {place}")
    if classes and all(class_number(name) is not None for name in classes):
        lines.append(
            f"the class names are numbers ({', '.join(classes[:3])}, ...), and texts would be "
            "'a photo of the 0'; --class_names=FILE gives their names, one a line"
        )
    return lines


# What training finds: examples that turn out not to be usable when they are read first.


class Bad(NamedTuple):
    """An example that cannot be used: its key, '' where it could not be read; a word for why, and
    what is wrong with this one."""

    key: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True, order=True)
class Row:
    """`Bad` of the example `index` of source number `source`."""

    source: int
    index: int
    key: str
    reason: str
    detail: str

    def line(self) -> str:
        """Which it is and what is wrong with it."""
        which = f"{self.key!r} (index {self.index})" if self.key else f"index {self.index}"
        return f"{which}: {self.detail}"


def undecodable(record: Record, why: str) -> Problem:
    """What is wrong with a record that training could not decode, as an import would say it."""
    return Problem(problem_of(record) or "damaged_image", why)


def problem_of(record: Record) -> str:
    """Why the images of a record cannot be used, as an import would say it; '' where they can."""
    found = (_checked(one, Options())[1] for one in (record.image, record.second) if one)
    return next(filter(None, found), "") if record.image else "empty_image"


class Quarantine:
    """The examples of a run that cannot be used, as far as they were read. Thread-safe.

    A batch is a function of the seed, the step and these rows. What is damaged says the data alone,
    so that processes find the same; the rows of a checkpoint make a resumed run decide as before
    where a file was repaired in between.

    Args:
        workdir: of the run, in which FILE lists them; '': no file.
        recorded: rows of the checkpoint from which the run goes on.
    """

    FILE = "quarantine.jsonl"

    def __init__(self, workdir: str = "", recorded: Sequence[Sequence[Any]] = ()):
        self._path = files.join(workdir, self.FILE) if workdir else ""
        self._rows: dict[tuple[int, int], Row] = {}
        self._of_source: dict[int, list[Row]] = {}
        self._reported: set[tuple[int, int]] = set()
        self._new: list[Row] = []
        self._lock = threading.Lock()
        self.merge(Row(*one) for one in recorded)

    def find(self, source: int, index: int) -> Row | None:
        """The row of an example; None of one that is not known to be bad."""
        return self._rows.get((source, index)) if self._rows else None

    def of_source(self, source: int) -> list[Row]:
        """The rows of a source, in the order in which they were found."""
        return self._of_source.get(source, [])

    def add(self, source: int, bad: Mapping[int, Bad]) -> list[Row]:
        """Adds what was found of a source; the rows that are new."""
        found = self.merge(Row(source, index, *one) for index, one in bad.items())
        self._new += found
        return found

    def merge(self, rows: Iterable[Row]) -> list[Row]:
        """Adds rows, as another process has found; those that are new."""
        with self._lock:
            fresh = [row for row in rows if (row.source, row.index) not in self._rows]
            for row in fresh:
                self._rows[row.source, row.index] = row
                self._of_source.setdefault(row.source, []).append(row)
        return fresh

    def take_new(self) -> list[Row]:
        """What this process has found since the last call."""
        with self._lock:
            new, self._new = self._new, []
        return new

    def rows(self) -> list[Row]:
        """All rows, by source and index."""
        with self._lock:
            return sorted(self._rows.values())

    def compare(self, name: str, row: Row, record: Record, unread: bool) -> None:
        """Warns once where an example in quarantine can be used by now."""
        if unread or (row.source, row.index) in self._reported:
            return
        self._reported.add((row.source, row.index))
        if not problem_of(record):
            logging.warning(
                "%s: example %d, %s, was in quarantine (%s) and can be read now; this run continues "
                "without it, so that it stays the same run (a new --workdir uses it)",
                *(name, row.index, row.key, row.reason),
            )

    def write(self) -> None:
        """Writes the file, where there is anything to list."""
        rows = self.rows()
        if self._path and rows:
            lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in rows)
            storage.write_bytes(self._path, ("\n".join(lines) + "\n").encode())

    def where(self) -> str:
        """Writes the file, and says where it is."""
        self.write()
        return f"They are listed in {self._path}." if self._path else "Their lines are in the log."
