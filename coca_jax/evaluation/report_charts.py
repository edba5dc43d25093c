"""Training and evaluation curves for the report, drawn in the browser by uPlot (templates/uplot).

The data-chart attribute of a figure contains its curves as JSON; templates/charts.js draws it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from coca_jax.config.base import is_number
from coca_jax.evaluation import report_data
from coca_jax.evaluation.evaluators.base import Scale
from coca_jax.evaluation.report_data import RunFiles, headline_metrics, tasks_of

Points = list[tuple[float, float]]

POINTS = 900  # per curve: more than a screen shows, to allow zooming
COLOURS = 6
# Combinations of dash and width distinguish up to twelve runs.
DASHES = ((), (6, 4), (2, 3), (8, 3, 2, 3))
WIDTHS = (1.8, 3.4, 5)

TRAINING: tuple[tuple[str, str, tuple[str, ...]], ...] = (  # title, unit, keys of metrics.jsonl
    ("Loss", "nats", ("loss", "contrastive_loss", "captioning_loss", "head_loss", "*_loss")),
    ("Training accuracy of the task head", "share", ("head_accuracy",)),
    (
        "Loss by text type",
        "nats",
        (
            *("contrastive_loss/caption", "contrastive_loss/label"),
            *("captioning_loss/caption", "captioning_loss/label", "*_loss/*"),
        ),
    ),
    ("Learning rate", "rate", ("learning_rate",)),
    ("Throughput", "pairs/s", ("pairs_per_second",)),
    ("Goodput", "share of time spent in steps", ("goodput",)),
    ("Gradient norm", "norm", ("gradient_norm",)),
    ("Temperature", "temperature", ("temperature",)),
)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve. colour: 0 to COLOURS - 1, by metric; run: index, which selects dash and width."""

    name: str
    points: Points
    colour: int
    run: int = 0
    dots: bool = False


def training(runs: Sequence[RunFiles]) -> list[Markup]:
    """Charts of the training metrics, each with the curves of all runs."""
    charts = []
    logged = sorted({name for run in runs for name in run.logged.columns})
    for title, unit, keys in TRAINING:
        curves = []
        matched = (name for key in keys for name in logged if fnmatch.fnmatchcase(name, key))
        present = list(dict.fromkeys(matched))
        for index, run in enumerate(runs):
            for colour, key in enumerate(present):
                points = list(run.logged.points(key))
                if len(points) > 1:
                    name = key.replace("_", " ").replace("/", " \u00b7 ")
                    curves.append(_curve(name, thin(points), colour, index, runs))
        charts += [chart(title, unit, curves)] if curves else []
    return charts


def evaluations(runs: Sequence[RunFiles]) -> list[Markup]:
    """One chart per headline metric over the evaluations, with one curve per dataset and run."""
    charts: dict[tuple[str, str], list[Curve]] = {}
    for index, run in enumerate(runs):
        scores = {name: None for row in run.evaluations for name in row["scores"]}
        colours: dict[str, int] = {}
        for (evaluator, data), metrics in tasks_of(scores).items():
            colour = colours.setdefault(data, len(colours))
            for metric in headline_metrics(evaluator, metrics)[:2]:
                name = f"{evaluator}/{data}/{metric}"
                values = [(row["step"], row["scores"].get(name)) for row in run.evaluations]
                points = [(step, value) for step, value in values if is_number(value)]
                if len(points) > 1:
                    curve = _curve(data, thin(points), colour, index, runs, dots=True)
                    charts.setdefault((evaluator, metric), []).append(curve)
    found = []
    for (evaluator, metric), curves in charts.items():
        drawn = [value for curve in curves for _, value in curve.points]
        shown = report_data.metric_of(evaluator, metric, drawn)
        factor = report_data.factor(shown)
        scaled = [
            dataclasses.replace(
                curve, points=[(step, factor * value) for step, value in curve.points]
            )
            for curve in curves
        ]
        title = f"{report_data.title_of(evaluator)}: {shown.title}"
        unit = "%, " if shown.scale is Scale.PERCENT else ""
        better = "lower is better" if shown.lower else "higher is better"
        found.append(chart(title, unit + better, scaled))
    return found


def _curve(
    name: str, points: Points, colour: int, run: int, runs: Sequence[RunFiles], dots: bool = False
) -> Curve:
    if len(runs) > 1:
        name = f"{name} \u00b7 {runs[run].name}"
    return Curve(name, points, colour % COLOURS, run, dots)


def thin(points: Points, most: int = POINTS) -> Points:
    """Reduces a curve to at most `most` points by averaging neighbors."""
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def top(curves: Sequence[Curve]) -> float | None:
    """Upper end of the y axis if the first steps are outliers (a loss usually starts high), or None
    to show all values."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = sorted(y for curve in curves for _, y in curve.points)
    # Outliers: only the first 5% of the steps, and their maximum is 20 times the median.
    first_steps = min(xs) + 0.05 * (max(xs) - min(xs))
    rest = [y for curve in curves for x, y in curve.points if x > first_steps]
    middle = ys[len(ys) // 2]
    far = rest and 0 < middle <= ys[-1] / 20 and max(rest) < ys[-1]
    return max(rest) if far else None


def chart(title: str, unit: str, curves: Sequence[Curve]) -> Markup:
    """An HTML figure with its curves as JSON."""
    drawn: list[dict[str, Any]] = []
    for curve in curves:
        x, y = zip(*curve.points)
        drawn.append(
            dict(
                name=curve.name,
                x=[float(f"{value:.7g}") for value in x],
                y=[float(f"{value:.5g}") for value in y],
                colour=curve.colour,
                dash=DASHES[curve.run % len(DASHES)],
                width=WIDTHS[curve.run // len(DASHES) % len(WIDTHS)],
                dots=curve.dots,
            )
        )
    found = dict(unit=unit, top=top(curves), curves=drawn)
    data = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    return Markup(
        f'<figure class="card chart" data-chart="{escape(data)}">'
        f"<figcaption>{escape(title)}</figcaption>"
        f'<div role="img" aria-label="{escape(title)} by step"></div></figure>'
    )
