"""What a single value of a configuration may be: a test, and the words for it with their unit."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Rule(NamedTuple):
    """What a value may be: a test, and the words for it that follow 'give'."""

    holds: Callable[[Any], bool]
    words: str


def key(default: T, rule: Rule, meaning: str = "") -> T:
    """A field of a section: its default, what it may be, and what it means."""
    given: Any = dict(default_factory=dict) if default == {} else dict(default=default)
    return dataclasses.field(**given, metadata=dict(rule=rule, meaning=meaning))


def is_number(value: Any) -> bool:
    """A finite real number; no bool."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """A whole number; no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_mapping(value: Any) -> bool:
    """A mapping, or what is like one and no Mapping to Python, as a ConfigDict."""
    return isinstance(value, Mapping) or hasattr(value, "to_dict")


def is_sequence(value: Any) -> bool:
    """A tuple or list; no text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def whole(low: int, high: int, what: str = "", or_else: tuple[int, str] | None = None) -> Rule:
    """A whole number from low to high; or_else: another one, and what it stands for."""
    words = f"a whole number{f' of {what}' if what else ''}, {low:,} to {high:,}"
    if or_else:
        words += f", or {or_else[0]} ({or_else[1]})"
    others = (or_else[0],) if or_else else ()
    return Rule(lambda v: is_whole(v) and (low <= v <= high or v in others), words)


def number(
    low: float, high: float, what: str = "", above: bool = False, below: bool = False
) -> Rule:
    """A finite number from low to high; above, below: the end itself is not in the range."""
    ends = f"{'above ' if above else 'from '}{low:g} {'to below' if below else 'to'} {high:g}"
    return Rule(
        lambda v: (
            is_number(v) and (low < v if above else low <= v) and (v < high if below else v <= high)
        ),
        f"a number {ends}{f', {what}' if what else ''}",
    )


def choice(*values: str) -> Rule:
    """One of some names."""
    return Rule(lambda v: v in values, f"one of {', '.join(map(repr, values))}")


def several(rule: Rule, count: int | None = None) -> Rule:
    """A tuple of values of a kind."""
    return Rule(
        lambda v: is_sequence(v) and count in (None, len(v)) and all(map(rule.holds, v)),
        f"{'a tuple' if count is None else count}, each {rule.words}",
    )


def _stages(value: Any, one: Rule) -> bool:
    """((share of the steps, size), ...): shares above 0 that leave some for the size at the end,
    sizes as the rule `one` has them."""
    if not is_sequence(value) or not all(is_sequence(pair) and len(pair) == 2 for pair in value):
        return False
    shares = [share for share, _ in value]
    good = all(is_number(share) and share > 0 for share in shares)
    good = good and math.fsum(shares) <= 1 + 1e-9  # 0.8, 0.05, 0.05 and 0.1 are a bit more than 1
    return good and all(one.holds(size) for _, size in value)


def _entries(value: Any) -> bool:
    """Mappings whose weight and limit, where there are any, are numbers of use."""
    if not is_sequence(value) or not all(is_mapping(entry) for entry in value):
        return False
    plain = [entry.to_dict() if hasattr(entry, "to_dict") else entry for entry in value]
    weights = [entry.get("weight", 1.0) for entry in plain]
    limits = [entry.get("limit") or 1 for entry in plain]
    return all(is_number(w) and w > 0 for w in weights) and all(
        is_whole(limit) and limit > 0 for limit in limits
    )


FLAG = Rule(lambda v: isinstance(v, bool), "True or False")
TEXT = Rule(lambda v: isinstance(v, str), "a text")
TEXTS = several(TEXT)
MAPPING = Rule(is_mapping, "a dict")
MAPPINGS = Rule(lambda v: is_sequence(v) and all(map(is_mapping, v)), "a tuple of dicts")
SIZE = whole(1, 16_384, "pixels")
SIDES = Rule(
    lambda v: SIZE.holds(v) or (is_sequence(v) and len(v) == 2 and all(map(SIZE.holds, v))),
    f"{SIZE.words}, or a pair of them (height, width)",
)
WIDTH = whole(1, 65_536, "channels")
QUERIES = whole(1, 65_536, "queries")
HEADS = whole(1, 4096, "heads")
DEPTH = whole(1, 1024, "layers")
THETA = number(1, 1e7, "as 10000", above=True)
STEPS = whole(0, 1_000_000_000, "steps")
INTERVAL = whole(1, 1_000_000_000, "steps")
SHARE = number(0, 1, below=True)
WEIGHT = number(0, 1e6)
RATE = number(0, 1, "of the parameters' own size a step")
DEVICES = whole(1, 1 << 20, "devices", (-1, "those that are left"))
STAGES = Rule(
    lambda v: _stages(v, SIDES),
    "pairs (share of the steps, size in pixels), such as ((0.3, 128),), whose shares are above "
    "0 and add up to 1 at most",
)
EXAMPLES = whole(1, 1 << 24, "examples")
SEED = whole(0, (1 << 32) - 1)  # of JAX and SentencePiece, which have 32 bits for one
RAMP = Rule(
    lambda v: _stages(v, EXAMPLES),
    "pairs (share of the steps, batch size), such as ((0.2, 64),), whose shares are above 0 and "
    "add up to 1 at most",
)
SOURCES = Rule(
    _entries,
    "dicts, such as ({'path': 'data/mine', 'weight': 1.0},), weights and limits above 0",
)
RANDAUGMENT = Rule(
    lambda v: is_sequence(v) and len(v) == 2 and is_whole(v[0]) and 1 <= v[0] <= 16
    and is_number(v[1]) and 0 <= v[1] <= 30,
    "(operations 1 to 16, magnitude 0 to 30), such as (2, 10)",
)  # fmt: skip
SPAN = Rule(
    lambda v: (
        is_sequence(v) and len(v) in (0, 2) and all(map(INTERVAL.holds, v)) and v[:1] <= v[1:]
    ),
    "(first step, last step), from 1 on, or () for no profile",
)
