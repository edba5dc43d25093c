"""What lies behind a scene beside the four plain backgrounds, and the light on it.

'varied' is for training: half of the scenes keep their plain background, the others stand before
a colour, a slope between two colours, grain, clouds of two colours or stripes. 'unseen' is for
evaluation: a colour, a slope, grain or a chess board, in colours and with grain that 'varied' never
has. In both the light has a brightness and a colour of its own.
"""

from __future__ import annotations

import colorsys

import cv2
import numpy as np

from coca_jax.data.scenes.world import Draws

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
