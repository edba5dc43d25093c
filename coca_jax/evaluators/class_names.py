"""The classes of a task: how its prompts call them, and how its records do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coca_jax.data import prompts
from coca_jax.evaluators.declarations import Flag
from coca_jax.importers import unprepared

FLAG = Flag("class_names", "", "Text file: a class name, or label<TAB>name, a line.")


def names_and_labels(task: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(names that go into the prompts, labels as the records have them)."""
    given = task.get("class_names")
    if given and not isinstance(given, str):
        return list(given), list(given)
    declared = unprepared.class_names(task["data"], "test")
    return read_class_names(given, declared) if given else (declared, declared)


def read_class_names(path: str, declared: Sequence[str]) -> tuple[list[str], list[str]]:
    """Class names from a text file, one a line: (names for the prompts, labels in the data).

    A line `label<TAB>name` calls the data's class `label` by `name`; classes without a line are no
    candidates. Lines without a tab are the data's own class names, or, when none of them is, as
    many as the data declares, in its order. Raises ValueError for anything else.
    """
    lines = [line.strip() for line in prompts.read_lines(path)]
    lines = [line for line in lines if line]
    pairs = [line.split("\t") for line in lines if "\t" in line]
    if pairs:
        if len(pairs) != len(lines) or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"class_names {path}: every line needs one tab, label<TAB>name")
        return [name.strip() for _, name in pairs], [label.strip() for label, _ in pairs]
    if set(lines) & set(declared):
        return lines, lines
    if len(lines) != len(declared):
        raise ValueError(
            f"class_names {path}: {len(lines)} names, none a class of the data, which has "
            f"{len(declared)} ({', '.join(declared[:3])}, ..); give as many, or label<TAB>name"
        )
    return lines, list(declared)
