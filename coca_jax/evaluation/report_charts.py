"""Curves over steps as inline SVG.

They are drawn here and by no chart library: the page then shows its curves without running a
script (a mail's preview, a print), tests can read them, and 300 points a curve weigh less than
the smallest library. The page's script (templates/charts.js) adds the values under the pointer,
and zooms into up to 900 points a curve.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from coca_jax.config.fields import is_number
from coca_jax.evaluation import report_data
from coca_jax.evaluation.evaluators.base import Scale
from coca_jax.evaluation.report_data import RunFiles, headline_metrics, tasks_of

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 10, 44  # margins
POINTS = 300  # of a curve as it is drawn; more would only weigh
FINE = 900  # of a curve that is zoomed into
COLOURS = 6
DASHES, WEIGHTS = 4, 3  # of lines: one of each a run, so that twelve runs look different
ROW = 34  # pixels of a row of `spread`

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
    """colour: 0 to COLOURS - 1, of a metric; run: 0, 1, .., which gives its line, see `line_of`."""

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
                    curves.append(_curve(name, thin(points, FINE), colour, place, runs))
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
                    curve = _curve(data, thin(points, FINE), colour, place, runs, dots=True)
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


def line_of(run: int) -> str:
    """The classes of style.css of the lines of a run: 0, 1, .."""
    return f"d{run % DASHES} w{run // DASHES % WEIGHTS}"


def thin(points: Points, most: int = POINTS) -> Points:
    """At most `most` points, means over neighbours."""
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= min((1, 2, 5, 10), key=lambda m: abs((high - low) / (m * step) - count))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where data lie on the drawing: x from x0 to x1, y from y0 to y1."""

    x0: float
    x1: float
    y0: float
    y1: float

    @classmethod
    def around(cls, curves: Sequence[Curve]) -> Frame:
        """The frame that shows the curves; the first steps, far off the rest, may be cut."""
        xs = [x for curve in curves for x, _ in curve.points]
        ys = sorted(y for curve in curves for _, y in curve.points)
        y1 = ys[-1]
        # The first steps of a loss can be far off the rest: then the axis ends at the highest of
        # the others, unless it is the rest that has grown.
        begin = min(xs) + 0.05 * (max(xs) - min(xs))
        rest = [y for curve in curves for x, y in curve.points if x > begin]
        if rest and ys[len(ys) // 2] > 0 and y1 >= 20 * ys[len(ys) // 2]:
            y1 = max(rest)
        y0 = 0.0 if ys[0] >= 0 and ys[0] < 0.5 * y1 else ys[0]
        if y1 - y0 < 1e-9 * max(1.0, abs(y1)):
            y0, y1 = (y0 - 0.5 * abs(y0), y1 + 0.5 * abs(y1)) if y1 else (0.0, 1.0)
        return cls(min(xs), max(xs), y0, y1 + 0.04 * (y1 - y0))

    def px(self, x: float) -> float:
        """Pixels from the left."""
        return LEFT + (x - self.x0) / max(self.x1 - self.x0, 1e-12) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        """Pixels from the top."""
        share = (min(y, self.y1) - self.y0) / (self.y1 - self.y0)
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    def axes(self, unit: str, across: str) -> list[str]:
        """Grid, numbers and the titles of both axes."""
        parts = ['<g class="ty">']
        for y in ticks(self.y0, self.y1):
            at = self.py(y)
            parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" ')
            parts.append(f'y2="{at:.1f}"/><text x="{LEFT - 8}" y="{at + 4:.1f}" ')
            parts.append(f'text-anchor="end">{report_data.number(y)}</text>')
        parts.append('</g><g class="tx">')
        for x in ticks(self.x0, self.x1) if self.x1 > self.x0 else [self.x0]:
            parts.append(f'<text x="{self.px(x):.1f}" y="{HEIGHT - BOTTOM + 18}" ')
            parts.append(f'text-anchor="middle">{report_data.number(x)}</text>')
        parts.append("</g>")
        middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        parts.append(f'<text class="axis" x="{middle[0]}" y="{HEIGHT - 6}" ')
        parts.append(f'text-anchor="middle">{escape(across)}</text>')
        parts.append(f'<text class="axis" transform="translate(12,{middle[1]}) rotate(-90)" ')
        parts.append(f'text-anchor="middle">{escape(unit)}</text>')
        return parts


# Shown by the script, without which they would do nothing.
_BUTTONS = "".join(
    f'<button type="button" hidden data-zoom="{name}" title="{what}" aria-label="{what}">{sign}'
    "</button>"
    for name, what, sign in (
        ("in", "Zoom in", "+"),
        ("out", "Zoom out", "\u2212"),
        ("left", "Earlier", "\u2039"),
        ("right", "Later", "\u203a"),
    )
)


def chart(title: str, unit: str, curves: Sequence[Curve], across: str = "step") -> Markup:
    """A figure with its axes, curves and legend, and the points that the script reads."""
    frame = Frame.around(curves)
    parts, legend, data = frame.axes(unit, across), [], []
    for curve in curves:
        kind = f"s{curve.colour} {line_of(curve.run)}"
        places = [(frame.px(x), frame.py(y)) for x, y in thin(curve.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="c {kind}" points="{path}"/>')
        if curve.dots:
            for x, y in places:
                parts.append(f'<circle class="p {kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        key = f'<svg class="k" viewBox="0 0 22 8"><path class="c {kind}" d="M0 4H22"/></svg>'
        legend.append(f"<span>{key}{escape(curve.name)} <b></b></span>")
        data.append([[float(f"{x:.7g}"), float(f"{y:.5g}")] for x, y in curve.points])
    cursor = f'<rect class="cursor" y="{TOP}" height="{HEIGHT - TOP - BOTTOM}" x="-9" width="1"/>'
    points = escape(json.dumps(data, separators=(",", ":")))
    return Markup(
        f'<figure class="card chart" data-points="{points}" data-across="{escape(across)}">'
        f"<figcaption>{escape(title)}<em></em>{_BUTTONS}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)} by {escape(across)}">{"".join(parts)}{cursor}</svg>'
        f'<div class="legend">{"".join(legend)}</div></figure>'
    )


@dataclasses.dataclass(frozen=True)
class Spread:
    """A row of `spread`: values, a dot each, and the interval of their mean where there is one."""

    name: str
    values: Sequence[float]
    low: float | None = None
    high: float | None = None


def spread(title: str, across: str, rows: Sequence[Spread]) -> Markup:
    """A figure with a row of dots for each of `rows`, and its interval as a bar behind them."""
    ends = [x for row in rows for x in (*row.values, row.low, row.high) if x is not None]
    frame = Frame.around([Curve("", [(x, 0.0) for x in (min(ends), max(ends))], 0)])
    height = TOP + BOTTOM + ROW * len(rows)
    parts = []
    for x in ticks(frame.x0, frame.x1) if frame.x1 > frame.x0 else [frame.x0]:
        at = f"{frame.px(x):.1f}"
        parts.append(f'<line class="g" x1="{at}" x2="{at}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{at}" y="{height - BOTTOM + 18}" ')
        parts.append(f'text-anchor="middle">{report_data.number(x)}</text>')
    for place, row in enumerate(rows):
        y, kind = TOP + ROW * (place + 0.65), f"s{place % COLOURS}"
        parts.append(f'<text x="{LEFT}" y="{y - 9:.1f}">{escape(row.name)}</text>')
        if row.low is not None and row.high is not None:
            x0, x1 = frame.px(row.low), frame.px(row.high)
            parts.append(f'<line class="c {kind}" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y}" y2="{y}"/>')
        for value in row.values:
            parts.append(f'<circle class="p {kind}" cx="{frame.px(value):.1f}" cy="{y}" r="4"/>')
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 6}" ')
    parts.append(f'text-anchor="middle">{escape(across)}</text>')
    return Markup(
        f'<figure class="card spread"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )
