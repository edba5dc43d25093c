"""Batches on their way to the devices: read ahead in a thread, placed, cut to their captions."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from coca_jax import partitioning
from coca_jax.config import Config
from coca_jax.data.batches import trained
from coca_jax.metrics import TimeBuckets
from coca_jax.training import text_lengths

Measured = tuple[dict[str, jax.Array], text_lengths.Lengths]


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
        arranged = (text_lengths.arrange(batch, config) for batch in rows)
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
                self._put(partitioning.place_batch(mesh, batch))
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
    longest = jax.jit(lambda valid: text_lengths.longest(valid, config))
    ahead: tuple[dict[str, jax.Array], jax.Array] | None = None
    for batch in feed:
        asked = (batch, longest(batch["text_valid"]))
        if ahead is not None:
            yield ahead[0], text_lengths.choose(config, np.asarray(ahead[1]).tolist())
        ahead = asked
