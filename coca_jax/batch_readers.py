"""Which processes read which rows of a batch: the same where their devices hold the same shards."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding


@functools.lru_cache(maxsize=4)  # every batch asks
def of(sharding: NamedSharding, shards: int) -> tuple[int, int]:
    """(which reader of batches this process is, how many readers there are).

    Processes whose devices hold the same shards of a batch, as with parameters split over them
    (mesh.tensor), are one reader: they read the same rows. sharding: of a batch, in so many shards.
    Raises ValueError as `numbers`.
    """
    held: dict[int, set[int]] = {}
    places: Any = sharding.devices_indices_map((shards,))
    for device, (rows,) in places.items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    found = numbers(held)
    return found[jax.process_index()], len(set(found.values()))


def numbers(held: dict[int, set[int]]) -> dict[int, int]:
    """{process: the number of its reader}, readers in the order of their first shards.

    held: the shards of a batch on the devices of each process. Raises ValueError where two
    processes hold some shards in common and not all, or not equally many.
    """
    some, first = next(iter(held)), dict[int, int]()  # first: the first process with each shard
    for process, shards in held.items():
        for other in {first.setdefault(shard, process) for shard in shards} | {some}:
            theirs = held[other]
            if len(theirs) != len(shards) or (theirs & shards and theirs != shards):
                raise ValueError(
                    f"process {other} holds the batch shards {sorted(theirs)} and process "
                    f"{process} {sorted(shards)}: they can read neither the same rows nor an equal "
                    "share each; choose a mesh.tensor that divides the devices of a process or is "
                    "a multiple of them"
                )
    starts = sorted({min(shards) for shards in held.values()})
    return {process: starts.index(min(shards)) for process, shards in held.items()}
