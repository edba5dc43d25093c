"""The order of the data, and every random choice in it, as functions of integers.

Nothing here has state: example n of an epoch and the draws made for it follow from
(seed, source, position) alone, so they are the same after a resume, on any number of hosts, and
with any version of numpy (whose own generators do not promise a stable stream).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 8
_ALL = 2**64 - 1


def mix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser: uint64 [...] -> uint64 [...], a bijection that looks random."""
    x = (x + _GOLDEN).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: int | np.ndarray) -> np.ndarray:
    """Hashes integers (or arrays of them, broadcast) to uint64 keys; the order of parts matters."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix(state ^ np.atleast_1d(np.asarray(part)).astype(np.int64).view(np.uint64))
    return state


def key_of(parts: Iterable[int]) -> int:
    """The one key of single integers that `key` gives, for hundreds of them in a fraction of the
    time: numpy takes a microsecond for each step of each."""
    state = 0
    for part in parts:
        x = ((state ^ (part & _ALL)) + 0x9E3779B97F4A7C15) & _ALL
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _ALL
        state = x ^ (x >> 31)
    return state


def uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """`count` independent numbers in [0, 1) for each key: uint64 [n] -> float64 [n, count]."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN  # the SplitMix64 generator
    streams = mix(keys[:, None] + steps[None, :])
    return (streams >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(positions: np.ndarray, size: int, permutation_key: int | np.ndarray) -> np.ndarray:
    """Where each position goes in a random permutation of range(size), without building it.

    A Feistel network permutes the next power of four; walking its cycle until the value is below
    `size` restricts that to range(size) (Black and Rogaway 2002).

    Args:
        positions: int64 [n], in [0, size).
        size: of the permutation.
        permutation_key: uint64, scalar or [n]: which permutation.

    Returns:
        int64 [n], in [0, size): a bijection for a fixed key.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.broadcast_to(np.asarray(permutation_key, np.uint64), positions.shape)
    value = positions.astype(np.uint64)
    todo = np.arange(len(value))
    while todo.size:
        left, right = value[todo] >> half, value[todo] & mask
        for round_ in range(_ROUNDS):
            scrambled = mix(right ^ mix(keys[todo] + np.uint64(round_)))
            left, right = right, left ^ (scrambled & mask)
        value[todo] = (left << half) | right
        todo = todo[value[todo] >= size]
    return value.astype(np.int64)


def indices(positions: np.ndarray, size: int, seed: int, source: int) -> np.ndarray:
    """The example of a source of `size` at each position of its endless shuffled stream.

    Position p lies in epoch p // size; each epoch has its own permutation, so every example
    appears exactly once an epoch. int64 [n] -> int64 [n].
    """
    epoch, offset = np.divmod(positions, size)
    return permute(offset, size, key(seed, source, epoch, 0x0DE5))


def rows(shares: list[int]) -> np.ndarray:
    """Which source each row of a batch comes from: int32 [sum(shares)], evenly interleaved.

    Any contiguous slice holds each source in proportion, to within one row: the slice of one
    process, or one micro-batch, is mixed as the whole batch is.
    """
    when = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
    source = np.repeat(np.arange(len(shares), dtype=np.int32), shares)
    return source[np.argsort(when, kind="stable")]
