"""What became of figures that were measured again: before, after, and which of them got worse.

    python benchmarks/figures.py changes

A row that is measured again keeps what it had in `before`, with commit and date. A value is worse
when it lies beyond the interval that it had, or, having none, by more than its measurement's slack
(3% where nothing else is said) on the wrong side. Several seeds or runs count by their mean, and
their range is their interval. A row may have a `reason`, written by hand, why it is as it is.
"""

from __future__ import annotations

import fnmatch
import re
import statistics
from typing import Any

from measuring import Measurement

EACH = re.compile(r"(seed|run)_\d+$")  # keys of several values of one thing
Row = dict[str, Any]
Values = dict[str, float]


def means(values: Values) -> Values:
    """Seeds or runs as their mean and range, all else as it is."""
    each = [value for key, value in values.items() if EACH.match(key)]
    if len(each) < 2:
        return values
    rest = {key: value for key, value in values.items() if not EACH.match(key)}
    return dict(mean=statistics.mean(each), mean_low=min(each), mean_high=max(each)) | rest


def direction(one: Measurement, name: str) -> int:
    """1 where more is better, -1 where less is, 0 where it is neither; name: row:key."""
    key = name.partition(":")[2]
    for sign, patterns in ((1, one.higher), (-1, one.lower)):
        if any(fnmatch.fnmatch(key, p) or fnmatch.fnmatch(name, p) for p in patterns):
            return sign
    return 0


def worse(before: Values, after: Values, key: str, sign: int, slack: float) -> bool:
    """Whether a value is beyond its old interval, or its slack, on the wrong side."""
    ends = ("low", "high") if key == "value" else (f"{key}_low", f"{key}_high")
    worst = before.get(ends[0] if sign > 0 else ends[1])
    if worst is None:
        worst = before[key] - sign * slack * abs(before[key])
    return sign * (worst - after[key]) > 0


def compared(rows: dict[str, Row], of_row: Any) -> list[tuple[str, str, str, str, str]]:
    """(row:key, before, after, change, mark) of every value that was measured again; of_row: the
    measurement of a row. The mark is '', 'worse', or 'worse: ' and its reason."""
    found = []
    for name, row in rows.items():
        if "before" not in row:
            continue
        old, new = means(row["before"]["values"]), means(row["values"])
        for key, value in new.items():
            if key not in old or re.search(r"(^|_)(low|high)$", key):
                continue
            one = of_row(name)
            sign = direction(one, f"{name}:{key}")
            mark = ""
            if sign and worse(old, new, key, sign, one.slack):
                mark = f"worse: {row['reason']}" if "reason" in row else "worse"
            change = f"{value / old[key] - 1:+.1%}" if old[key] else ""
            found.append((f"{name}:{key}", f"{old[key]:.4g}", f"{value:.4g}", change, mark))
    return found


def table(found: list[tuple[str, str, str, str, str]]) -> str:
    """The same as Markdown, and a line that counts."""
    head = ["| figure | before | after | change | |", "|---|---|---|---|---|"]
    lines = [f"| {' | '.join(line)} |" for line in found]
    marks = [mark for *_, mark in found if mark]
    unsaid = sum(mark == "worse" for mark in marks)
    count = (
        f"{len(found)} values measured again, {len(marks)} worse, {unsaid} of them without a reason"
    )
    return "\n".join([*head, *lines, "", count])
