"""What the steps of a run logged, by columns: of millions of rows the dicts would be gigabytes."""

from __future__ import annotations

import array
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

from coca_jax.config.rules import is_number

_MISSING = math.nan


@dataclasses.dataclass
class Logged:
    """steps: of the rows, in their order; columns: {name: its numbers, NaN in a row without a
    finite one}, of each name in any row; last: the last row."""

    steps: array.array[float] = dataclasses.field(default_factory=lambda: array.array("d"))
    columns: dict[str, array.array[float]] = dataclasses.field(default_factory=dict)
    last: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> Logged:
        """rows: each with a 'step'."""
        found = cls()
        for count, row in enumerate(rows):
            found.steps.append(row["step"])
            for name, value in row.items():
                column = found.columns.get(name)
                if column is None:
                    column = found.columns[name] = array.array("d", [_MISSING]) * count
                column.append(value if is_number(value) else _MISSING)
            if len(row) < len(found.columns):
                for column in found.columns.values():
                    if len(column) == count:
                        column.append(_MISSING)
            found.last = row
        return found

    def __len__(self) -> int:
        return len(self.steps)

    def points(self, name: str) -> Iterator[tuple[float, float]]:
        """(step, number) of each row that has a finite one."""
        pairs = zip(self.steps, self.columns.get(name, ()))
        return (pair for pair in pairs if not math.isnan(pair[1]))

    def seconds(self) -> dict[str, float]:
        """The sums of all '*_seconds', by what stands before that; the longest first."""
        totals = {
            name.removesuffix("_seconds"): sum(value for _, value in self.points(name))
            for name in self.columns
            if name.endswith("_seconds")
        }
        positive = {name: seconds for name, seconds in totals.items() if seconds > 0}
        return dict(sorted(positive.items(), key=lambda item: -item[1]))
