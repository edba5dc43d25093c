"""The page of an ablation: a row a variant, and each metric drawn with its seeds."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coca_jax.evaluation import report, report_charts, report_data
from coca_jax.evaluation.evaluators.base import Metric, Scale
from coca_jax.runtime import storage

TRAIN = "train"  # where evaluators have their name, of the losses in training


def rows(found: Mapping[str, Any], shown: Sequence[str]) -> list[dict[str, Any]]:
    """dict(name, counts, cells) a variant of results.json: runs, steps and minutes as texts, and
    dict(value, interval) of each metric of `shown`."""
    about = {metric: metric_of(metric, found) for metric in shown}
    return [
        dict(
            name=name,
            counts=[
                str(len(one["runs"])),
                _range([run["steps"] for run in one["runs"].values()], "{:,.0f}".format),
                _range([run["minutes"] for run in one["runs"].values()], _two_digits),
            ],
            cells=[_cell(about[metric], one["metrics"].get(metric)) for metric in shown],
        )
        for name, one in found["variants"].items()
    ]


def metric_of(name: str, found: Mapping[str, Any]) -> Metric:
    """What is known of a metric of results.json by its full name; losses of training are no
    shares."""
    evaluator, _, metric = report_data.split_name(name)
    if evaluator == TRAIN:
        return Metric(metric.replace("_", " "), Scale.PLAIN, lower=True)
    values = (one["metrics"].get(name, {}).get("values", {}) for one in found["variants"].values())
    return report_data.metric_of(evaluator, metric, [v for there in values for v in there.values()])


def _two_digits(minutes: float) -> str:
    """At least two that say something."""
    return f"{minutes:.2g}" if minutes < 99 else f"{minutes:,.0f}"


def _range(values: Sequence[float], form: Callable[[float], str]) -> str:
    if not values:
        return "-"
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def _cell(shown: Metric, found: Mapping[str, Any] | None) -> dict[str, str]:
    if found is None or found["mean"] is None:
        return dict(value="", interval="")
    interval = ""
    low, high = limits(shown, found)
    if low is not None and high is not None:
        form = ".4g" if shown.scale is Scale.PLAIN else ".1f"
        interval = f"({low:{form}} to {high:{form}})"
    return dict(value=report_data.score(shown, found["mean"]), interval=interval)


def limits(shown: Metric, found: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The interval of a metric as it is shown, (None, None) without one. Student's does not know
    that a share lies between 0 and 100%, and is cut there."""
    low, high, factor = found["low"], found["high"], report_data.factor(shown)
    if low is None or high is None:
        return None, None
    if shown.scale is Scale.PERCENT and 0 <= found["mean"] <= 1:
        low, high = max(low, 0.0), min(high, 1.0)
    return factor * low, factor * high


def write(found: Mapping[str, Any], shown: Sequence[str], path: pathlib.Path) -> None:
    """Writes the page of results.json."""
    figures = []
    for name in shown:
        evaluator, data, _ = report_data.split_name(name)
        about = metric_of(name, found)
        factor, unit = report_data.factor(about), "%, " if about.scale is Scale.PERCENT else ""
        lines = [
            report_charts.Spread(
                variant,
                [factor * value for value in one["metrics"][name]["values"].values()],
                *limits(about, one["metrics"][name]),
            )
            for variant, one in found["variants"].items()
            if one["metrics"].get(name, {}).get("values")
        ]
        if lines:
            better = "lower is better" if about.lower else "higher is better"
            title = f"{report_data.title_of(evaluator)}: {about.title} \u00b7 {data}"
            figures.append(report_charts.spread(title, unit + better, lines))
    context = dict(
        title=path.parent.name, shown=shown, rows=rows(found, shown), figures=figures, found=found
    )
    storage.write_text(path, report.render_page("ablation.html", context))
