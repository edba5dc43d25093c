"""The map of an evaluation's pictures: where each stands on the drawing, and in the sheet of
thumbnails. Without a script it shows its dots; templates/maps.js adds the picture of the dot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MARGIN = 40  # around the places, which run from 0 to 1000
THUMBNAIL = 56  # units of the drawing a thumbnail is wide there


def placed(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """dict(width, height, dots, sheet, texts, share, right) of what `evaluators.picture_map` found;
    None where it found nothing.

    dots: dict(x, y, right, sheet_x, sheet_y, near) from the left to the right; near: the corner of
    its thumbnail on the drawing.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is damaged.
    """
    if not found:
        return None
    points, texts, right, size = found["points"], found["texts"], found["right"], found["size"]
    if not len(points) == len(texts) == len(right):
        raise ValueError(f"a map of {len(points)} points, {len(texts)} texts, {len(right)} marks")
    columns = found["columns"]
    if not all(isinstance(one, int) and 0 < one <= 4096 for one in (columns, size)):
        raise ValueError(f"a sheet of {columns!r} thumbnails a row, {size!r} pixels each")
    low, high = min(y for _, y in points), max(y for _, y in points)
    dots = []
    for number, (x, y) in enumerate(points):
        line, column = divmod(number, columns)
        # The drawing's y runs downwards.
        at = dict(x=MARGIN + x, y=MARGIN + high - y, right=bool(right[number]))
        half = THUMBNAIL // 2
        near = dict(near_x=at["x"] - half, near_y=at["y"] - half)
        sheet = dict(sheet_x=column * size, sheet_y=line * size)
        dots.append(at | near | sheet | dict(text=str(texts[number])))
    dots.sort(key=lambda dot: (dot["x"], dot["y"]))
    lines = -(-len(points) // columns)
    return dict(
        width=1000 + 2 * MARGIN,
        height=high - low + 2 * MARGIN,
        dots=dots,
        thumbnail=THUMBNAIL,
        size=size,
        sheet=str(found["sheet"]),
        sheet_width=columns * size,
        sheet_height=lines * size,
        share=[f"{share:.0%}" for share in found["share"]],
        right=sum(dot["right"] for dot in dots),
    )
