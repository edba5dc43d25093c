"""Numbers and names as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from coca_jax.config.rules import is_number
from coca_jax.evaluators import declarations
from coca_jax.evaluators.declarations import Metric, Scale


def number(value: float) -> str:
    """About four significant digits, without exponents where a person needs none."""
    size = abs(value)
    if value == round(value) and size < 1e15:
        return f"{value:,.0f}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.001:
        return f"{value:.4g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Seconds as 3.2 s, 12 min 05 s or 7 h 30 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def metric_of(evaluator: str, name: str, values: Iterable[Any]) -> Metric:
    """What the evaluator declares of a metric, or for others what its name and its values say.

    values: all that are shown together, None for those that are not finite.
    """
    known = declarations.kinds().get(evaluator)
    if known is not None and name in known.metrics:
        return known.metrics[name]
    words = name.replace("_", " ")
    plain = "perplexity" in name or "rank" in name
    plain = plain or not all(0 <= value <= 1 for value in values if is_number(value))
    return Metric(words[:1].upper() + words[1:], Scale.PLAIN if plain else Scale.PERCENT)


def title_of(evaluator: str) -> str:
    """The evaluator's title, or its name where nothing declares it."""
    known = declarations.kinds().get(evaluator)
    return known.title if known is not None else evaluator


def score(metric: Metric, value: float | None) -> str:
    """A value in the metric's scale; a 'share' outside 0 to 1 is written as it is."""
    if value is None:
        return "not finite"
    if metric.scale is Scale.HUNDREDFOLD:
        return f"{100 * value:.1f}"
    if metric.scale is Scale.PERCENT and 0 <= value <= 1:
        return f"{100 * value:.1f}%"
    return number(value)


def factor(metric: Metric) -> float:
    """What a value is multiplied by on an axis, as `score` writes it."""
    return 1.0 if metric.scale is Scale.PLAIN else 100.0


def interval(metric: Metric, scores: Mapping[str, Any], name: str) -> str:
    """The 95% interval of a score, in the scale of that one; '' where it has none."""
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    if low is None or high is None:
        return ""
    sign = "%" if score(metric, scores.get(name)).endswith("%") else ""
    if sign or metric.scale is Scale.HUNDREDFOLD:
        first, last = f"{100 * low:.1f}", f"{100 * high:.1f}"
    else:
        first, last = number(low), number(high)
    return f"{first}\u2009\u2013\u2009{last}{sign}"


def split_name(name: str) -> tuple[str, str, str]:
    """(evaluator, data set, metric) of a score; ('', '', name) of anything else."""
    parts = name.split("/")
    return (parts[0], "/".join(parts[1:-1]), parts[-1]) if len(parts) >= 3 else ("", "", name)
