"""The records that an evaluation goes through: which of a data set's have what it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from coca_jax.config.data import Entry
from coca_jax.console import activity
from coca_jax.data import kinds
from coca_jax.evaluators import Record, declarations
from coca_jax.importers import unprepared

_PART = 256  # records read at a time


class Records:
    """The records of a data entry in their stored order, read as one goes through them.

    Args:
      data: an entry as in config.data.sources with `split`; `path` may be a plain imagefolder, and
        `tfds` any set that the user has.
      limit: at most so many of those that count; 0: all.
      known: only records one of whose texts is among these; None: all.
      need: what a record must have to count, the name of a kind of source ('caption', 'label');
        '': nothing.

    Attributes: left_out, the number of records without what is needed, up to the last that counts.

    A record has image (encoded bytes; of drawn scenes uint8 [64, 64, 3]), second (the other image
    of a pair), text, labels, key and extra; drawn scenes have `scene`. Raises ValueError or
    FileNotFoundError for bad data, or data none of which has what is needed.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        limit: int = 0,
        known: set[str] | None = None,
        need: str = "",
    ):
        entry = Entry.of(data)
        if need and not _suits(entry, need):
            entry = dataclasses.replace(entry, kind=need)
        self.scenes = bool(entry.builtin)
        if self.scenes:
            from coca_jax.data.scenes import Scenes

            source: Any = Scenes(entry.split or "test", entry.kind, entry.objects, entry.scenery)
        else:
            source = unprepared.open_source(entry, "test")
        self._source = source
        self._indices = np.arange(len(source))
        self._given = 0
        self.left_out = 0
        # Going through a TFDS set costs as much as evaluating on it.
        if self.scenes or source.complete or entry.tfds:
            need = ""
        if need or known is not None:
            self._choose(limit or len(source), known, need)
            if need and not len(self._indices) and self.left_out == len(source):
                raise ValueError(declarations.missing(source.name, need))
        elif limit:
            self._indices = self._indices[:limit]

    def _choose(self, limit: int, known: set[str] | None, need: str) -> None:
        """Leaves the first `limit` records that count. Those behind the last are not read."""
        has = kinds.KINDS[need]().trains if need else None
        kept: list[int] = []
        for part in self._parts():
            for index, record in zip(part, self._source.read_texts(part)):
                if has is not None and not has(record):
                    self.left_out += 1
                elif known is None or not known.isdisjoint(self._texts(record)):
                    kept.append(index)
                    if len(kept) == limit:
                        break
            if len(kept) == limit:
                break
        self._indices = np.array(kept, np.int64)

    def _texts(self, record: Any) -> Sequence[str]:
        return [record["text"]] if self.scenes else record.texts

    def __len__(self) -> int:
        return len(self._indices)

    def _parts(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self._indices), _PART):
            yield self._indices[start : start + _PART]
            activity.alive()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._given = 0
        for part in self._parts():
            self._given += len(part)
            if self.scenes:
                yield from self._source.read(part)
                continue
            for record in self._source.read(part):
                yield dict(
                    image=record.image,
                    text=list(record.texts),
                    labels=list(record.labels),
                    key=record.key,
                    extra=record.extra,
                    second=record.second,
                )

    def unreadable(self, read: Callable[[bytes], Any], last: int) -> str:
        """The key of the first of the `last` records given whose image `read` refuses, and why; ''
        where there is none. Only those are looked at: images are decoded as they are needed."""
        if self.scenes or not self._given:
            return ""
        first = max(0, self._given - last - _PART)  # of the last part some may not be given yet
        for record in self._source.read(self._indices[first : self._given]):
            try:
                read(record.image)
            except ValueError as error:
                return f"{record.key}: {error}"
        return ""


def _suits(entry: Entry, need: str) -> bool:
    """Whether the records of an entry, as its kind reads them, have what is needed."""
    wanted, kind = kinds.KINDS[need].wanted, kinds.of(entry)
    if not entry.builtin:
        return wanted in kind.gives
    return wanted == kind.wanted or (wanted == "text" and kind.drawn == "captions")


def records_of(task: Mapping[str, Any], need: str) -> Records:
    """The records of a task's data that have what its evaluator needs, of known texts where it
    asks for these (`known_only`). Raises as `Records` does."""
    known = set(candidates(task)) if task.get("known_only") else None
    return Records(task["data"], task.get("limit", 0), known, need)


def candidates(task: Mapping[str, Any]) -> list[str]:
    """The texts of the data that a task names as further candidates, each once, sorted."""
    if not task.get("candidates"):
        return []
    found = Records(dict(dict(split="train"), **task["candidates"]))
    return sorted({text for record in found for text in texts_of(record)})


def texts_of(record: Record) -> list[str]:
    """The texts of a record; [] where it has none."""
    return [record["text"]] if isinstance(record["text"], str) else list(record["text"] or ())
