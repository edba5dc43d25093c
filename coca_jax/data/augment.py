"""Augmentation as numbers: what to cut, where to put it and how to colour it, for many images.

The plan of an image is a function of its key alone. It is drawn here for a block of images at
once, in numpy; render.py carries it out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg

from coca_jax.config import shapes
from coca_jax.config.shapes import Size
from coca_jax.data import images, navit, order, videos

MODES = ("none", "crop", "inception", "drawing", "randaugment")
LARGE = 1.5  # times the result: what is larger is shrunk to it before it is warped
CROP_SCALE = 1.15  # 'crop': resize to this many times the size, cut the size
INCEPTION_AREA = (0.08, 1.0)  # Szegedy et al. 2015: share of the image's area ...
INCEPTION_ASPECT = (3 / 4, 4 / 3)  # ... and aspect of the cut, over that of the result
_LUMA = np.array([0.299, 0.587, 0.114])

# Operations that are not an affine map or a linear map of colours.
KEEP, POSTERIZE, SOLARIZE, EQUALIZE, AUTOCONTRAST, SHARPEN, INVERT, OUTLINE = range(8)


def plan(
    mode: str,
    how: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    keys: np.ndarray,
    size: Size,
    *,
    flip: bool = False,
    resize: str = "squash",
    fast: bool = False,
    randaugment: tuple[int, float] = (2, 10),
) -> dict[str, np.ndarray]:
    """Draws the augmentation of n images.

    Args:
        mode: one of MODES.
        how, height, width: int [n], as `images.sniff` gives them.
        keys: uint64 [n]: one per image and visit.
        size: S x T, height and width of the result.
        flip: mirror half of the images.
        resize: 'crop' (the centre, in the result's proportions), 'squash' or 'native' (all), or
            'trim' (what is within plain margins): what is resized before mode's own cut.
        fast: decode JPEGs no larger than the result needs.
        randaugment: number of operations one after another, and their magnitude, 0 to 30.

    Returns:
        box: int32 [n, 4], the cut (top, left, height, width); with 'trim' of an image of S x T.
        ratio: int32 [n], 1, 2, 4 or 8: the scale at which a JPEG is decoded, before the cut.
        shrink: bool [n]: resize the cut to S x T (antialiased) before the warp.
        warp: float32 [n, 2, 3], output pixel (x, y, 1) -> input pixel, of the shrunk cut or, where
            not shrunk, of the cut itself.
        colour: float32 [n, 3, 4]: the linear map of (R, G, B, 1), in [0, 255].
        background: float32 [n, 3], whole numbers, behind transparent pixels.
        op, strength: int32 and float32 [n, layers]: what is done besides.
    """
    if mode not in MODES:
        raise ValueError(f"data.augment={mode!r}: use one of {', '.join(MODES)}")
    draw = order.uniform(keys, 32)
    high, wide = shapes.pair(size)
    box = _cuts(mode, _region(height, width, resize, (high, wide)), draw, wide / high)
    affine, colour, background, op, strength = _maps(mode, keys, draw, randaugment, wide / high)
    if flip:
        affine[draw[:, 4] < 0.5, :, 0] *= -1
    # JPEG decodes at 1/2, 1/4 or 1/8 for less than the full size costs (at other eighths for more).
    # Twice the size is left to the resize, so that the result hardly differs; `fast` leaves once.
    spare = np.minimum(box[:, 2] / high, box[:, 3] / wide) / (1 if fast else 2)
    ratio = 2 ** np.clip(np.floor(np.log2(np.maximum(spare, 1))), 0, 3).astype(np.int64)
    ratio = np.where(how == images.JPEG, ratio, 1)
    large = (box[:, 2] > LARGE * high) | (box[:, 3] > LARGE * wide)
    return dict(
        box=box.astype(np.int32),
        ratio=ratio.astype(np.int32),
        shrink=large,
        warp=_pixel_maps(affine, box, (high, wide), large).astype(np.float32),
        colour=colour.astype(np.float32),
        background=background.astype(np.float32),
        op=op.astype(np.int32),
        strength=strength.astype(np.float32),
    )


def _cuts(mode: str, box: np.ndarray, draw: np.ndarray, proportions: float) -> np.ndarray:
    """What `mode` cuts from boxes int64 [n, 4], by the draws [n, 32]. proportions: width over
    height of the result, to which a cut is stretched."""
    n = len(box)
    if mode == "crop":
        return _cut(box, draw, np.full(n, 1 / CROP_SCALE), np.full(n, 1 / CROP_SCALE))
    if mode != "inception":
        return box
    low, high = INCEPTION_AREA
    area = low + (high - low) * draw[:, 2]
    log_aspect = np.log(INCEPTION_ASPECT)
    aspect = np.exp(log_aspect[0] + (log_aspect[1] - log_aspect[0]) * draw[:, 3]) * proportions
    pixels = area * box[:, 2] * box[:, 3]
    share_w = np.minimum(np.sqrt(pixels * aspect) / box[:, 3], 1.0)
    share_h = np.minimum(np.sqrt(pixels / aspect) / box[:, 2], 1.0)
    return _cut(box, draw, share_h, share_w)


def _maps(
    mode: str,
    keys: np.ndarray,
    draw: np.ndarray,
    randaugment: tuple[int, float],
    proportions: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What `mode` does besides: maps of place [n, 2, 3] and colour [n, 3, 4], backgrounds [n, 3],
    operations and their strength [n, layers]. proportions: width over height of the result."""
    n = len(keys)
    affine = np.tile(np.eye(2, 3), (n, 1, 1))  # centred output -> centred input, unit square
    colour = np.tile(np.eye(3, 4), (n, 1, 1))
    background = np.full((n, 3), 255.0)
    operation, strength = np.zeros((n, 1), np.int32), np.zeros((n, 1))
    if mode == "drawing":
        affine, colour, background, strength = _drawing(draw, proportions)
        operation = np.where(strength > 0, OUTLINE, KEEP)
    elif mode == "randaugment":
        affine, colour, operation, strength = _randaugment(keys, n, *randaugment, proportions)
    return affine, colour, background, operation, strength


def _region(
    height: np.ndarray, width: np.ndarray, resize: str, size: tuple[int, int]
) -> np.ndarray:
    """Boxes int64 [n, 4] of images of height and width: what is resized to `size` without a cut of
    `mode`'s own."""
    zero = np.zeros_like(height)
    if resize in ("squash", "native"):
        return np.stack([zero, zero, height, width], 1).astype(np.int64)
    if resize == "trim":  # of what is left, which is not known yet: render.py scales this to it
        return np.stack([zero, zero, zero + size[0], zero + size[1]], 1).astype(np.int64)
    if resize == "crop":
        down = np.clip(np.rint(width * size[0] / size[1]), 1, height).astype(np.int64)
        across = np.clip(np.rint(height * size[1] / size[0]), 1, width).astype(np.int64)
        box = [(height - down) // 2, (width - across) // 2, down, across]
        return np.stack(box, 1).astype(np.int64)
    raise ValueError(f"data.resize={resize!r}: use 'squash', 'crop', 'trim' or 'native'")


def _cut(box: np.ndarray, draw: np.ndarray, share_h: np.ndarray, share_w: np.ndarray) -> np.ndarray:
    """A cut of the given shares of height and width, anywhere in the box."""
    height = np.clip(np.rint(box[:, 2] * share_h), 1, box[:, 2]).astype(np.int64)
    width = np.clip(np.rint(box[:, 3] * share_w), 1, box[:, 3]).astype(np.int64)
    top = box[:, 0] + (draw[:, 0] * (box[:, 2] - height + 1)).astype(np.int64)
    left = box[:, 1] + (draw[:, 1] * (box[:, 3] - width + 1)).astype(np.int64)
    return np.stack([top, left, height, width], 1)


def _linear(
    angle: np.ndarray, scale: np.ndarray, shear: np.ndarray, proportions: float
) -> np.ndarray:
    """[n, 2, 2] maps of output to input coordinates of 'rotate, shear and scale by'. These are of
    pixels, and the coordinates shares of the sides, whose width over height is `proportions`."""
    cos, sin = np.cos(angle), np.sin(angle)
    rotate = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], 1)
    skew = np.tile(np.eye(2), (len(angle), 1, 1))
    skew[:, 0, 1], skew[:, 1, 0] = shear[:, 0], shear[:, 1]
    return skew @ rotate / scale[:, None, None] * [[1, 1 / proportions], [proportions, 1]]


def _drawing(
    draw: np.ndarray, proportions: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For small drawings, as another hand would draw them: an affine map, other colours, sometimes
    a light background; half get dark lines along the edges (their strength [n, 1]), and half of
    these are faded, down to a line drawing: what stays is shape."""
    n = len(draw)

    def between(column: int, low: float, high: float) -> np.ndarray:
        return low + (high - low) * draw[:, column]

    angle = np.deg2rad(between(8, -15, 15))
    scale = between(9, 0.7, 1.2)
    shear = np.stack([between(10, -0.15, 0.15), between(11, -0.15, 0.15)], 1)
    affine = np.zeros((n, 2, 3))
    affine[:, :, :2] = _linear(angle, scale, shear, proportions)
    affine[:, 0, 2], affine[:, 1, 2] = between(12, -0.1, 0.1), between(13, -0.1, 0.1)
    gray = draw[:, 14] < 0.2
    colour = colour_map(
        hue=between(15, -0.08, 0.08) * (draw[:, 16] < 0.8),
        saturation=np.where(gray, 0.0, between(17, 0.6, 1.4)),
        brightness=between(18, 0.8, 1.2),
        contrast=between(19, 0.7, 1.3),
    )
    light = np.rint(draw[:, 21:24] * 95 + 160)
    background = np.where(draw[:, 20:21] < 0.3, light, 255.0)
    outlined = draw[:, 24] < 0.5
    fade = np.where(outlined & (draw[:, 26] < 0.5), between(27, 0.0, 0.9), 0.0)
    colour *= (1 - fade)[:, None, None]
    colour[:, :, 3] += 255 * fade[:, None]
    # Lines are found in the faded picture, whose edges are weaker.
    strength = np.where(outlined, between(25, 0.5, 3.0) / (1 - fade), 0.0)
    return affine, colour, background, strength[:, None]


def colour_map(
    hue: np.ndarray, saturation: np.ndarray, brightness: np.ndarray, contrast: np.ndarray
) -> np.ndarray:
    """Changes of colour as linear maps [n, 3, 4] of (R, G, B, 1) in [0, 255].

    Args:
        hue: [n], a turn of the colour circle is 1 (a rotation of chroma, luma kept).
        saturation, brightness, contrast: [n] factors, 1 changes nothing; 0 saturation is gray.
    """
    n = len(hue)
    to_yiq = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = np.cos(2 * np.pi * hue) * saturation, np.sin(2 * np.pi * hue) * saturation
    turn = np.zeros((n, 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cos, -sin, sin, cos
    linear = np.linalg.inv(to_yiq) @ turn @ to_yiq * (brightness * contrast)[:, None, None]
    offset = np.repeat((127.5 * (1 - contrast))[:, None], 3, 1)
    return np.concatenate([linear, offset[:, :, None]], 2)


def _randaugment(
    keys: np.ndarray, n: int, layers: int, magnitude: float, proportions: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """RandAugment (Cubuk et al. 2019): `layers` of 16 operations, one after another.

    Maps of place compose into one affine map, maps of colour into one linear map, so an image is
    resampled once; what is neither runs after them.
    """
    level = magnitude / 30
    affine, colour = np.tile(np.eye(3), (n, 1, 1)), np.tile(np.eye(4), (n, 1, 1))
    operation, strength = np.zeros((n, layers), np.int32), np.zeros((n, layers))
    one = np.ones(n)
    for layer in range(layers):
        draw = order.uniform(order.key(keys.view(np.int64), layer, 7), 2)
        which = (draw[:, 0] * 16).astype(int)
        sign = np.where(draw[:, 1] < 0.5, -1.0, 1.0)
        step, move = np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 2))
        shear = np.stack([(which == 0) * sign * 0.3 * level, (which == 1) * sign * 0.3 * level], 1)
        angle = (which == 2) * sign * np.deg2rad(30) * level
        move[:, 0] = (which == 3) * sign * 0.45 * level
        move[:, 1] = (which == 4) * sign * 0.45 * level
        step[:, :2, :2], step[:, :2, 2] = _linear(angle, one, shear, proportions), move
        affine = step @ affine
        factor = 1 + sign * 0.9 * level
        tint = np.tile(np.eye(4), (n, 1, 1))
        tint[:, :3] = colour_map(
            0 * one,
            np.where(which == 5, factor, 1),
            np.where(which == 6, factor, 1),
            np.where(which == 7, factor, 1),
        )
        colour = tint @ colour
        for number, (op, amount) in {
            8: (POSTERIZE, 8 - np.rint(4 * level)),
            9: (SOLARIZE, 256 * (1 - level)),
            10: (EQUALIZE, 0),
            11: (AUTOCONTRAST, 0),
            12: (SHARPEN, factor),
            13: (INVERT, 0),
        }.items():
            operation[which == number, layer] = op
            strength[:, layer] = np.where(which == number, amount, strength[:, layer])
    return affine[:, :2], colour[:, :3], operation, strength


def _pixel_maps(
    affine: np.ndarray, box: np.ndarray, size: tuple[int, int], shrink: np.ndarray
) -> np.ndarray:
    """Affine maps of the centred unit square, [n, 2, 3], as maps of pixels."""
    high, wide = size
    height = np.where(shrink, high, box[:, 2])
    width = np.where(shrink, wide, box[:, 3])
    extent = np.stack([width, height], 1)[:, :, None]  # x first
    linear = affine[:, :, :2] * extent / np.array([wide, high])
    centre = (1 - np.array([wide, high])) / 2  # of output pixel 0, in output pixels from the centre
    # Of squares the sum first, as ever: rounded in another order, pixels of old runs would change.
    moved = linear.sum(2) * centre[0] if high == wide else (linear * centre).sum(2)
    move = moved + (affine[:, :, 2] + 0.5) * extent[:, :, 0] - 0.5
    return np.concatenate([linear, move[:, :, None]], 2)


# Carries out the plan of an image (augment.py): encoded bytes to the pixels that train.
#
# numpy, OpenCV, simplejpeg and PIL, all of which let go of Python's lock while they work, so that
# threads decode in parallel. No TensorFlow.


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
    high, wide = shapes.pair(size)
    pixels = _cut_pixels(pixels, ratio, plan)
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
            if op != KEEP:
                pixels = operate(pixels, op, strength)
        return pixels
    return _resized(pixels, (high, wide), plan, fast)


def render_native(
    encoded: bytes, plan: Mapping[str, Any], patch_size: int, most: int, fast: bool = False
) -> np.ndarray:
    """One image as planned, without a warp and colours, in its own shape: packed uint8 [N, ...], N
    being `most`, see data/navit.py. Raises ValueError when it cannot be decoded."""
    found, ratio, _ = _read(encoded, plan["how"], plan["ratio"], plan["background"], fast)
    _, _, height, width = plan["box"]
    rows, columns = navit.grid(height, width, most)
    size = (rows * patch_size, columns * patch_size)
    return navit.pack(_resized(_cut_pixels(found, ratio, plan), size, plan, fast), patch_size, most)


def _trimmed(
    frames: Sequence[np.ndarray], plan: Mapping[str, Any], mode: str, size: Size, fast: bool
) -> tuple[list[np.ndarray], Mapping[str, Any]]:
    """The frames of a clip without their plain margins, and its plan for what they are then.

    It was drawn for frames of `size`, as nothing was known of what they show. Large ones become
    that; others keep their pixels, and the map of the plan is scaled to them.
    """
    wanted = np.array(shapes.pair(size))
    left, colour = images.cut(frames)
    if mode == "none" or (left[0].shape[:2] > LARGE * wanted).any():
        scaled = functools.partial(resize, fast=fast)
        left = [images.fit(pixels, colour, size, scaled) for pixels in left]
    else:
        left = [images.framed(pixels, colour, size) for pixels in left]
    height, width = left[0].shape[:2]
    grown = (np.array([width, height]) / wanted[::-1])[:, None]
    # Of pixels' centres, which lie half a pixel from their edges.
    half = np.array([0, 0, 0.5])
    warp = ((plan["warp"] + half) * grown - half).astype(np.float32)
    return left, {**plan, "box": (0, 0, height, width), "warp": warp, "background": colour}


def _cut_pixels(pixels: np.ndarray, ratio: int, plan: Mapping[str, Any]) -> np.ndarray:
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
    high, wide = shapes.pair(size)
    if not fast:
        return images.bilinear(pixels, (high, wide))
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
    if op == OUTLINE:
        # Only the darker side of an edge: lines about a pixel wide.
        edge = (cv2.dilate(pixels, np.ones((3, 3), np.uint8)) - pixels).max(2, keepdims=True)
        ink = np.minimum(strength / 255 * edge.astype(np.float32), 1)
        return (pixels * (1 - ink)).astype(np.uint8)
    if op == SHARPEN:
        smooth = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
        kernel = (1 - strength) * smooth
        kernel[1, 1] += strength
        return cv2.filter2D(pixels, -1, kernel, borderType=cv2.BORDER_REFLECT)
    if op == INVERT:
        return 255 - pixels
    if op == POSTERIZE:
        drop = int(8 - strength)
        return pixels >> drop << drop
    if op == SOLARIZE:
        return np.where(pixels < strength, pixels, 255 - pixels)
    tables = []
    for channel in range(3):
        counts = np.bincount(pixels[..., channel].reshape(-1), minlength=256)
        used = np.flatnonzero(counts)
        low, high = used[0], used[-1]
        table = levels
        if op == EQUALIZE:
            step = (counts.sum() - counts[high]) // 255
            if step:
                table = (np.cumsum(counts) - counts + step // 2) // step
        elif high > low:  # augment.AUTOCONTRAST
            table = np.rint((levels - low) * 255 / (high - low))
        tables.append(np.clip(table, 0, 255).astype(np.uint8))
    return cv2.LUT(pixels, np.stack(tables, -1)[None])
