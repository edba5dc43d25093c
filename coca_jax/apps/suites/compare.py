"""Several models on the same suite: differences with their intervals, by a paired bootstrap."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from coca_jax.apps.suites import metrics
from coca_jax.runtime import bounded_json, storage


def compare(base: str, others: Sequence[str]) -> list[dict[str, Any]]:
    """A row a data set and other model: dict(data, metric, model, base, value, difference, low,
    high, examples), difference being the other's score less the base's with its 95% interval.

    base, others: folders that `evaluate --suite` wrote. Data sets that both have are compared.
    Raises FileNotFoundError for a folder without any, ValueError for other examples, damage and
    folders that have no data set in common.
    """
    mine, rows = _read(base), []
    for other in others:
        theirs = _read(other)
        if not mine.keys() & theirs.keys():
            raise ValueError(
                f"{base} and {other} have no data set in common: {_some(mine)} "
                f"in the one, {_some(theirs)} in the other; score both on the same --suite"
            )
        for key in sorted(mine.keys() & theirs.keys()):
            (metric, found), (_, another) = mine[key], theirs[key]
            if metric not in metrics.names(another):
                raise ValueError(f"{other}/suite/{key}.npz has no {metric}; score it anew")
            try:
                change, low, high = metrics.difference(metric, found, another)
            except ValueError as error:
                raise ValueError(f"{key} in {base} and {other}: {error}") from None
            value = metrics.value(metric, found)
            row = dict(data=key, metric=metric, model=other, base=value, value=value + change)
            row |= dict(difference=change, low=low, high=high, examples=metrics.count(found))
            rows.append(row)
    return rows


def left_out(base: str, others: Sequence[str]) -> list[str]:
    """A line for each folder that has data sets which the base lacks, or lacks some of the base's:
    they are not compared."""
    mine, lines = _read(base), []
    for other in others:
        theirs = _read(other)
        for one, rest in ((base, mine.keys() - theirs.keys()), (other, theirs.keys() - mine)):
            if rest:
                lines.append(f"{base} and {other}: {_some(rest)} only in {one}: not compared")
    return lines


def _some(names: Collection[str]) -> str:
    """The first of the data sets, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(sorted(names)[:5])}{more}"


def _read(out: str) -> dict[str, tuple[str, dict[str, np.ndarray]]]:
    """{data set: (the figure that counts, its outcome)} of a folder."""
    found = {}
    for file in sorted((storage.place(out) / "suite").glob("*.json")):
        try:
            metric = bounded_json.parse(file.read_bytes())["metric"]
            with file.with_suffix(".npz").open("rb") as handle, np.load(handle) as arrays:
                found[file.stem] = (metric, dict(arrays))
        except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            told = (
                f"{file} or the .npz beside it is damaged ({error}); remove both and score it anew"
            )
            raise ValueError(told) from None
    if not found:
        raise FileNotFoundError(f"{out}: no scores of a suite; run evaluate --suite there first")
    return found


def lines(rows: Sequence[dict[str, Any]], base: str) -> list[str]:
    """A table in Markdown. A difference whose interval holds 0 is in brackets."""
    table = [f"| data set | metric | {base} | model | score | difference | 95% |"]
    table.append("|---|---|---|---|---|---|---|")
    for row in rows:
        change = f"{row['difference']:+.4f}"
        if row["low"] <= 0 <= row["high"]:
            change = f"({change})"
        table.append(
            f"| {row['data']} | {row['metric']} | {row['base']:.4f} | {row['model']} | "
            f"{row['value']:.4f} | {change} | {row['low']:+.4f} to {row['high']:+.4f} |"
        )
    return table
