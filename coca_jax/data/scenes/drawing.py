"""A scene as a picture: anti-aliased shapes, rasterised once and blended."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np

from coca_jax.data.scenes.world import (
    ANCHORS,
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    PLACES,
    RADIUS,
    SHAPES,
    SIZES,
    Draws,
)

_PATCH = 32
_MARGIN = 4  # canvas border that takes what an object near the edge overhangs
_VARIANTS = 12  # cached rotations, scales and texture phases of every shape


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns which points of the square [-1, 1]^2 (y down) lie in the shape."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r <= 0.9
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.8
    if shape == "triangle":
        return (y <= 0.72) & (abs(x) <= (y + 0.95) * 0.6)
    if shape == "star":
        angle = np.arctan2(x, -y)
        sector = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        # The edge runs from the tip (1, 0) to the notch at 36 degrees, radius 0.42.
        px, py = r * np.cos(sector), r * np.sin(sector)
        nx, ny = 0.42 * np.cos(np.pi / 5), 0.42 * np.sin(np.pi / 5)
        return (px - 1) * ny - py * (nx - 1) <= 0
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.95)
    if shape == "ring":
        return (r <= 0.97) & (r >= 0.45)
    if shape == "heart":
        u, v = x * 1.25, -y * 1.2 + 0.12
        return (u**2 + v**2 - 1) ** 3 - u**2 * v**3 <= 0
    if shape == "diamond":
        return abs(x) / 0.7 + abs(y) <= 1.0
    raise ValueError(f"shape is {shape!r}; use one of {', '.join(SHAPES)}")


@functools.cache
def _masks() -> dict[tuple[str, str, str], list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Returns, by (shape, size, texture), variants of (ink, white, cover), float32 [32, 32, 1].

    `cover` is the share of a pixel that the object hides: the pixel becomes background *
    (1 - cover) + colour * ink + 255 * white. Stripes are dark, dots are white.
    """
    rng = np.random.default_rng(2022)
    fine = 4
    grid = (np.arange(_PATCH * fine) + 0.5) / fine - _PATCH / 2  # pixels from the centre
    px, py = np.meshgrid(grid, grid)

    def shrink(a: np.ndarray) -> np.ndarray:
        a = a.reshape(_PATCH, fine, _PATCH, fine).mean((1, 3), dtype=np.float32)
        return a[:, :, None]

    masks: dict[tuple[str, str, str], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for shape, size in itertools.product(SHAPES, SIZES):
        for _ in range(_VARIANTS):
            angle = np.deg2rad(rng.uniform(-11, 11))
            radius = RADIUS[size] * rng.uniform(0.94, 1.06)
            x = (np.cos(angle) * px + np.sin(angle) * py) / radius
            y = (-np.sin(angle) * px + np.cos(angle) * py) / radius
            inside = _inside(shape, x, y)
            large = size == "large"
            period, pitch = (8.5, 6.0) if large else (6.5, 4.8)  # of stripes, of dots; pixels
            phase = rng.uniform(0, 1, 2)
            slant = ((px + py) / np.sqrt(2) + phase[0] * period) % period
            dots = np.hypot(*((p + f * pitch) % pitch - pitch / 2 for p, f in zip((px, py), phase)))
            # A plain rim keeps the outline on every background.
            core = _inside(shape, 1.18 * x, 1.18 * y) & inside
            striped, dotted = core & (slant < period / 2), core & (dots < 0.35 * pitch)
            none = np.zeros_like(inside)
            inks = dict(
                solid=(inside, none),
                striped=(inside * np.where(striped, 0.15, 1.0), none),
                dotted=(inside & ~dotted, dotted),
            )
            for texture, (ink, white) in inks.items():
                parts = (shrink(ink), shrink(white), shrink(inside))
                masks.setdefault((shape, size, texture), []).append(parts)
    return masks


@functools.cache
def _noise() -> np.ndarray:
    return np.random.default_rng(7).normal(0, 5, (192, 192, 3)).astype(np.float32)


SIDE = IMAGE_SIZE + 2 * _MARGIN  # of the canvas, pixels


def _placed(scene: dict[str, Any], draws: Draws) -> tuple[int, int, float, list[tuple]]:
    """Returns where the noise begins (row, column), a shade, and (object, masks, x, y, jitter of
    its colour) of each object, x and y on the canvas: all that is drawn by lot."""
    oy, ox = draws.below(192 - SIDE), draws.below(192 - SIDE)
    shade, found = (draws.uniform() - 0.5) * 24, []
    for o in scene["objects"]:
        masks = _masks()[o["shape"], o["size"], o["texture"]][draws.below(_VARIANTS)]
        x, y = ANCHORS[PLACES.index(o["place"])]
        x += draws.below(5) - 2 + _MARGIN - _PATCH // 2
        y += draws.below(5) - 2 + _MARGIN - _PATCH // 2
        found.append((o, masks, x, y, [draws.uniform() * 30 - 15 for _ in range(3)]))
    return oy, ox, shade, found


def boxes(scene: dict[str, Any], draws: Draws) -> list[tuple[float, float, float, float]]:
    """Returns (top, left, bottom, right) of each object in shares of the picture's side: the pixels
    that it covers by half at least. draws: as those of `render`."""
    found = []
    for _, (_, _, cover), x, y, _ in _placed(scene, draws)[3]:
        edges = []
        for start, axis in ((y, 1), (x, 0)):
            hit = np.flatnonzero(cover[:, :, 0].max(axis) >= 0.5) + start - _MARGIN
            edges.append(np.clip([hit[0], hit[-1] + 1], 0, IMAGE_SIZE) / IMAGE_SIZE)
        (top, bottom), (left, right) = (edge.tolist() for edge in edges)
        found.append((top, left, bottom, right))
    return found


def render(
    scene: dict[str, Any],
    draws: Draws,
    behind: np.ndarray | None = None,
    light: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the picture, uint8 [64, 64, 3].

    behind: what lies behind the objects, float32 [SIDE, SIDE, 3], in place of the scene's plain
    background; light: a factor of each channel, float32 [3] (see scenery.py).
    """
    noise = _noise()
    oy, ox, shade, objects = _placed(scene, draws)
    if behind is None:
        tone = np.asarray(BACKGROUNDS[scene["background"]], np.float32)
        canvas = noise[oy : oy + SIDE, ox : ox + SIDE] + (tone + shade)
    else:
        canvas = behind.copy()
    for o, (ink, white, cover), x, y, jitter in objects:
        colour = np.asarray(COLOURS[o["colour"]], np.float32) + np.asarray(jitter, np.float32)
        area = canvas[y : y + _PATCH, x : x + _PATCH]
        area *= 1 - cover
        area += ink * colour + 255 * white
        area += cover * noise[oy + y : oy + y + _PATCH, ox + x : ox + x + _PATCH]
    if light is not None:
        canvas = canvas * light
    inner = canvas[_MARGIN : _MARGIN + IMAGE_SIZE, _MARGIN : _MARGIN + IMAGE_SIZE]
    return np.clip(inner, 0, 255).astype(np.uint8)
