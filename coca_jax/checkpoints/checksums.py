"""Checksums of a state's arrays that do not depend on how they lie on the devices.

Each array is reduced on its own devices to 32 bits: every element's bits, offset by its place, are
mixed one to one, and the results are added modulo 2^32. Such a sum is the same in any order, so on
any mesh, and it changes whenever one element does, whatever the change; of other damage one case in
2^32 would pass. The mixing is the finaliser of MurmurHash3 (Appleby 2011), whose steps are all one
to one.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

# Below this many bytes on the CPU, NumPy is done before XLA has compiled the sums.
SMALL = 2**26


def of_tree(tree: Any) -> dict[str, int]:
    """{path: checksum} of the arrays in a tree of dicts and tuples, such as {'a/kernel': 1234}.

    With several processes all call it with the same tree and get the same numbers.
    """
    arrays = by_path(tree)
    if _small(arrays.values()):
        return dict(zip(arrays, _by_numpy([*arrays.values()]).tolist()))
    return {name: int(value) for name, value in jax.device_get(_sums(arrays)).items()}


def shapes(tree: Any) -> dict[str, str]:
    """{path: 'float32[2,3]'} of the arrays, or abstract arrays, in a tree."""
    return {
        name: f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"
        for name, x in by_path(tree).items()
    }


def by_path(tree: Any) -> dict[str, Any]:
    """{path: leaf} of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def _small(arrays: Any) -> bool:
    def on_cpu(x: Any) -> bool:
        return isinstance(x, np.ndarray) or all(d.platform == "cpu" for d in x.sharding.device_set)

    return sum(x.nbytes for x in arrays) < SMALL and all(on_cpu(x) for x in arrays)


@np.errstate(over="ignore")  # wrapping round is what is wanted
def _by_numpy(arrays: list[Any]) -> np.ndarray:
    """uint32 [arrays]: each process sums one copy of what it has, and all add up."""
    split = [not (isinstance(x, np.ndarray) or x.is_fully_addressable) for x in arrays]
    own = np.zeros(len(arrays), np.uint32)
    for number, x in enumerate(arrays):
        if jax.process_index() > 0 and any(split) and not split[number]:
            continue  # process 0 has it too
        for part, start in _parts(x):
            own[number] += sum_of(part, np, start, x.shape)
    return multihost_utils.process_allgather(own).sum(0, dtype=np.uint32) if any(split) else own


def _parts(x: Any) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    """What this process has of an array, and where in the whole each part begins."""
    if isinstance(x, np.ndarray):
        return [(x, (0,) * x.ndim)]
    shards = (shard for shard in x.addressable_shards if shard.replica_id == 0)
    return [(np.asarray(s.data), tuple(each.start or 0 for each in s.index)) for s in shards]


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: sum_of(x, jnp) for name, x in arrays.items()}


def sum_of(x: Any, xp: ModuleType, start: tuple[int, ...] = (), shape: tuple[int, ...] = ()) -> Any:
    """uint32 of an array of bools, integers or floats of 8 to 64 bits. xp: numpy or jax.numpy;
    start, shape: where x begins in an array of that shape, if it is a part of one."""
    bits = _bits(x, xp)
    shape = (*(shape or x.shape), *bits.shape[x.ndim :])
    for axis, size in enumerate(bits.shape):
        step = int(np.prod(shape[axis + 1 :], dtype=np.uint64)) * 0x9E3779B1 % 2**32
        first = start[axis] * step % 2**32 if axis < len(start) else 0
        place = xp.arange(size, dtype=xp.uint32) * xp.uint32(step) + xp.uint32(first)
        bits = bits + place.reshape((-1,) + (1,) * (bits.ndim - axis - 1))
    bits = (bits ^ (bits >> 16)) * xp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * xp.uint32(0xC2B2AE35)
    return (bits ^ (bits >> 16)).sum(dtype=xp.uint32)


def _bits(x: Any, xp: ModuleType) -> Any:
    """The bits of each element as uint32; of 64-bit ones as two, along a new last axis."""
    if x.dtype == bool:
        return x.astype(xp.uint32)
    size = x.dtype.itemsize
    unsigned = {1: xp.uint8, 2: xp.uint16}.get(size, xp.uint32)
    if xp is np:
        x = np.ascontiguousarray(x)
        whole = x.view(unsigned) if size <= 4 else x[..., None].view(unsigned)
    else:
        whole = jax.lax.bitcast_convert_type(x, unsigned)
    return whole.astype(xp.uint32)
