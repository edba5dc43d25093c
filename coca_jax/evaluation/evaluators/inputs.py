"""What a task reads of its data: records, candidate texts, class names."""

from __future__ import annotations

import difflib
import functools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from coca_jax.data import evaluation_data, prompts
from coca_jax.data.evaluation_data import Records
from coca_jax.data.sources.fields import printable
from coca_jax.evaluation.evaluators import Record
from coca_jax.evaluation.evaluators.base import Flag, called


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
ClassNames = str | tuple[str, ...]  # a text file, or the names


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


def check_class_names(task: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises ValueError for the name of a class that no text can have: bytes of a folder's."""
    bad = next((name for name in names if printable(name) != name), "")
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
        _warn_unknown(path, labels, declared)
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


def _warn_unknown(path: str, labels: Sequence[str], declared: Sequence[str]) -> None:
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
