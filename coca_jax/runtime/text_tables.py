"""Tables and lists for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST_FIELDS = 20


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right. A column whose
    cells below the first row, its header, are all empty is left out."""
    used = [i for i in range(len(rows[0])) if not i or any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    return [
        "  ".join(row[i].rjust(widths[i]) if i else row[i].ljust(widths[i]) for i in used).rstrip()
        for row in rows
    ]


def fields(result: Mapping[str, Any]) -> list[str]:
    """A result's single values as lines, 'name  value'; lists and groups are left out."""
    plain = {
        key.replace("_", " "): f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else str(value)
        for key, value in result.items()
        if isinstance(value, (str, int, float)) and value != ""
    }
    width = max(map(len, plain), default=0)
    return [f"{key:{width}s}  {value}" for key, value in plain.items()][:MOST_FIELDS]


def next_commands(*commands: str) -> list[str]:
    """Commands that may follow, to paste into a shell."""
    return ["next:", *(f"  {one}" for one in commands)]
