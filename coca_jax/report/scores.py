"""Scores for the page: a headline a task, and a table a task, as the evaluators declare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coca_jax.evaluators import declarations
from coca_jax.evaluators.declarations import Metric
from coca_jax.evaluators.intervals import COMPANIONS
from coca_jax.report import numbers
from coca_jax.report.run_files import RunFiles

Scores = Mapping[str, Any]
_COUNTED = "num_"  # metrics that say of how many things


def tasks_of(scores: Scores) -> dict[tuple[str, str], list[str]]:
    """{(evaluator, data set): its metrics}, in the order of the evaluators, then by data set."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in scores:
        evaluator, data, metric = numbers.split_name(name)
        if evaluator and not _is_companion(name, scores):
            found.setdefault((evaluator, data), []).append(metric)
    order = {kind: place for place, kind in enumerate(declarations.kinds())}
    by_place = sorted(found.items(), key=lambda item: (order.get(item[0][0], 99), item[0]))
    return {task: sorted(metrics, key=_metric_order(task[0])) for task, metrics in by_place}


def _is_companion(name: str, scores: Scores) -> bool:
    return any(name.endswith(s) and name.removesuffix(s) in scores for s in COMPANIONS)


def _metric_order(evaluator: str) -> Any:
    """Declared ones as declared, others by name, R@5 before R@10."""
    known = declarations.kinds().get(evaluator)
    declared = list(known.metrics) if known is not None else []

    def place(metric: str) -> tuple[int, str, int]:
        head = metric.rstrip("0123456789")
        number = int(metric[len(head) :] or 0)
        return declared.index(metric) if metric in declared else 99, head, number

    return place


def headlines(scores: Scores, metrics: Mapping[tuple[str, str], list[str]]) -> list[dict[str, Any]]:
    """A tile a task: its first headline large, with its interval, and the others small."""
    tiles = []
    for (evaluator, data), there in metrics.items():
        wanted = headline_metrics(evaluator, there)
        lines = [_line(scores, evaluator, data, metric) for metric in wanted]
        if lines:
            title = numbers.title_of(evaluator)
            tiles.append(dict(title=title, data=data, first=lines[0], rest=lines[1:3]))
    return tiles


def headline_metrics(evaluator: str, there: Sequence[str]) -> list[str]:
    """The evaluator's headlines that there are; of an unknown evaluator its first metric."""
    known = declarations.kinds().get(evaluator)
    if known is None:
        return [metric for metric in there if not metric.startswith(_COUNTED)][:1]
    return [metric for metric in known.headlines if metric in there]


def _line(scores: Scores, evaluator: str, data: str, metric: str) -> dict[str, Any]:
    name = f"{evaluator}/{data}/{metric}"
    shown = numbers.metric_of(evaluator, metric, [scores[name]])
    count = scores.get(f"{name}_count")
    return dict(
        title=shown.title,
        value=numbers.score(shown, scores[name]),
        interval=numbers.interval(shown, scores, name),
        chance=_baseline(shown, scores, f"{name}_chance"),
        majority=_baseline(shown, scores, f"{name}_majority"),
        count="" if count is None else f"{count:,.0f}",
        lower=shown.lower,
    )


def _baseline(shown: Metric, scores: Scores, name: str) -> str:
    """A companion of a score, as the score is written; '' where there is none."""
    value = scores.get(name)
    return "" if value is None else numbers.score(shown, value)


def tables(
    scores: Scores, metrics: Mapping[tuple[str, str], list[str]], run: RunFiles
) -> list[dict[str, Any]]:
    """A table a task: dict(title, data, rows, note). Scores of another step than the run's last one
    say so."""
    found = []
    for (evaluator, data), there in metrics.items():
        step = run.steps.get(f"{evaluator}/{data}", run.last_step)
        sizes = [
            f"{scores[f'{evaluator}/{data}/{metric}']:,.0f} {metric.removeprefix(_COUNTED)}"
            for metric in there
            if metric.startswith(_COUNTED) and scores[f"{evaluator}/{data}/{metric}"] is not None
        ]
        rows = [
            _line(scores, evaluator, data, metric)
            for metric in there
            if not metric.startswith(_COUNTED)
        ]
        title = numbers.title_of(evaluator)
        sizes += [f"after step {step:,}"] if step != run.last_step else []
        found.append(dict(title=title, data=data, rows=rows, note=", ".join(sizes)))
    return found


def side_by_side(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """A table a task with a column a run: dict(title, data, rows); the best of a row is marked."""
    together: dict[str, Any] = {}
    for run in runs:
        together |= run.scores
    found = []
    for (evaluator, data), there in tasks_of(together).items():
        rows = []
        for metric in there:
            if metric.startswith(_COUNTED):
                continue
            name = f"{evaluator}/{data}/{metric}"
            values = [run.scores.get(name) for run in runs]
            shown = numbers.metric_of(evaluator, metric, values)
            finite = [value for value in values if value is not None]
            best = None
            if len(set(finite)) > 1:
                best = min(finite) if shown.lower else max(finite)
            cells = [
                dict(
                    value=numbers.score(shown, value) if name in run.scores else "",
                    interval=numbers.interval(shown, run.scores, name),
                    best=value is not None and value == best,
                )
                for run, value in zip(runs, values)
            ]
            rows.append(dict(title=shown.title, lower=shown.lower, cells=cells))
        found.append(dict(title=numbers.title_of(evaluator), data=data, rows=rows))
    return found
