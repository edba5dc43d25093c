"""From the encoded images of records to the pixels of a batch, by a pool of threads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from coca_jax.config import Config, heads, shapes
from coca_jax.config.shapes import Size
from coca_jax.data import augment, images, navit, order, texts, videos
from coca_jax.data.sources.records import Record
from coca_jax.data.texts import Draw
from coca_jax.runtime import machine

Plan = dict[str, np.ndarray]
_UNKNOWN = (images.OTHER, 1, 1)  # stands in for what a header does not tell: it will not decode


class Pixels:
    """How the images of a run are decoded, resized and augmented.

    An example is an image, with data.num_frames a clip, and with a head over pairs two images,
    which are resized as in evaluation and not augmented.

    Args:
        config: of a run.

    Attributes:
        field: of a batch that they become.
        shape: of one example: (S, T, 3), of a clip (F, S, T, 3), of a pair (2, S, T, 3); of one in
            its own aspect ratio (N, P * P * 3 + 4), see data/navit.py.
        threads: images decoded at the same time.
    """

    field = "image"

    def __init__(self, config: Config):
        data = config.data
        self._size, self._mode, self._fast = config.model.image_size, data.augment, data.fast_resize
        self._resize, self._jitter = data.resize, data.frame_jitter
        self._fixed = data.augmentations
        self._frames, self.pairs = data.num_frames, images_of(config) > 1
        self._native = None
        if data.resize == "native":
            self._native = navit.patch_size(config.model), navit.budget(config.model, config.data)
        self._draw_plan = functools.partial(
            augment.plan,
            data.augment,
            size=plan_size(config),
            flip=data.flip,
            resize=data.resize,
            fast=data.fast_resize,
            randaugment=data.randaugment,
        )
        self.shape = example_shape(config)
        self.threads = data.num_threads or machine.count()
        self._pool = ThreadPoolExecutor(self.threads, "decode")

    def plan(
        self, records: Sequence[Record], draw: Draw, indices: np.ndarray | None = None
    ) -> Plan:
        """How each image is decoded and augmented: a function of its header and its place, or with
        data.augmentations one of so many of its record (`indices`, int64 [n], in their source).

        Returns:
            Those of `augment.plan`, of n rows, and of clips `offsets`, float64 [n, T]: which
            frames are taken (videos.sample).
        """
        if self._fixed and indices is not None:
            draw = one_of(draw, indices, self._fixed)
        return self.drawn(records, draw)

    def drawn(self, records: Sequence[Record], draw: Draw) -> Plan:
        """`plan` by these random choices as they are."""
        if self.pairs:
            return {}
        found = np.array([self._sniff(record.image) for record in records], np.int64).reshape(-1, 3)
        how, height, width = found.T
        plan = self._draw_plan(how, height, width, draw.keys(texts.AUGMENT))
        plan["how"] = how.astype(np.int32)
        if self._frames:
            plan["offsets"] = np.tile(videos.middles(self._frames), (len(records), 1))
            if self._jitter:
                plan["offsets"] = order.uniform(draw.keys(texts.FRAMES), self._frames)
        return plan

    def _sniff(self, encoded: bytes) -> tuple[int, int, int]:
        try:
            return videos.sniff(encoded) if self._frames else images.sniff(encoded)
        except ValueError:
            return _UNKNOWN

    def render(self, records: Sequence[Record], plan: Plan) -> tuple[np.ndarray, dict[int, str]]:
        """Decodes and augments, in the pool.

        Returns:
            uint8 [n, ...] of `shape`; {row: why} of the records that do not decode, whose rows
            hold nothing of use.
        """
        out = np.empty((len(records), *self.shape), np.uint8)
        rows = iter(range(len(records)))  # shared: the next thread that is free takes the next row
        failed: dict[int, str] = {}
        one = self._pair if self.pairs else self._planned(plan)

        def work() -> None:
            for row in rows:
                try:
                    out[row] = one(records[row], row)
                except ValueError as error:
                    failed[row] = str(error)

        tasks = [self._pool.submit(work) for _ in range(min(self.threads, len(records)))]
        for task in tasks:
            task.result()
        return out, failed

    def _planned(self, plan: Plan) -> Callable[[Record, int], np.ndarray]:
        lists = {name: plan[name].tolist() for name in ("how", "box", "ratio", "shrink")}
        arrays = {name: values for name, values in plan.items() if name not in lists}

        def render_row(record: Record, row: int) -> np.ndarray:
            step: dict[str, Any] = {name: values[row] for name, values in lists.items()}
            step |= {name: values[row] for name, values in arrays.items()}
            if self._native:
                return augment.render_native(record.image, step, *self._native, self._fast)
            how = (step, self._mode, self._size, self._fast, self._resize == "trim")
            if self._frames:
                return augment.render_clip(record.image, step["offsets"], *how)
            return augment.render(record.image, *how)

        return render_row

    def _pair(self, record: Record, row: int) -> np.ndarray:
        """Both images as in evaluation."""
        pixels = (images.decode(data) for data in (record.image, record.second))
        return np.stack([images.preprocess_eval(p, self._size, self._resize) for p in pixels])

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)


def one_of(draw: Draw, indices: np.ndarray, count: int) -> Draw:
    """The random choices of one of `count` augmentations of each record, int64 [n]: which one, the
    place of the example says, and what is drawn for it then follows from the record alone."""
    which = (draw.uniform(texts.FIXED)[:, 0] * count).astype(np.int64)
    return Draw(draw.seed, draw.source, indices * count + which)


def example_shape(config: Config) -> tuple[int, ...]:
    """The shape of one example's pixels; see `Pixels`."""
    if config.data.resize == "native":
        return navit.budget(config.model, config.data), shapes.width(navit.patch_size(config.model))
    images = images_of(config)
    count = images if images > 1 else config.data.num_frames
    return (*((count,) if count else ()), *shapes.pair(config.model.image_size), 3)


def plan_size(config: Config) -> Size:
    """The size of images; in their own aspect ratio, what the shorter side has at most."""
    if config.data.resize != "native":
        return config.model.image_size
    return (math.isqrt(navit.budget(config.model, config.data)) + 1) * navit.patch_size(
        config.model
    )


def images_of(config: Config) -> int:
    """How many images an example has."""
    head = heads.head_kind(config.head.kind)
    return head.images if head is not None else 1
