"""Reads items in batches by threads, some ahead of their use."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from coca_jax.runtime import machine

Item = TypeVar("Item")
AHEAD = 2  # batches


def batches(
    items: Iterable[Item], read: Callable[[Item], Any], size: int, ahead: int = AHEAD
) -> Iterator[list[tuple[Item, Any]]]:
    """Yields lists of (item, what `read` gives of it, or the ValueError or OSError why it cannot
    be), `size` at a time and in order; `ahead` batches are read ahead."""

    def safely(item: Item) -> Any:
        try:
            return read(item)
        except (ValueError, OSError) as error:
            return error

    rest = iter(items)
    with concurrent.futures.ThreadPoolExecutor(machine.count()) as pool:
        waiting: collections.deque = collections.deque()
        while True:
            batch = list(itertools.islice(rest, size))
            if batch:
                waiting.append([(item, pool.submit(safely, item)) for item in batch])
            if len(waiting) > ahead or not batch:
                if not waiting:
                    return
                yield [(item, found.result()) for item, found in waiting.popleft()]
