"""Figures in Markdown: a mark names rows of docs/results.json, the numbers behind it are theirs.

    | zero-shot <!-- = demo/zero_shot --> | 98.9% | 98.5 to 99.4 |
    It took <!-- = demo/whole:minutes --> 8 minutes.

`demo/zero_shot` stands for all values of that row in their order, `demo/zero_shot:value,high` for
these; `min`, `max` and `mean` are of all, and `_` leaves a number as it is. Several rows may follow
one another. In a table a mark governs every number behind it in its line, in prose as many as it
has values. How a number is written (its decimals, commas, a sign) stays as it stands in the page.
Digits that belong to a word (R@1, v4, float32) are no numbers.
"""

from __future__ import annotations

import re
import statistics
from typing import Any

OVER = {"min": min, "max": max, "mean": statistics.mean}
MARK = re.compile(r"<!-- = (?P<names>[^>]+?) -->")
NUMBER = re.compile(
    r"(?<![\w@.-])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?![\w@-]|\.\d|,\d{3})"
)


def value(number: str) -> float:
    """'1,911' is 1911."""
    return float(number.replace(",", ""))


def shown(new: float, like: str) -> str:
    """The number as the one that stands there is written. Raises nothing: any number can be."""
    digits = like.lstrip("+-")
    if "e" in digits:
        mantissa, exponent = f"{new:.{decimals(digits.split('e')[0])}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    text = f"{abs(new):,.{decimals(digits)}f}"
    if "," not in digits and len(digits.split(".")[0]) > 3:
        text = text.replace(",", "")
    if digits.startswith("."):
        text = text.removeprefix("0")
    sign = "-" if new < 0 else "+" * like.startswith("+")
    return sign + text


def decimals(digits: str) -> int:
    return len(digits.partition(".")[2])


def picked(names: str, rows: dict[str, dict[str, Any]]) -> list[float | None]:
    """The values that a mark asks for, None for `_`. Raises ValueError for a row or a value that
    there is not."""
    found: list[float | None] = []
    for part in names.split():
        name, _, keys = part.partition(":")
        if name not in rows:
            raise ValueError(f"docs/results.json has no row {name!r}: measure it or mend the mark")
        values = rows[name]["values"]
        for key in keys.split(",") if keys else values:
            if key == "_":
                found.append(None)
            elif key in values:
                found.append(values[key])
            elif key in OVER:
                found.append(OVER[key](values.values()))
            else:
                raise ValueError(f"row {name!r} has no value {key!r}, only {', '.join(values)}")
    return found


def filled(text: str, rows: dict[str, dict[str, Any]]) -> str:
    """The page with the numbers behind its marks as the rows have them.

    Raises ValueError where a mark has more or fewer values than numbers stand behind it.
    """
    made, at = [], 0
    for mark in MARK.finditer(text):
        line = text[text.rfind("\n", 0, mark.start()) + 1 : mark.start()]
        values = picked(mark["names"], rows)
        ends = text.find("\n", mark.end()) if line.startswith("|") else len(text)
        numbers = list(NUMBER.finditer(text, mark.end(), ends))
        if not line.startswith("|"):
            numbers = numbers[: len(values)]
        if len(numbers) != len(values):
            raise ValueError(
                f"{mark[0]} has {len(values)} values, and {len(numbers)} numbers stand behind it"
            )
        for number, new in zip(numbers, values, strict=True):
            put = number[0] if new is None else shown(new, number[0])
            made += [text[at : number.start()], put]
            at = number.end()
    return "".join([*made, text[at:]])


def named(text: str) -> set[str]:
    """The rows that a page shows."""
    parts = [part for mark in MARK.finditer(text) for part in mark["names"].split()]
    return {part.partition(":")[0] for part in parts}
