"""A frozen image encoder runs once over the data: its tokens are kept, and batches read them."""

from __future__ import annotations

import time
import typing
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from coca_jax.checkpoints import verify
from coca_jax.data import feature_cache
from coca_jax.data.feature_cache import Features
from coca_jax.data.pixels import Pixels
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.source import read_all
from coca_jax.data.texts import Draw
from coca_jax.models import param_groups
from coca_jax.models.image_encoder import normalise_pixels
from coca_jax.parallel import sharding
from coca_jax.runtime import activity

if typing.TYPE_CHECKING:
    from coca_jax.training.trainer import Trainer

BLOCK = 64  # images of a call on each part of the batch
SAY_SECONDS = 20.0


def keep(trainer: Trainer) -> tuple[Features, ...]:
    """The kept tokens of each source of a run with data.features, computed now where they are not
    there; () for a run without. It can be left at any moment, and goes on at the next start.

    Raises ValueError for a folder that is too small for all, or a damaged one; OSError where the
    disk is full.
    """
    config = trainer.config
    if not config.data.features:
        return ()
    of_tower = config.model.family != "coca"  # all of it is locked, up to the embedding
    encoder = param_groups.select(
        trainer.state.params,
        lambda part: part.tower == "image" if of_tower else part.serves == "image",
    )
    sums = verify.of_tree(encoder)
    pixels = Pixels(config)
    found: list[Features] = []
    for number, source in enumerate(trainer.mixture.sources):  # all, before hours go into the first
        rows = len(source) * feature_cache.augmentations(config)
        about = feature_cache.about(config, source, number, sums)
        before = sum(store.to_come for store in found)
        found.append(Features(config.data.features, about, rows, config, before))
    for number, store in enumerate(found):
        missing = store.missing()
        if len(missing):
            name = trainer.mixture.sources[number].name
            trainer.begin(f"computing features of {name} ({len(missing)} of {store.rows} images)")
            reads = trainer.mixture.stages[-1].seen(trainer.steps)[number]
            if reads < len(missing):
                trainer.say(
                    f"features: this run reads {reads} of these at most, and all are kept, for "
                    "other runs too; `limit` of the source, or data.features='', does with fewer"
                )
            _Filling(trainer, encoder, pixels, number, store).fill(missing)
    pixels.close()
    return tuple(found)


class _Filling:
    """Computes the tokens of one source, a block read ahead."""

    def __init__(
        self, trainer: Trainer, encoder: Any, pixels: Pixels, number: int, store: Features
    ):
        self._trainer, self._encoder, self._pixels, self._store = trainer, encoder, pixels, store
        self._number, self._source = number, trainer.mixture.sources[number]
        self._count = feature_cache.augmentations(trainer.config)
        model, config = trainer.model, trainer.config

        def encode(params: Any, image: jax.Array) -> jax.Array:
            pixels = normalise_pixels(image, config.model)
            found: Any = model.apply({"params": params}, pixels, method="locked_features")
            return found.astype(feature_cache.dtype(config))

        self._encode = jax.jit(encode)

    def fill(self, missing: np.ndarray) -> None:
        """Computes and keeps the rows `missing`."""
        size = BLOCK * sharding.batch_parts(self._trainer.mesh)
        blocks = [missing[start : start + size] for start in range(0, len(missing), size)]
        began, done = time.monotonic(), 0
        last_log = began
        with ThreadPoolExecutor(1, "features") as ahead:
            coming = ahead.submit(self._read, blocks[0])
            for number, rows in enumerate(blocks):
                records, image, failed = coming.result()
                if number + 1 < len(blocks):
                    coming = ahead.submit(self._read, blocks[number + 1])
                self._keep(rows, records, image, failed, size)
                activity.alive()
                done += len(rows)
                now = time.monotonic()
                if now - last_log > SAY_SECONDS and done < len(missing):
                    left = (now - began) / done * (len(missing) - done)
                    message = f"features: {done} of {len(missing)} images"
                    self._trainer.say(f"{message}, {max(1, round(left / 60))} min left")
                    last_log = now

    def _read(self, rows: np.ndarray) -> tuple[list[Record], np.ndarray, dict[int, str]]:
        records, _ = read_all(self._source, rows // self._count)
        draw = Draw(self._trainer.config.seed, self._number, rows)
        return records, *self._pixels.render(records, self._pixels.drawn(records, draw))

    def _keep(
        self,
        rows: np.ndarray,
        records: list[Record],
        image: np.ndarray,
        failed: dict[int, str],
        size: int,
    ) -> None:
        padded = np.zeros((size, *image.shape[1:]), image.dtype)
        padded[: len(image)] = image
        placed = sharding.place_batch(self._trainer.mesh, {"image": padded})
        tokens = np.asarray(self._encode(self._encoder, placed["image"]))
        bad = np.array(sorted(failed), np.int64)
        good = np.setdiff1d(np.arange(len(rows)), bad)
        self._store.write(rows[good], [records[i] for i in good], tokens[good])
        unreadable = [
            i for i in bad.tolist() if records[i].image
        ]  # others could not be read at all
        self._store.write_bad(rows[unreadable], [records[i] for i in unreadable])
