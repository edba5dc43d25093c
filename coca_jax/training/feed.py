"""Batches on their way to the devices: read ahead in a thread, placed, cut to their captions."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from coca_jax.config import Config, shapes
from coca_jax.data.batches import trained
from coca_jax.parallel import sharding
from coca_jax.runtime.metric_log import TimeBuckets

# Short captions do not pay for long ones: batches cut to their captions, the longest apart.
#
# With `config.text_lengths` a batch's captions are cut to the smallest of these lengths that holds
# them. In a large batch some caption is always long; with `config.text_parts=4` the longest quarter
# of the rows stands in every fourth place and runs apart, so that the others are cut further. Losses
# and gradients stay what they are: padding counts nowhere. Each pair of lengths is one compiled
# graph.


Lengths = tuple[int, int]  # of the most rows, and of the longest ones


def arrange(batch: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Reorders the rows of a process: the longest captions to the places that `long_rows` names.

    The rows of a step stay the same; the others keep their order.
    """
    if config.text_parts == 1:
        return batch
    long = long_rows(len(batch["text_valid"]), config)
    ranks = np.argsort(shapes.lengths(batch["text_valid"]), kind="stable")
    rows = np.empty(len(long), np.int64)
    rows[~long] = np.sort(ranks[: (~long).sum()])
    rows[long] = np.sort(ranks[(~long).sum() :])
    return {name: values[rows] for name, values in batch.items()}


def long_rows(rows: int, config: Config) -> np.ndarray:
    """bool [rows]: where the longest captions are, in every micro-batch and on every device."""
    place = np.arange(rows) // config.accumulate_steps  # micro-batches take rows in turn
    return place % config.text_parts == config.text_parts - 1


def longest_text(text_valid: jax.Array, config: Config) -> jax.Array:
    """text_valid bool [B, L] of an arranged batch -> int32 [2]: the longest caption but for the
    long rows, and of all. Replicated, so that all processes agree."""
    count = shapes.lengths(text_valid)
    rest = jnp.where(jnp.asarray(long_rows(len(count), config)), 0, count)
    if config.text_parts == 1:
        rest = count
    found = jnp.stack([rest.max(), count.max()])
    return jax.lax.with_sharding_constraint(found, jax.sharding.PartitionSpec())


def choose(config: Config, found: Sequence[int]) -> Lengths:
    """The smallest of config.text_lengths and max_len that hold what `longest` found."""
    whole = config.model.text.max_len
    # The mask of open_clip's released models looks one place past the text.
    beyond = 0 if config.model.text.cls_mask == "exact" else 1
    short, long = (
        min((n for n in config.text_lengths if count + beyond <= n < whole), default=whole)
        for count in found
    )
    return short, long


def trim(batch: dict[str, jax.Array], length: int) -> dict[str, jax.Array]:
    """The batch with captions cut to [B, length], where nothing but padding lies beyond."""
    return batch | {name: batch[name][:, :length] for name in ("tokens", "text_valid")}


Measured = tuple[dict[str, jax.Array], Lengths]


class Feed:
    """The batches of a run in order, each with the lengths to which its captions are cut.

    Args:
      batches: of this process, as numpy arrays, from the step at which the run begins.
      buckets: where the time that the devices wait for data is counted, as 'data_wait'.
    """

    def __init__(
        self,
        batches: Iterator[dict[str, np.ndarray]],
        config: Config,
        mesh: Mesh,
        buckets: TimeBuckets,
    ):
        rows = (trained(batch, config) for batch in batches)
        arranged = (arrange(batch, config) for batch in rows)
        self._prefetched = prefetch(arranged, mesh)
        self._measured = measured(self._prefetched, config)
        self._buckets = buckets
        self._waited = 0.0

    def __next__(self) -> Measured:
        start = time.perf_counter()
        with self._buckets("data_wait"):
            batch = next(self._measured)
        self._waited += time.perf_counter() - start
        return batch

    def take_waited(self) -> float:
        """Seconds waited for batches since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Stops the reading thread."""
        self._prefetched.close()


class prefetch:  # noqa: N801 (used like a function)
    """Reads batches in a thread and places them on the mesh, two ahead of the step."""

    _END = object()

    def __init__(self, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh, depth: int = 2):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(batches, mesh), daemon=True)
        self._thread.start()

    def _work(self, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh) -> None:
        try:
            for batch in batches:
                self._put(sharding.place_batch(mesh, batch))
                if self._stop.is_set():
                    return
            self._put(self._END)
        except BaseException as error:  # handed to the training thread, which raises it
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def __iter__(self) -> prefetch:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        item = self._queue.get()
        if item is self._END:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops the reading thread."""
        self._stop.set()
        self._thread.join(timeout=30)


def measured(feed: Iterator[dict[str, jax.Array]], config: Config) -> Iterator[Measured]:
    """Batches with the lengths to which their captions are cut.

    The devices find the longest captions of the global batch, so all processes agree. Those of a
    batch are asked for before the step of the batch ahead of it, so the answer does not wait for
    that step.
    """
    if not config.text_lengths:
        for batch in feed:
            yield batch, (config.model.text.max_len,) * 2
        return
    longest = jax.jit(lambda valid: longest_text(valid, config))
    ahead: tuple[dict[str, jax.Array], jax.Array] | None = None
    for batch in feed:
        asked = (batch, longest(batch["text_valid"]))
        if ahead is not None:
            yield ahead[0], choose(config, np.asarray(ahead[1]).tolist())
        ahead = asked
