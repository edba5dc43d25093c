"""The records that an evaluation goes through: which of a data set's have what it needs."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from coca_jax.config import fields
from coca_jax.config.data import Entry
from coca_jax.config.fields import Rule
from coca_jax.data import evaluation_data, prompts, supervision
from coca_jax.data.sources import items
from coca_jax.evaluation.evaluators import Record, base
from coca_jax.evaluation.evaluators.base import Flag, called
from coca_jax.runtime import activity

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
            from coca_jax.data.synthetic_source import Scenes

            source: Any = Scenes(entry.split or "test", entry.kind, entry.objects, entry.scenery)
        else:
            source = evaluation_data.open_source(entry, "test")
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
                raise ValueError(base.missing(source.name, need))
        elif limit:
            self._indices = self._indices[:limit]

    def _choose(self, limit: int, known: set[str] | None, need: str) -> None:
        """Leaves the first `limit` records that count. Those behind the last are not read."""
        has = supervision.KINDS[need]().trains if need else None
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
    wanted, kind = supervision.KINDS[need].wanted, supervision.of(entry)
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


# The classes of a task: how its prompts call them, and how its records do.


FLAG = Flag("class_names", "", "Text file: a class name, or label<TAB>name, a line.")
_SHOWN = 4  # names in a line
RULE = Rule(
    lambda v: fields.TEXT.holds(v) or fields.TEXTS.holds(v),
    "the names, a tuple of texts, or a text file with one a line",
)


def names_and_labels(task: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(names that go into the prompts, labels as the records have them). Raises ValueError for data
    of fewer than two classes where the task names none."""
    given = task.get("class_names")
    if given and not isinstance(given, str):
        return list(given), list(given)
    declared = evaluation_data.class_names(task["data"], "test")
    if not given and len(declared) < 2:
        there = f"all labels are {declared[0]!r}" if declared else "there is no label"
        raise ValueError(
            f"{called(task)}: {there}, and it tells two classes or more apart; give data that have "
            "such, or their names as class_names"
        )
    return read_class_names(given, declared) if given else (declared, declared)


def check_said(task: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises ValueError for the name of a class that no text can have: bytes of a folder's."""
    bad = next((name for name in names if items.printable(name) != name), "")
    if bad:
        raise ValueError(
            f"{called(task)}: the class {bad!r} has a name that is not UTF-8; rename its folder, "
            "or `coca-jax prepare` the data, which leaves its pictures out"
        )


def check(task: Mapping[str, Any]) -> None:
    """Raises ValueError or FileNotFoundError for class names of a task that cannot be, whatever the
    data are: they are not read."""
    given = task.get("class_names")
    if not given:
        return
    names = _read(given)[0] if isinstance(given, str) else list(given)
    file = f" {given}" if isinstance(given, str) else ""
    check_distinct(names, f"{called(task)}: class_names{file}")


def check_distinct(names: Sequence[str], where: str = "class_names") -> None:
    """Raises ValueError when names repeat or there are fewer than two."""
    distinct = len(set(names))
    if distinct < 2 or distinct != len(names):
        again = f"; {twice(names)!r} is there twice" if distinct != len(names) else ""
        raise ValueError(
            f"{where} holds {len(names)} names, {distinct} distinct; give two or more, each "
            f"once{again}"
        )


def twice(texts: Sequence[str]) -> str:
    """The first text of several that is there twice; '' where none is."""
    return next((text for text, count in Counter(texts).items() if count > 1), "")


def read_class_names(path: str, declared: Sequence[str]) -> tuple[list[str], list[str]]:
    """Class names from a text file, one a line: (names for the prompts, labels in the data).

    A line `label<TAB>name` calls the data's class `label` by `name`; classes without a line are no
    candidates. Lines without a tab are the data's own class names, or, when none of them is, as
    many as the data declares, in its order, of which a line on standard error says the first.
    Another says which labels no class of the data has, where classes are left without a line.

    Raises ValueError for anything else.
    """
    names, labels = _read(path)
    if labels:
        _tell_of_unknown(path, labels, declared)
        return names, labels
    if set(names) & set(declared):
        return names, names
    if len(names) != len(declared):
        raise ValueError(
            f"class_names {path}: {len(names)} names, none a class of the data, which has "
            f"{len(declared)} ({', '.join(declared[:3])}, ..); give as many, or label<TAB>name"
        )
    shown = [f"{name} -> {label}" for name, label in zip(names, declared)]
    _say(
        f"class_names {path}: none is a class of the data, so they stand for these in their order: "
        f"{_first(shown)}"
    )
    return names, list(declared)


def _tell_of_unknown(path: str, labels: Sequence[str], declared: Sequence[str]) -> None:
    """Says which labels may be mistyped: those of no class, where classes have no label."""
    unknown = [label for label in labels if label not in set(declared)]
    left = [name for name in declared if name not in set(labels)]
    if unknown and left:
        near = difflib.get_close_matches(unknown[0], left, n=1, cutoff=0)
        _say(
            f"class_names {path}: no class of the data is called {_first(unknown)}; without a line "
            f"are {_first(list(dict.fromkeys([*near, *left])))}"
        )


def _first(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (", ..." if len(texts) > _SHOWN else "")


@functools.cache
def _say(line: str) -> None:
    """Says it once, however many tasks and evaluations read the file."""
    print(line, file=sys.stderr)


def _read(path: str) -> tuple[list[str], list[str]]:
    """(names, labels) of the lines of a file; no labels where no line has a tab. Raises ValueError
    for a line that is otherwise than the others, and a label that has two."""
    names, labels = [], []
    lines = enumerate(prompts.read_lines(path, f"class_names {path}"), 1)
    several = [(number, line.strip().split("\t")) for number, line in lines if line.strip()]
    if all(len(parts) == 1 for _, parts in several):
        return [name for _, (name,) in several], []
    for number, parts in several:
        if len(parts) != 2:
            raise ValueError(
                f"class_names {path}, line {number}: {len(parts) - 1} tabs; every line needs one "
                "tab, label<TAB>name"
            )
        labels.append(parts[0].strip())
        names.append(parts[1].strip())
    if again := twice(labels):
        raise ValueError(
            f"class_names {path}: the label {again!r} is there twice; give it one name"
        )
    return names, labels
