"""From a mixture's batches to what the model takes: decodes late, in parallel.

Until here an image is the bytes it was stored as, so mixing and prefetching cost little memory.
Each example carries the numbers of its augmentation (preprocessors.plan_augmentation); render.py
carries them out, in threads that hold no lock while they decode.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from coca_jax.data import images, render

_SPEC = seqio.FeatureConverter.FeatureSpec


class CoCaFeatureConverter(seqio.FeatureConverter):
    """Task features -> image uint8 [b, S, S, 3], tokens, text_valid, is_label, text_id,
    prompt_len, class_id, source, index. Elements are whole batches: b is the first axis of each
    feature.

    Args:
        mode: of augmentation, one of augment.MODES.
        size: S.
        max_len: L, of tokens.
        num_threads: images decoded at the same time.
        fast: the fast setting of `render.resize` and of the JPEG decoder.
        pairs: '' for images; else examples are pairs, image [b, 2, S, S, 3], not augmented, and
            this is how they are resized ('squash' or 'crop').
        num_frames: T, of clips, image [b, T, S, S, 3]; 0: images.
    """

    MODEL_FEATURES = {
        "image": _SPEC(tf.uint8, 4),
        "tokens": _SPEC(tf.int32, 2),
        "text_valid": _SPEC(tf.bool, 2),
        "is_label": _SPEC(tf.bool, 1),
        "text_id": _SPEC(tf.int32, 2),
        "prompt_len": _SPEC(tf.int32, 1),
        "class_id": _SPEC(tf.int32, 1),
        "source": _SPEC(tf.int32, 1),
        "index": _SPEC(tf.int64, 1),
    }
    TASK_FEATURES = MODEL_FEATURES | {
        "image": _SPEC(tf.string, 1),
        "second": _SPEC(tf.string, 1),
        "how": _SPEC(tf.int32, 1),
        "box": _SPEC(tf.int32, 2),
        "ratio": _SPEC(tf.int32, 1),
        "shrink": _SPEC(tf.bool, 1),
        "warp": _SPEC(tf.float32, 3),
        "colour": _SPEC(tf.float32, 3),
        "background": _SPEC(tf.float32, 2),
        "op": _SPEC(tf.int32, 2),
        "strength": _SPEC(tf.float32, 2),
        "frame_offsets": _SPEC(tf.float64, 2),
    }
    PACKING_FEATURE_DTYPES: Mapping[str, Any] = {}

    def __init__(
        self,
        mode: str,
        size: int,
        max_len: int,
        num_threads: int,
        fast: bool,
        pairs: str = "",
        num_frames: int = 0,
    ):
        # Lengths are fixed by construction; seqio's check would add two maps.
        super().__init__(pack=False, apply_length_check=False)
        self._size, self._max_len, self._num_threads = size, max_len, num_threads
        self._pairs, self._num_frames = pairs, num_frames
        if pairs or num_frames:
            self.MODEL_FEATURES = self.MODEL_FEATURES | {"image": _SPEC(tf.uint8, 5)}
        self._render = functools.partial(
            render.render_batch,
            mode=mode,
            size=size,
            fast=fast,
            pool=ThreadPoolExecutor(num_threads, "decode"),
            threads=num_threads,
        )

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        def decode(encoded: np.ndarray, offsets: np.ndarray, *plan: np.ndarray) -> np.ndarray:
            rows = dict(zip(render.PLAN, plan))
            where = offsets if self._num_frames else None
            return self._render(encoded.tolist(), rows, offsets=where)

        def decode_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            pairs = zip(first.tolist(), second.tolist())
            return np.stack([self._pair(*pair) for pair in pairs])

        def convert(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            size = (self._size, self._size, 3)
            if self._pairs:
                inputs = [batch["image"], batch["second"]]
                pixels = tf.numpy_function(decode_pairs, inputs, tf.uint8)
                pixels.set_shape((None, 2, *size))
            else:
                inputs = [batch[name] for name in ("image", "frame_offsets", *render.PLAN)]
                pixels = tf.numpy_function(decode, inputs, tf.uint8)
                clip = (self._num_frames,) if self._num_frames else ()
                pixels.set_shape((None, *clip, *size))
            return {name: batch[name] for name in self.MODEL_FEATURES} | {"image": pixels}

        # Two batches at once: the threads do not idle while the last images of one are decoded.
        return ds.map(convert, num_parallel_calls=2, deterministic=True)

    def _pair(self, *encoded: bytes) -> np.ndarray:
        """Both images as in evaluation: uint8 [2, S, S, 3]."""
        pixels = (images.decode(data) for data in encoded)
        return np.stack([images.preprocess_eval(p, self._size, self._pairs) for p in pixels])

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> Mapping[str, int]:
        lengths = dict(image=self._size, tokens=self._max_len, text_valid=self._max_len)
        return {name: lengths.get(name, 1) for name in self.MODEL_FEATURES}
