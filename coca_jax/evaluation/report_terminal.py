"""Formats the main scores of an evaluation as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coca_jax.evaluation import report_data
from coca_jax.runtime import text_tables

MOST_ROWS = 18
HEADER = ("", "score", "95% interval", "chance", "majority", "examples")


def score_table(found: Mapping[str, Any]) -> list[str]:
    """Returns lines with the headline scores of each task, their 95% intervals and two baselines:
    random guessing ('chance') and always predicting the most common answer ('majority').

    found: scores by name, as in eval.json; other entries are ignored.
    """
    tasks = {
        task: report_data.headline_metrics(task[0], metrics) or metrics[:1]
        for task, metrics in report_data.tasks_of(found).items()
    }
    if not tasks:
        return []
    rows = []
    if sum(1 + len(metrics) for metrics in tasks.values()) <= MOST_ROWS:
        for (evaluator, data), metrics in tasks.items():
            rows.append([f"{report_data.title_of(evaluator)}, {data}", *[""] * 5])
            rows += [_row(found, evaluator, data, metric, "  ") for metric in metrics]
    else:  # too long for a screen: one row per task
        for (evaluator, data), metrics in tasks.items():
            name = f"{report_data.title_of(evaluator)}, {data}: "
            rows.append(_row(found, evaluator, data, metrics[0], name))
    left = len(rows) - MOST_ROWS
    lines = text_tables.columns([HEADER, *rows[:MOST_ROWS]])
    return [*lines, f"and {left} more rows in eval.json"] if left > 0 else lines


def _row(found: Mapping[str, Any], evaluator: str, data: str, metric: str, name: str) -> list[str]:
    key = f"{evaluator}/{data}/{metric}"
    shown = report_data.metric_of(evaluator, metric, [found[key]])
    count = found.get(f"{key}_count")
    baselines = (found.get(f"{key}_{name}") for name in ("chance", "majority"))
    return [
        f"{name}{shown.title}",
        report_data.score(shown, found[key]),
        report_data.interval(shown, found, key).replace("\u2009\u2013\u2009", " to "),
        *("" if value is None else report_data.score(shown, value) for value in baselines),
        "" if count is None else f"{count:,.0f}",
    ]
