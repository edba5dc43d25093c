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
      limit: at most so many; 0: all.
      known: only records one of whose texts is among these; None: all.
      need: what a record must have to count, the name of a kind of source ('caption', 'label');
        '': nothing.

    Attributes: left_out, the number of records without what is needed.

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
        self._indices = np.arange(min(limit or len(source), len(source)))
        self._given = 0
        self.left_out = 0
        # Going through a TFDS set costs as much as evaluating on it.
        if need and not (self.scenes or source.complete or entry.tfds):
            self._require(need, source.name)
        if known is not None:
            self._keep(lambda part: [not known.isdisjoint(texts) for texts in self._texts(part)])

    def _require(self, need: str, name: str) -> None:
        count, has = len(self._indices), kinds.KINDS[need]().trains
        self._keep(lambda part: [has(record) for record in self._source.read_texts(part)])
        self.left_out = count - len(self._indices)
        if not len(self._indices):
            raise ValueError(declarations.missing(name, need))

    def _keep(self, wanted: Callable[[np.ndarray], list[bool]]) -> None:
        """Leaves the records for which `wanted`, called with parts of the indices, is true."""
        kept = [np.asarray(wanted(part), bool) for part in self._parts()]
        self._indices = self._indices[np.concatenate(kept)]

    def _texts(self, indices: np.ndarray) -> list[Sequence[str]]:
        found = self._source.read_texts(indices)
        return [[r["text"]] for r in found] if self.scenes else [r.texts for r in found]

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
