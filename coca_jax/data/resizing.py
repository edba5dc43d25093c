"""How an image comes to the model's size where it is not augmented: data.resize. PIL, numpy and
OpenCV; no TensorFlow.

'trim' is for drawings: those who draw icons, emoji, stickers or clip art leave more or less room
around the same thing, and a model that has learned it in one size would have to find it in another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image

from coca_jax import image_shape
from coca_jax.image_shape import Size

FILL = 0.95  # of a side that 'trim' leaves to what an image shows
PLAIN = 12  # levels by which a margin may differ from its colour, as a JPEG's does

Resize = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


def bilinear(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] to (height, width), antialiased: a triangle as wide as their pixels."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BILINEAR))


def preprocess_eval(image: np.ndarray, size: Size, mode: str = "squash") -> np.ndarray:
    """The resizing of evaluation, antialiased.

    Args:
        image: uint8 [h, w, 3].
        size: S x T, height and width of the result.
        mode: 'squash' stretches to it, bilinear; 'crop' scales, bicubic, until both sides are
            filled and one fits, and takes the centre, as CLIP and open_clip do; 'trim' scales,
            bilinear, what is left without plain margins until it fits (`trim`).

    Returns:
        uint8 [S, T, 3].
    """
    high, wide = image_shape.pair(size)
    if mode == "squash":
        return bilinear(image, (high, wide))
    if mode == "crop":
        return _resize_crop(image, high, wide)
    if mode == "trim":
        return trim([image], size)[0]
    raise ValueError(f"resize mode {mode!r}: use 'squash', 'crop' or 'trim'")


def _resize_crop(image: np.ndarray, high: int, wide: int) -> np.ndarray:
    """What torchvision's Resize(size, BICUBIC) and CenterCrop(size) give of squares, and timm's
    ResizeKeepRatio in the place of the first of others."""
    image = _shorten(image, 512 * -(-max(high, wide) // min(high, wide)))
    if high == wide:
        short = min(image.shape[:2])
        height, width = (
            high if side == short else int(high * side / short) for side in image.shape[:2]
        )
    else:
        ratio = min(image.shape[0] / high, image.shape[1] / wide)
        height, width = (round(side / ratio) for side in image.shape[:2])
    scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = int(round((height - high) / 2)), int(round((width - wide) / 2))
    return np.asarray(scaled.crop((left, top, left + wide, top + high)))


def _shorten(image: np.ndarray, most: int) -> np.ndarray:
    """The middle of an image more than `most` times as long as wide: the rest would be cut off
    after it had been scaled to gigabytes. The centre stays where it is, to the half pixel."""
    short = min(image.shape[:2])

    def middle(side: int) -> slice:
        keep = min(side, most * short + (side - most * short) % 2)
        return slice((side - keep) // 2, (side + keep) // 2)

    return image[middle(image.shape[0]), middle(image.shape[1])]


def cut(frames: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Images without their plain margins, and the colour of these, uint8 [3].

    The colour is that of the first pixel; what is left is the box around all that differs from it
    by more than PLAIN levels. An image of one colour stays whole.

    frames: uint8 [h, w, 3], one image, or those of a clip, which are cut alike: the box holds what
    any of them shows.
    """
    colour = frames[0][0, 0].copy()
    low = tuple(max(level - PLAIN, 0) for level in colour.tolist())
    high = tuple(min(level + PLAIN, 255) for level in colour.tolist())
    plain = functools.reduce(cv2.bitwise_and, (cv2.inRange(one, low, high) for one in frames))
    left, top, width, height = cv2.boundingRect(cv2.bitwise_not(plain))
    if not width:
        return list(frames), colour
    return [frame[top : top + height, left : left + width] for frame in frames], colour


def trim(frames: Sequence[np.ndarray], size: Size) -> list[np.ndarray]:
    """Images uint8 [h, w, 3], of one clip, without their plain margins: each `fit` to `size`."""
    left, colour = cut(frames)
    return [fit(pixels, colour, size) for pixels in left]


def fit(
    pixels: np.ndarray, colour: np.ndarray, size: Size, resize: Resize = bilinear
) -> np.ndarray:
    """uint8 [h, w, 3] scaled until one side has FILL of that of `size` S x T and the other no more,
    with `colour` around it: uint8 [S, T, 3]."""
    wanted = image_shape.pair(size)
    scale = FILL * min(side / own for side, own in zip(wanted, pixels.shape))
    height, width = (max(1, round(own * scale)) for own in pixels.shape[:2])
    return _amid(resize(pixels, (height, width)), colour, wanted)


def framed(pixels: np.ndarray, colour: np.ndarray, size: Size) -> np.ndarray:
    """As `fit`, but not scaled: uint8 [h', w', 3] of the proportions of `size`."""
    wanted = image_shape.pair(size)
    scale = max(own / side for side, own in zip(wanted, pixels.shape)) / FILL
    height, width = (max(own, round(side * scale)) for side, own in zip(wanted, pixels.shape))
    return _amid(pixels, colour, (height, width))


def _amid(pixels: np.ndarray, colour: np.ndarray, full: tuple[int, int]) -> np.ndarray:
    top, left = ((whole - own) // 2 for whole, own in zip(full, pixels.shape))
    bottom, right = full[0] - pixels.shape[0] - top, full[1] - pixels.shape[1] - left
    around = (top, bottom, left, right)
    return cv2.copyMakeBorder(pixels, *around, cv2.BORDER_CONSTANT, value=colour.tolist())
