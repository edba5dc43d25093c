"""Carries out the plan of an image (augment.py): encoded bytes to the pixels that train.

numpy, OpenCV, simplejpeg and PIL, all of which let go of Python's lock while they work, so that
threads decode in parallel. No TensorFlow.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg

from coca_jax import image_shape
from coca_jax.data import augment, images, native, resizing, videos
from coca_jax.image_shape import Size

cv2.setNumThreads(1)  # parallel over images, not within one


def render(
    encoded: bytes,
    plan: Mapping[str, Any],
    mode: str,
    size: Size,
    fast: bool = False,
    trim: bool = False,
) -> np.ndarray:
    """One image as planned: uint8 [S, T, 3]. trim: without its plain margins, as planned with
    resize='trim'. Raises ValueError when it cannot be decoded."""
    pixels, ratio, alpha = _read(encoded, plan["how"], plan["ratio"], plan["background"], fast)
    if trim:
        (pixels,), plan = _trimmed([pixels], plan, mode, size, fast)
    return place(pixels, ratio, alpha or trim, plan, mode, size, fast)


def render_clip(
    encoded: bytes,
    offsets: np.ndarray,
    plan: Mapping[str, Any],
    mode: str,
    size: Size,
    fast: bool = False,
    trim: bool = False,
) -> np.ndarray:
    """The frames of a clip at `offsets`, float [F], all as one image is planned: uint8
    [F, S, T, 3]. Raises ValueError when it cannot be decoded."""
    clip = videos.decode_rgba(encoded, offsets)
    count, still = len(clip), clip.strides[0] == 0
    clip = clip[:1] if still else clip  # all frames are one
    alpha = clip.shape[-1] == 4
    if alpha:
        clip = images.over(clip, plan["background"])
    frames = list(clip)
    if trim:
        frames, plan = _trimmed(frames, plan, mode, size, fast)
    placed = np.stack([place(f, 1, alpha or trim, plan, mode, size, fast) for f in frames])
    return placed.repeat(count, 0) if still else placed


def place(
    pixels: np.ndarray,
    ratio: int,
    alpha: bool,
    plan: Mapping[str, Any],
    mode: str,
    size: Size,
    fast: bool = False,
) -> np.ndarray:
    """Cuts, resizes and augments decoded pixels as planned.

    Args:
        pixels: uint8 [h, w, 3], over plan["background"] where there was transparency.
        ratio: the scale at which they were decoded is one over this.
        alpha: whether there was transparency: then the background goes on around the picture.
        plan: one row of what `augment.plan` gives.

    Returns:
        uint8 [S, T, 3].
    """
    high, wide = image_shape.pair(size)
    pixels = _cut(pixels, ratio, plan)
    if mode in ("drawing", "randaugment"):
        if plan["shrink"]:
            pixels = resize(pixels, size, fast)
        pixels = cv2.warpAffine(
            np.ascontiguousarray(pixels),
            plan["warp"],
            (wide, high),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT if alpha else cv2.BORDER_REPLICATE,
            borderValue=plan["background"].tolist(),
        )
        pixels = cv2.transform(pixels, plan["colour"])
        for op, strength in zip(plan["op"].tolist(), plan["strength"].tolist()):
            if op != augment.KEEP:
                pixels = operate(pixels, op, strength)
        return pixels
    return _resized(pixels, (high, wide), plan, fast)


def render_native(
    encoded: bytes, plan: Mapping[str, Any], patch_size: int, most: int, fast: bool = False
) -> np.ndarray:
    """One image as planned, without a warp and colours, in its own shape: packed uint8 [N, ...], N
    being `most`, see data/native.py. Raises ValueError when it cannot be decoded."""
    found, ratio, _ = _read(encoded, plan["how"], plan["ratio"], plan["background"], fast)
    _, _, height, width = plan["box"]
    rows, columns = native.grid(height, width, most)
    size = (rows * patch_size, columns * patch_size)
    return native.pack(_resized(_cut(found, ratio, plan), size, plan, fast), patch_size, most)


def _trimmed(
    frames: Sequence[np.ndarray], plan: Mapping[str, Any], mode: str, size: Size, fast: bool
) -> tuple[list[np.ndarray], Mapping[str, Any]]:
    """The frames of a clip without their plain margins, and its plan for what they are then.

    It was drawn for frames of `size`, as nothing was known of what they show. Large ones become
    that; others keep their pixels, and the map of the plan is scaled to them.
    """
    wanted = np.array(image_shape.pair(size))
    left, colour = resizing.cut(frames)
    if mode == "none" or (left[0].shape[:2] > augment.LARGE * wanted).any():
        scaled = functools.partial(resize, fast=fast)
        left = [resizing.fit(pixels, colour, size, scaled) for pixels in left]
    else:
        left = [resizing.framed(pixels, colour, size) for pixels in left]
    height, width = left[0].shape[:2]
    grown = (np.array([width, height]) / wanted[::-1])[:, None]
    # Of pixels' centres, which lie half a pixel from their edges.
    half = np.array([0, 0, 0.5])
    warp = ((plan["warp"] + half) * grown - half).astype(np.float32)
    return left, {**plan, "box": (0, 0, height, width), "warp": warp, "background": colour}


def _cut(pixels: np.ndarray, ratio: int, plan: Mapping[str, Any]) -> np.ndarray:
    """The box of the plan, of pixels that were decoded at one over ratio."""
    top, left, height, width = plan["box"]
    if ratio != 1:
        top, left = top // ratio, left // ratio
        height, width = max(height // ratio, 1), max(width // ratio, 1)
    return pixels[top : top + height, left : left + width]


def _resized(
    pixels: np.ndarray, size: tuple[int, int], plan: Mapping[str, Any], fast: bool
) -> np.ndarray:
    """uint8 [h, w, 3] to (height, width), mirrored where the plan says so."""
    if pixels.shape[:2] != size:
        pixels = resize(pixels, size, fast)
    return pixels[:, ::-1] if plan["warp"][0, 0] < 0 else pixels


def _read(
    encoded: bytes, how: int, ratio: int, background: np.ndarray, fast: bool
) -> tuple[np.ndarray, int, bool]:
    """Pixels uint8 [h, w, 3], the ratio at which they are, and whether there was transparency."""
    if how == images.JPEG:
        try:
            if ratio == 1:
                return simplejpeg.decode_jpeg(encoded, fastupsample=fast, fastdct=fast), 1, False
            height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
            pixels = simplejpeg.decode_jpeg(
                encoded,
                fastupsample=fast,
                fastdct=fast,
                min_height=-(-height // ratio),
                min_width=-(-width // ratio),
                min_factor=ratio,
            )
            return pixels, ratio, False
        except ValueError:
            pass  # blemishes that PIL reads over; real damage it refuses as well
    elif how == images.BMP:
        return images.read_bmp(encoded), 1, False
    pixels = images.decode_rgba(encoded)
    if pixels.shape[-1] == 4:
        return images.over(pixels, background), 1, True
    return pixels, 1, False


def resize(pixels: np.ndarray, size: Size, fast: bool = False) -> np.ndarray:
    """uint8 [h, w, 3] to size, a square's side or (height, width), antialiased.

    The exact way is that of evaluation: PIL's, a triangle as wide as the output's pixels. The fast
    one smooths with three taps whose variance makes up what linear interpolation lacks of that
    triangle's, then interpolates: equal at scales 1 and 2, close between them (a mean difference
    below one level), three times quicker. Above 2 it takes the mean of whole pixels first.
    """
    high, wide = image_shape.pair(size)
    if not fast:
        return resizing.bilinear(pixels, (high, wide))
    height, width = pixels.shape[:2]
    whole_h, whole_w = -(-height // (2 * high)), -(-width // (2 * wide))
    if whole_h > 1 or whole_w > 1:
        smaller = (-(-width // whole_w), -(-height // whole_h))
        pixels = cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA)
        height, width = pixels.shape[:2]
    if height > high or width > wide:
        pixels = cv2.sepFilter2D(
            pixels, -1, _taps(width / wide), _taps(height / high), borderType=cv2.BORDER_REPLICATE
        )
    return cv2.resize(pixels, (wide, high), interpolation=cv2.INTER_LINEAR)


def _taps(scale: float) -> np.ndarray:
    """Variance: s^2/6 of the triangle, 1/6 of linear interpolation, 2a of [a, 1 - 2a, a]."""
    a = (max(scale, 1.0) ** 2 - 1) / 12
    return np.array([a, 1 - 2 * a, a], np.float32)


def operate(pixels: np.ndarray, op: int, strength: float) -> np.ndarray:
    """The operations of augment.py that are not linear, on uint8 [S, T, 3]."""
    levels = np.arange(256)
    if op == augment.OUTLINE:
        # Only the darker side of an edge: lines about a pixel wide.
        edge = (cv2.dilate(pixels, np.ones((3, 3), np.uint8)) - pixels).max(2, keepdims=True)
        ink = np.minimum(strength / 255 * edge.astype(np.float32), 1)
        return (pixels * (1 - ink)).astype(np.uint8)
    if op == augment.SHARPEN:
        smooth = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
        kernel = (1 - strength) * smooth
        kernel[1, 1] += strength
        return cv2.filter2D(pixels, -1, kernel, borderType=cv2.BORDER_REFLECT)
    if op == augment.INVERT:
        return 255 - pixels
    if op == augment.POSTERIZE:
        drop = int(8 - strength)
        return pixels >> drop << drop
    if op == augment.SOLARIZE:
        return np.where(pixels < strength, pixels, 255 - pixels)
    tables = []
    for channel in range(3):
        counts = np.bincount(pixels[..., channel].reshape(-1), minlength=256)
        used = np.flatnonzero(counts)
        low, high = used[0], used[-1]
        table = levels
        if op == augment.EQUALIZE:
            step = (counts.sum() - counts[high]) // 255
            if step:
                table = (np.cumsum(counts) - counts + step // 2) // step
        elif high > low:  # augment.AUTOCONTRAST
            table = np.rint((levels - low) * 255 / (high - low))
        tables.append(np.clip(table, 0, 255).astype(np.uint8))
    return cv2.LUT(pixels, np.stack(tables, -1)[None])
