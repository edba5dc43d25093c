"""Batches that a run leaves out, and which batch a step then trains on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from coca_jax.data.batches import Stream, open_stream

Ranges = tuple[tuple[int, int], ...]  # (first, last) numbers of batches, in order, disjoint


def number_of(step: int, left_out: Ranges) -> int:
    """The number of the batch that step `step` (from 0) trains on."""
    for first, last in left_out:
        if step >= first:
            step += last - first + 1
    return step


def leave_out(first: int, last: int, left_out: Ranges) -> Ranges:
    """`left_out` and the batches of the steps first to last (from 0) besides."""
    new = [(number_of(first, left_out), number_of(last, left_out)), *left_out]
    merged: list[tuple[int, int]] = []
    for start, end in sorted(new):
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


class Batches:
    """The batches of a run from a step on, without those that are left out.

    Args:
        left_out: numbers of batches.
        start: the step, from 0, of the first one.
        arguments: what `open_stream` takes.
    """

    def __init__(self, left_out: Ranges, start: int, *arguments: Any, **named: Any):
        self._left_out, self._step = left_out, start
        self._arguments, self._named = arguments, named
        self._stream = self._open()

    def _open(self) -> Stream:
        number = number_of(self._step, self._left_out)
        return open_stream(*self._arguments, **self._named, start_step=number)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._stream.step != number_of(self._step, self._left_out):
            self._stream.close()
            self._stream = self._open()
        batch = next(self._stream)
        self._step += 1
        return batch

    def progress(self, step: int) -> dict[str, float]:
        """See `Stream.progress`."""
        return self._stream.progress(number_of(step, self._left_out))

    def close(self) -> None:
        """See `Stream.close`."""
        self._stream.close()
