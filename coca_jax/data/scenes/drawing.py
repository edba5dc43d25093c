"""A scene as a picture: anti-aliased shapes, rasterised once and blended."""

from __future__ import annotations

import colorsys
import functools
import itertools
from typing import Any

import cv2
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


# What lies behind a scene beside the four plain backgrounds, and the light on it.
#
# 'varied' is for training: half of the scenes keep their plain background, the others stand before
# a colour, a slope between two colours, grain, clouds of two colours or stripes. 'unseen' is for
# evaluation: a colour, a slope, grain or a chess board, in colours and with grain that 'varied' never
# has. In both the light has a brightness and a colour of its own.


SCENERY = ("plain", "varied", "unseen")
PLAIN_SHARE = 0.5  # of 'varied'
KINDS = {
    "varied": ("colour", "slope", "grain", "clouds", "stripes"),
    "unseen": ("colour", "slope", "grain", "board"),
}
# Hues that 'unseen' alone has, as shares of the circle: brown, grass green, pale blue, lilac.
UNSEEN_HUES = ((0.04, 0.10), (0.27, 0.37), (0.53, 0.62), (0.72, 0.82))
GRAIN = {"varied": (6.0, 20.0), "unseen": (22.0, 30.0)}  # standard deviation, of 255
BRIGHTNESS = (0.8, 1.12)
CAST = 0.07  # of the light's colour, each way

Light = np.ndarray


def draw(kind: str, draws: Draws, side: int) -> tuple[np.ndarray | None, Light]:
    """(canvas float32 [side, side, 3], or None for the scene's own background; the light, a factor
    of each channel, float32 [3]).

    Raises ValueError for another kind than those of SCENERY.
    """
    if kind not in SCENERY:
        raise ValueError(f"scenery is {kind!r}; use one of {', '.join(SCENERY)}")
    low, high = BRIGHTNESS
    light = low + (high - low) * draws.uniform()
    cast = np.asarray([1 + CAST * (2 * draws.uniform() - 1) for _ in range(3)], np.float32)
    if kind == "varied" and draws.chance(PLAIN_SHARE):
        return None, light * cast
    return _canvas(kind, draws, side), light * cast


def hue(kind: str, draws: Draws) -> float:
    """A hue that the kind has; those of 'varied' and of 'unseen' share none."""
    if kind == "unseen":
        low, high = draws.choice(UNSEEN_HUES)
        return low + (high - low) * draws.uniform()
    while True:
        drawn = draws.uniform()
        if not any(low <= drawn <= high for low, high in UNSEEN_HUES):
            return drawn


def _colour(kind: str, draws: Draws) -> np.ndarray:
    """A colour paler or duller than those of objects, float32 [3]."""
    saturation, value = 0.12 + 0.38 * draws.uniform(), 0.35 + 0.6 * draws.uniform()
    return 255 * np.asarray(colorsys.hsv_to_rgb(hue(kind, draws), saturation, value), np.float32)


def _canvas(kind: str, draws: Draws, side: int) -> np.ndarray:
    what, tone = draws.choice(KINDS[kind]), _colour(kind, draws)
    canvas = np.broadcast_to(tone, (side, side, 3)).astype(np.float32)
    if what == "colour":
        return canvas
    if what == "grain":
        low, high = GRAIN[kind]
        spread = low + (high - low) * draws.uniform()
        return canvas + spread * _normal(draws, (side, side, 3))
    share = _share(what, draws, side)[..., None]
    return canvas * share + _colour(kind, draws) * (1 - share)


def _normal(draws: Draws, shape: tuple[int, ...]) -> np.ndarray:
    seed = int(draws.uniform() * 2**32)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _share(what: str, draws: Draws, side: int) -> np.ndarray:
    """How much of the first of two colours each place has, float32 [side, side] in [0, 1]."""
    rows, columns = np.mgrid[:side, :side].astype(np.float32) / side - 0.5
    if what == "board":
        fields = 4 + draws.below(5)
        odd: np.ndarray = (np.floor(rows * fields) + np.floor(columns * fields)) % 2
        return odd
    if what == "clouds":
        cells = 3 + draws.below(10)
        rough = _normal(draws, (cells, cells))
        smooth: np.ndarray = cv2.resize(rough, (side, side), interpolation=cv2.INTER_CUBIC)
        return np.clip(0.5 + smooth, 0, 1)
    angle = 2 * np.pi * draws.uniform()
    along = np.cos(angle) * rows + np.sin(angle) * columns
    if what == "slope":
        return np.clip(0.5 + along, 0, 1)
    wave = np.sin(2 * np.pi * (2 + 6 * draws.uniform()) * along)
    # Between a wave and a hard edge.
    return np.clip(0.5 + (0.5 + 4 * draws.uniform()) * wave, 0, 1)
