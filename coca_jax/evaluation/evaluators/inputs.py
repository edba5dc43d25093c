"""Inputs of an evaluation task: records, candidate texts and class names."""

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
from coca_jax.evaluation.evaluators.base import Flag, task_label


def records_of(task: Mapping[str, Any], need: str) -> Records:
    """The records of a task that have the required supervision `need`; with `known_only`, only
    those whose text is among the candidates. Raises the errors of `Records`."""
    known = set(candidates(task)) if task.get("known_only") else None
    return Records(task["data"], task.get("limit", 0), known, need)


def candidates(task: Mapping[str, Any]) -> list[str]:
    """The distinct texts of the task's additional candidates, sorted."""
    if not task.get("candidates"):
        return []
    found = Records(dict(dict(split="train"), **task["candidates"]))
    return sorted({text for record in found for text in texts_of(record)})


def texts_of(record: Record) -> list[str]:
    """The texts of a record; [] if it has none."""
    return [record["text"]] if isinstance(record["text"], str) else list(record["text"] or ())


# Class names: the names in prompts and the labels in records.


FLAG = Flag("class_names", "", "Text file with one class name, or label<TAB>name, per line.")
_SHOWN = 4  # names listed in a message
ClassNames = str | tuple[str, ...]  # path of a text file, or the names


def names_and_labels(task: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns (class names for prompts, labels of the records). Raises ValueError if the task names
    no classes and the data has fewer than two."""
    given = task.get("class_names")
    if given and not isinstance(given, str):
        return list(given), list(given)
    declared = evaluation_data.class_names(task["data"], "test")
    if not given and len(declared) < 2:
        problem = f"all labels are {declared[0]!r}" if declared else "no labels"
        raise ValueError(
            f"{task_label(task)}: {problem}. Use data with at least two classes, or set class_names."
        )
    return read_class_names(given, declared) if given else (declared, declared)


def check_class_names(task: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises ValueError for a class name that is not valid UTF-8 (from a folder name)."""
    bad = next((name for name in names if printable(name) != name), "")
    if bad:
        raise ValueError(
            f"{task_label(task)}: class {bad!r}: the name is not UTF-8. Rename its folder, or run "
            "`coca-jax prepare` on the data, which skips these images."
        )


def check(task: Mapping[str, Any]) -> None:
    """Raises ValueError or FileNotFoundError for invalid class names, without reading the data."""
    given = task.get("class_names")
    if not given:
        return
    names = _read(given)[0] if isinstance(given, str) else list(given)
    file = f" {given}" if isinstance(given, str) else ""
    check_distinct(names, f"{task_label(task)}: class_names{file}")


def check_distinct(names: Sequence[str], where: str = "class_names") -> None:
    """Raises ValueError for duplicate names or fewer than two."""
    distinct = len(set(names))
    if distinct < 2 or distinct != len(names):
        again = f", {first_duplicate(names)!r} twice" if distinct != len(names) else ""
        raise ValueError(
            f"{where}: {len(names)} names, {distinct} distinct{again}. Give two or more distinct "
            "names."
        )


def first_duplicate(texts: Sequence[str]) -> str:
    """The first text that occurs more than once; '' if there is none."""
    return next((text for text, count in Counter(texts).items() if count > 1), "")


def read_class_names(path: str, declared: Sequence[str]) -> tuple[list[str], list[str]]:
    """Reads class names from a text file; returns (names for prompts, labels in the data).

    Lines are either all `label<TAB>name`, where `label` is a class of the data and `name` its name
    in prompts, or all plain names. Classes without a line are not candidates. Plain names are
    classes of the data; if none is, their number must equal the number of classes, and they replace
    the class names in order. Messages on standard error show this mapping, and labels that are not
    in the data.

    Raises ValueError for an invalid file.
    """
    names, labels = _read(path)
    if labels:
        _warn_unknown(path, labels, declared)
        return names, labels
    if set(names) & set(declared):
        return names, names
    if len(names) != len(declared):
        raise ValueError(
            f"class_names {path}: {len(names)} names, none of them among the {len(declared)} "
            f"classes of the data ({', '.join(declared[:3])}, ..). Give {len(declared)} names, or "
            "lines label<TAB>name."
        )
    shown = [f"{name} -> {label}" for name, label in zip(names, declared)]
    _print_once(
        f"class_names {path}: no name is a class of the data; assigned in order: {_first(shown)}"
    )
    return names, list(declared)


def _warn_unknown(path: str, labels: Sequence[str], declared: Sequence[str]) -> None:
    """Reports possible typos: labels that are not in the data while classes have no line."""
    unknown = [label for label in labels if label not in set(declared)]
    left = [name for name in declared if name not in set(labels)]
    if unknown and left:
        near = difflib.get_close_matches(unknown[0], left, n=1, cutoff=0)
        _print_once(
            f"class_names {path}: labels not in the data: {_first(unknown)}; classes without a "
            f"line: {_first(list(dict.fromkeys([*near, *left])))}"
        )


def _first(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (", ..." if len(texts) > _SHOWN else "")


@functools.cache
def _print_once(line: str) -> None:
    """Prints a line once, although several tasks and evaluations may read the same file."""
    print(line, file=sys.stderr)


def _read(path: str) -> tuple[list[str], list[str]]:
    """Returns (names, labels) of the lines of a file; no labels if no line has a tab. Raises
    ValueError for lines of different formats or a repeated label."""
    names, labels = [], []
    lines = enumerate(prompts.read_lines(path, f"class_names {path}"), 1)
    several = [(number, line.strip().split("\t")) for number, line in lines if line.strip()]
    if all(len(parts) == 1 for _, parts in several):
        return [name for _, (name,) in several], []
    for number, parts in several:
        if len(parts) != 2:
            raise ValueError(
                f"class_names {path}, line {number}: {len(parts) - 1} tabs. Write every line as "
                "label<TAB>name."
            )
        labels.append(parts[0].strip())
        names.append(parts[1].strip())
    if again := first_duplicate(labels):
        raise ValueError(
            f"class_names {path}: label {again!r} has several names. Give it one name."
        )
    return names, labels
