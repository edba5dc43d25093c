"""From a task's examples to what the model takes: decodes late, in C++ and in parallel.

Until here an image is the bytes it was stored as, so mixing and prefetching cost little memory.
Each example carries the numbers of its augmentation (preprocessors.plan_augmentation); the graph
below only applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from coca_jax.data import augment, images

_SPEC = seqio.FeatureConverter.FeatureSpec


class CoCaFeatureConverter(seqio.FeatureConverter):
    """Task features -> image uint8 [S, S, 3], tokens, text_valid, is_label, text_id, source, index.

    Args:
        mode: of augmentation, one of augment.MODES.
        size: S.
        max_len: L, of tokens.
        num_threads: images decoded at the same time.
        fast: the fast setting of `decode`.
    """

    TASK_FEATURES = {
        "image": _SPEC(tf.string, 0),
        "tokens": _SPEC(tf.int32, 1),
        "text_valid": _SPEC(tf.bool, 1),
        "is_label": _SPEC(tf.bool, 0),
        "text_id": _SPEC(tf.int32, 1),
        "source": _SPEC(tf.int32, 0),
        "index": _SPEC(tf.int64, 0),
        "how": _SPEC(tf.int32, 0),
        "whole": _SPEC(tf.bool, 0),
        "box": _SPEC(tf.int32, 1),
        "ratio": _SPEC(tf.int32, 0),
        "shrink": _SPEC(tf.bool, 0),
        "warp": _SPEC(tf.float32, 1),
        "colour": _SPEC(tf.float32, 2),
        "background": _SPEC(tf.float32, 1),
        "op": _SPEC(tf.int32, 1),
        "strength": _SPEC(tf.float32, 1),
    }
    MODEL_FEATURES = {
        "image": _SPEC(tf.uint8, 3),
        "tokens": _SPEC(tf.int32, 1),
        "text_valid": _SPEC(tf.bool, 1),
        "is_label": _SPEC(tf.bool, 0),
        "text_id": _SPEC(tf.int32, 1),
        "source": _SPEC(tf.int32, 0),
        "index": _SPEC(tf.int64, 0),
    }
    PACKING_FEATURE_DTYPES: Mapping[str, Any] = {}

    def __init__(self, mode: str, size: int, max_len: int, num_threads: int, fast: bool):
        # Lengths are fixed by construction; seqio's check would add two maps to each example.
        super().__init__(pack=False, apply_length_check=False)
        self._mode, self._size, self._max_len = mode, size, max_len
        self._num_threads, self._fast = num_threads, fast

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        def convert(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            return {
                "image": decode(example, self._mode, self._size, self._fast),
                "tokens": example["tokens"],
                "text_valid": example["text_valid"],
                "is_label": example["is_label"],
                "text_id": example["text_id"],
                "source": example["source"],
                "index": example["index"],
            }

        return ds.map(convert, num_parallel_calls=self._num_threads, deterministic=True)

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> Mapping[str, int]:
        lengths = dict(image=self._size, tokens=self._max_len, text_valid=self._max_len)
        return {name: lengths.get(name, 1) for name in self.MODEL_FEATURES}


def _careful(encoded: bytes) -> np.ndarray:
    return images.decode_rgba(encoded)


def decode(example: Mapping[str, tf.Tensor], mode: str, size: int, fast: bool = False) -> tf.Tensor:
    """Decodes, cuts, resizes and augments one image as planned: uint8 [S, S, 3].

    The resize is antialiased bilinear, as at evaluation. `fast` takes cheaper ones: the mean of
    the pixels that fall together where an image shrinks, plain bilinear where it grows, and
    JPEG's cheaper chroma.

    Small matrix products stand where broadcasts would do: Eigen broadcasts along a last axis of 1
    or 3 ten times slower.
    """
    warped = mode in ("drawing", "randaugment")
    box = example["box"]
    background = example["background"]

    def scale(pixels: tf.Tensor) -> tf.Tensor:
        """[h, w, 3], the cut: float32 [S, S, 3]."""
        extent = tf.shape(pixels)[:2]
        if fast:
            return tf.cond(
                tf.reduce_all(extent >= size),
                lambda: tf.raw_ops.ResizeArea(images=pixels[None], size=(size, size))[0],
                lambda: tf.raw_ops.ResizeBilinear(
                    images=pixels[None], size=(size, size), half_pixel_centers=True
                )[0],
            )
        factor = tf.cast(size, tf.float32) / tf.cast(extent, tf.float32)
        return tf.raw_ops.ScaleAndTranslate(
            images=pixels[None],
            size=(size, size),
            scale=factor,
            translation=tf.zeros(2),
            kernel_type="triangle",
            antialias=True,
        )[0]

    def cut(pixels: tf.Tensor) -> tf.Tensor:
        if mode not in ("crop", "inception"):  # the cut is the whole, or the centre of it
            return tf.cond(example["whole"], lambda: pixels, lambda: _slice(pixels, box))
        return _slice(pixels, box)

    def warp(pixels: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=pixels[None],
            transforms=example["warp"][None],
            output_shape=(size, size),
            interpolation="BILINEAR",
            fill_mode="NEAREST",
            fill_value=0.0,
        )[0]

    def place(pixels: tf.Tensor, pad: bool) -> tf.Tensor:
        """The cut, [h, w, 3] of uint8 or float32, to float32 [S, S, 3]."""
        if warped:

            def whole() -> tf.Tensor:
                found = tf.cast(pixels, tf.float32)
                return tf.pad(found, [[1, 1], [1, 1], [0, 0]]) if pad else found

            return warp(tf.cond(example["shrink"], lambda: scale(pixels), whole))
        fits = tf.reduce_all(tf.shape(pixels)[:2] == size)
        placed = tf.cond(fits, lambda: tf.cast(pixels, tf.float32), lambda: scale(pixels))
        flipped = example["warp"][0] < 0
        return tf.cond(flipped, lambda: placed[:, ::-1], lambda: placed)

    def opaque(pixels: tf.Tensor) -> tf.Tensor:
        return (
            _colour(place(pixels, False), example["colour"], None)
            if warped
            else (place(pixels, False))
        )

    def transparent(rgba: tf.Tensor) -> tf.Tensor:
        # Over a background b: a * (rgb - b) + b. The first term is 0 where nothing is, so that
        # it can be resized and warped with zeros around it; b is added at the end.
        rgba = cut(rgba)
        flat = tf.cast(tf.reshape(rgba, (-1, 4)), tf.float32)
        rgb = flat @ tf.eye(4, 3)
        alpha = flat @ tf.constant([[0.0] * 3] * 3 + [[1 / 255] * 3])
        behind = flat @ tf.pad(background[None] / 255, [[3, 0], [0, 0]])
        over = tf.reshape(rgb * alpha - behind, tf.concat([tf.shape(rgba)[:2], [3]], 0))
        placed = place(over, True)
        if warped:
            return _colour(placed, example["colour"], background)
        return tf.nn.bias_add(placed, background)

    def jpeg() -> tf.Tensor:
        encoded, chroma = example["image"], dict(channels=3, fancy_upscaling=not fast)

        def full() -> tf.Tensor:
            if mode in ("crop", "inception"):
                return tf.io.decode_and_crop_jpeg(encoded, box, **chroma)
            return cut(tf.io.decode_jpeg(encoded, **chroma))

        def reduced(ratio: int) -> Callable[[], tf.Tensor]:
            def decode_reduced() -> tf.Tensor:
                pixels = tf.io.decode_jpeg(encoded, ratio=ratio, **chroma)
                return _slice(pixels, tf.maximum(box // ratio, [0, 0, 1, 1]))

            return decode_reduced

        which = tf.cast(tf.math.log(tf.cast(example["ratio"], tf.float32)) / 0.693 + 0.5, tf.int32)
        return opaque(tf.switch_case(which, [full, reduced(2), reduced(4), reduced(8)]))

    def plain() -> tf.Tensor:
        pixels = tf.io.decode_image(example["image"], channels=3, expand_animations=False)
        return opaque(cut(pixels))

    def png_alpha() -> tf.Tensor:
        return transparent(tf.io.decode_png(example["image"], channels=4))

    def careful() -> tf.Tensor:
        pixels = tf.numpy_function(_careful, [example["image"]], tf.uint8)
        return opaque(cut(tf.ensure_shape(pixels, (None, None, 3))))

    def careful_alpha() -> tf.Tensor:
        pixels = tf.numpy_function(_careful, [example["image"]], tf.uint8)
        return transparent(tf.ensure_shape(pixels, (None, None, 4)))

    pixels = tf.switch_case(example["how"], [jpeg, plain, png_alpha, careful, careful_alpha])
    pixels = tf.saturate_cast(tf.round(tf.ensure_shape(pixels, (size, size, 3))), tf.uint8)
    if mode == "randaugment":
        for layer in range(augment.RANDAUGMENT_LAYERS):
            pixels = _operate(pixels, example["op"][layer], example["strength"][layer])
    return pixels


def _slice(pixels: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    return pixels[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]


def _colour(pixels: tf.Tensor, colour: tf.Tensor, add: tf.Tensor | None) -> tf.Tensor:
    """The linear map [3, 4] of colours of float32 [S, S, 3], to which `add` is added before."""
    linear, offset = colour[:, :3], colour[:, 3]
    if add is not None:
        offset += tf.linalg.matvec(linear, add)
    flat = tf.linalg.matmul(tf.reshape(pixels, (-1, 3)), linear, transpose_b=True)
    return tf.reshape(tf.nn.bias_add(flat, offset), tf.shape(pixels))


def _operate(pixels: tf.Tensor, op: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
    """The operations of RandAugment that are not linear, on uint8 [S, S, 3]."""

    def posterize() -> tf.Tensor:
        drop = tf.cast(8.0 - strength, tf.uint8)
        return tf.bitwise.left_shift(tf.bitwise.right_shift(pixels, drop), drop)

    def solarize() -> tf.Tensor:
        return tf.where(tf.cast(pixels, tf.float32) < strength, pixels, 255 - pixels)

    def equalize() -> tf.Tensor:
        def channel(values: tf.Tensor) -> tf.Tensor:
            counts = tf.math.bincount(tf.cast(values, tf.int32), minlength=256, maxlength=256)
            last = tf.reduce_max(tf.where(counts > 0, tf.range(256), 0))
            step = (tf.reduce_sum(counts) - counts[last]) // 255
            table = (tf.cumsum(counts, exclusive=True) + step // 2) // tf.maximum(step, 1)
            table = tf.cast(tf.clip_by_value(table, 0, 255), tf.uint8)
            flat = tf.gather(table, tf.cast(values, tf.int32))
            return tf.where(step > 0, flat, values)

        flat = tf.reshape(pixels, (-1, 3))
        return tf.reshape(tf.stack([channel(flat[:, i]) for i in range(3)], -1), tf.shape(pixels))

    def autocontrast() -> tf.Tensor:
        values = tf.cast(pixels, tf.float32)
        low = tf.reduce_min(values, (0, 1), keepdims=True)
        high = tf.reduce_max(values, (0, 1), keepdims=True)
        stretched = (values - low) * 255.0 / tf.maximum(high - low, 1.0)
        return tf.saturate_cast(tf.round(tf.where(high > low, stretched, values)), tf.uint8)

    def sharpen() -> tf.Tensor:
        values = tf.cast(pixels, tf.float32)
        kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)[..., None, None] / 13
        padded = tf.pad(values, [[1, 1], [1, 1], [0, 0]], "SYMMETRIC")
        smooth = tf.nn.depthwise_conv2d(
            padded[None], tf.tile(kernel, (1, 1, 3, 1)), (1, 1, 1, 1), "VALID"
        )[0]
        return tf.saturate_cast(tf.round(smooth + strength * (values - smooth)), tf.uint8)

    return tf.switch_case(
        op,
        [
            lambda: pixels,
            posterize,
            solarize,
            equalize,
            autocontrast,
            sharpen,
            lambda: 255 - pixels,
        ],
    )
