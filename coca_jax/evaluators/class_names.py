"""The classes of a task: how its prompts call them, and how its records do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coca_jax.config import rules
from coca_jax.config.rules import Rule
from coca_jax.data import prompts
from coca_jax.evaluators.declarations import Flag, called
from coca_jax.importers import unprepared

FLAG = Flag("class_names", "", "Text file: a class name, or label<TAB>name, a line.")
RULE = Rule(
    lambda v: rules.TEXT.holds(v) or rules.TEXTS.holds(v),
    "the names, a tuple of texts, or a text file with one a line",
)


def names_and_labels(task: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(names that go into the prompts, labels as the records have them)."""
    given = task.get("class_names")
    if given and not isinstance(given, str):
        return list(given), list(given)
    declared = unprepared.class_names(task["data"], "test")
    return read_class_names(given, declared) if given else (declared, declared)


def check(task: Mapping[str, Any]) -> None:
    """Raises ValueError or FileNotFoundError for class names of a task that cannot be, whatever the
    data are: they are not read."""
    given = task.get("class_names")
    if not given:
        return
    names = _lines(given)[0] if isinstance(given, str) else list(given)
    file = f" {given}" if isinstance(given, str) else ""
    check_distinct(names, f"{called(task)}: class_names{file}")


def check_distinct(names: Sequence[str], where: str = "class_names") -> None:
    """Raises ValueError when names repeat or there are fewer than two."""
    distinct = len(set(names))
    if distinct < 2 or distinct != len(names):
        raise ValueError(
            f"{where} holds {len(names)} names, {distinct} distinct; give two or more, each once"
        )


def read_class_names(path: str, declared: Sequence[str]) -> tuple[list[str], list[str]]:
    """Class names from a text file, one a line: (names for the prompts, labels in the data).

    A line `label<TAB>name` calls the data's class `label` by `name`; classes without a line are no
    candidates. Lines without a tab are the data's own class names, or, when none of them is, as
    many as the data declares, in its order. Raises ValueError for anything else.
    """
    names, labels = _lines(path)
    if labels:
        return names, labels
    if set(names) & set(declared):
        return names, names
    if len(names) != len(declared):
        raise ValueError(
            f"class_names {path}: {len(names)} names, none a class of the data, which has "
            f"{len(declared)} ({', '.join(declared[:3])}, ..); give as many, or label<TAB>name"
        )
    return names, list(declared)


def _lines(path: str) -> tuple[list[str], list[str]]:
    """(names, labels) of the lines of a file; no labels where no line has a tab."""
    lines = [line.strip() for line in prompts.read_lines(path, f"class_names {path}")]
    lines = [line for line in lines if line]
    pairs = [line.split("\t") for line in lines if "\t" in line]
    if not pairs:
        return lines, []
    if len(pairs) != len(lines) or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"class_names {path}: every line needs one tab, label<TAB>name")
    return [name.strip() for _, name in pairs], [label.strip() for label, _ in pairs]
