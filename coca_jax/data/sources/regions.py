"""Places in images as text: boxes as numbers that a captioner reads and writes (LocCa, Wan et al.
2024).

A box is (top, left, bottom, right) in shares of the image's height and width. As text it is four
numbers of two digits, hundredths: '12 08 30 27'. Two digits each, so that vocabularies which take
digits apart can be read as well. A region trains in one of two forms: 'find a red circle: 12 08 30
27', the place of what is named, and 'at 12 08 30 27: a red circle', what is at a place.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

LEVELS = 100
FIELD = "regions"
Box = tuple[float, float, float, float]


class Region(NamedTuple):
    """text: what is there. box: where."""

    text: str
    box: Box


def regions_of(extra: str) -> list[Region]:
    """The regions of a record's `extra`, JSON whose field `regions` lists {"text", "box"}; [] where
    it has none. Raises ValueError naming the first that is none."""
    if FIELD not in extra:
        return []
    given = json.loads(extra).get(FIELD) or []
    return [_region(one) for one in given] if isinstance(given, list) else [_region(given)]


def _region(one: Any) -> Region:
    text, box = (one.get("text"), one.get("box")) if isinstance(one, dict) else (None, None)
    if isinstance(text, str) and text.strip() and isinstance(box, list) and len(box) == 4:
        if all(isinstance(n, (int, float)) and 0 <= n <= 1 for n in box):
            top, left, bottom, right = map(float, box)
            if top < bottom and left < right:
                return Region(text.strip(), (top, left, bottom, right))
    raise ValueError(
        f"regions: {str(one)[:100]} is none; give {{'text': ..., 'box': [top, left, bottom, "
        "right]}, shares of height and width from 0 to 1"
    )


def numbers(box: Box) -> str:
    """A box as text."""
    # 0.29 * 100 is 28.999999999999996
    return " ".join(f"{min(int(share * LEVELS + 1e-9), LEVELS - 1):02d}" for share in box)


def read(text: str) -> Box | None:
    """The box that a text begins with, to the middle of hundredths; None where it does not, or
    where an edge lies before the opposite one. Two edges of one number are that hundredth's own:
    so are boxes written that lie within one."""
    digits = re.match(r"\D{0,3}(?:\d\D{0,3}){7}\d", text)
    if not digits:
        return None
    found = re.sub(r"\D", "", digits[0])
    places = [int(found[i : i + 2]) for i in range(0, 8, 2)]
    (top, bottom), (left, right) = _edges(*places[::2]), _edges(*places[1::2])
    return (top, left, bottom, right) if top < bottom and left < right else None


def _edges(low: int, high: int) -> tuple[float, float]:
    if low == high:
        return low / LEVELS, (low + 1) / LEVELS
    return (low + 0.5) / LEVELS, (high + 0.5) / LEVELS


def find(text: str) -> str:
    """How a text begins that goes on with the place of what is named."""
    return f"find {text}:"


def at(box: Box) -> str:
    """How a text begins that goes on with what is at a place."""
    return f"at {numbers(box)}:"


def forms(region: Region) -> tuple[str, str]:
    """A region's two texts."""
    return f"{find(region.text)} {numbers(region.box)}", f"{at(region.box)} {region.text}"


def overlap(one: Box, other: Box) -> float:
    """Intersection of two boxes over their union."""
    height = min(one[2], other[2]) - max(one[0], other[0])
    width = min(one[3], other[3]) - max(one[1], other[1])
    both = max(height, 0.0) * max(width, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return both / (areas - both)
