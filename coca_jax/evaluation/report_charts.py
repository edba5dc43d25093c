"""Curves over steps for the report, drawn in the browser by uPlot (MIT; templates/uplot).

A chart is a figure whose data-chart attribute holds its curves; templates/charts.js draws it.
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

POINTS = 900  # of a curve: more than a screen shows, so that it can be zoomed into
COLOURS = 6
DASHES = ((), (6, 4), (2, 3), (8, 3, 2, 3))  # one of each a run, with the widths, so that
WIDTHS = (1.8, 3.4, 5)  # twelve runs look different

TRAINING: tuple[tuple[str, str, tuple[str, ...]], ...] = (  # title, unit, keys of metrics.jsonl
    ("Loss", "nats", ("loss", "contrastive_loss", "captioning_loss", "head_loss", "*_loss")),
    ("Accuracy of the task head in training", "share", ("head_accuracy",)),
    (
        "Loss by kind of text",
        "nats",
        (
            *("contrastive_loss/caption", "contrastive_loss/label"),
            *("captioning_loss/caption", "captioning_loss/label", "*_loss/*"),
        ),
    ),
    ("Learning rate", "rate", ("learning_rate",)),
    ("Throughput", "pairs/s", ("pairs_per_second",)),
    ("Goodput", "share of the time that went to steps", ("goodput",)),
    ("Gradient norm", "norm", ("gradient_norm",)),
    ("Temperature", "temperature", ("temperature",)),
)


@dataclasses.dataclass(frozen=True)
class Curve:
    """colour: 0 to COLOURS - 1, of a metric; run: 0, 1, .., which gives its dashes and width."""

    name: str
    points: Points
    colour: int
    run: int = 0
    dots: bool = False


def training(runs: Sequence[RunFiles]) -> list[Markup]:
    """Charts of what the steps logged, with the curves of all runs."""
    charts = []
    logged = sorted({name for run in runs for name in run.logged.columns})
    for title, unit, keys in TRAINING:
        curves = []
        matched = (name for key in keys for name in logged if fnmatch.fnmatchcase(name, key))
        there = list(dict.fromkeys(matched))
        for place, run in enumerate(runs):
            for colour, key in enumerate(there):
                points = list(run.logged.points(key))
                if len(points) > 1:
                    name = key.replace("_", " ").replace("/", " \u00b7 ")
                    curves.append(_curve(name, thin(points), colour, place, runs))
        charts += [chart(title, unit, curves)] if curves else []
    return charts


def evaluations(runs: Sequence[RunFiles]) -> list[Markup]:
    """A chart a headline metric, over the evaluations of a run: a curve a data set."""
    charts: dict[tuple[str, str], list[Curve]] = {}
    for place, run in enumerate(runs):
        scores = {name: None for row in run.evaluations for name in row["scores"]}
        colours: dict[str, int] = {}
        for (evaluator, data), there in tasks_of(scores).items():
            colour = colours.setdefault(data, len(colours))
            for metric in headline_metrics(evaluator, there)[:2]:
                name = f"{evaluator}/{data}/{metric}"
                values = [(row["step"], row["scores"].get(name)) for row in run.evaluations]
                points = [(step, value) for step, value in values if is_number(value)]
                if len(points) > 1:
                    curve = _curve(data, thin(points), colour, place, runs, dots=True)
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
    """At most `most` points, means over neighbours."""
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def top(curves: Sequence[Curve]) -> float | None:
    """Where the vertical axis of a whole chart ends if its first steps, as of a loss, are far off
    the rest; None to show all."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = sorted(y for curve in curves for _, y in curve.points)
    begin = min(xs) + 0.05 * (max(xs) - min(xs))
    rest = [y for curve in curves for x, y in curve.points if x > begin]
    middle = ys[len(ys) // 2]
    far = rest and 0 < middle <= ys[-1] / 20 and max(rest) < ys[-1]
    return max(rest) if far else None


def chart(title: str, unit: str, curves: Sequence[Curve]) -> Markup:
    """A figure with its curves as JSON."""
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
