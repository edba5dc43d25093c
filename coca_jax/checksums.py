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

# Below this many bytes on the CPU, NumPy is done before XLA has compiled the sums.
SMALL = 2**26


def of_tree(tree: Any) -> dict[str, int]:
    """{path: checksum} of the arrays in a tree of dicts and tuples, such as {'a/kernel': 1234}.

    With several processes all call it with the same tree and get the same numbers.
    """
    arrays = by_path(tree)
    if _small(arrays.values()):
        with np.errstate(over="ignore"):  # wrapping round is what is wanted
            return {name: int(sum_of(np.asarray(x), np)) for name, x in arrays.items()}
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
    def here(x: Any) -> bool:
        if isinstance(x, np.ndarray):
            return True
        return x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices())

    return sum(x.nbytes for x in arrays) < SMALL and all(here(x) for x in arrays)


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: sum_of(x, jnp) for name, x in arrays.items()}


def sum_of(x: Any, xp: ModuleType) -> Any:
    """uint32 of an array of bools, integers or floats of 8 to 64 bits. xp: numpy or jax.numpy."""
    bits = _bits(x, xp)
    for axis, size in enumerate(bits.shape):
        step = int(np.prod(bits.shape[axis + 1 :], dtype=np.uint64)) * 0x9E3779B1 % 2**32
        place = xp.arange(size, dtype=xp.uint32) * xp.uint32(step)
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
