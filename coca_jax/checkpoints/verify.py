"""Checksums of a state's arrays that do not depend on how they lie on the devices.

Each array is reduced on its own devices to 32 bits: every element's bits, offset by its place, are
mixed one to one, and the results are added modulo 2^32. Such a sum is the same in any order, so on
any mesh, and it changes whenever one element does, whatever the change; of other damage one case in
2^32 would pass. The mixing is the finaliser of MurmurHash3 (Appleby 2011), whose steps are all one
to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from coca_jax.runtime import json_files, storage

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


def tree_shapes(tree: Any) -> dict[str, str]:
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


# What a checkpoint says of itself: its format, the run's config, a checksum of every array.
#
# The record is written with the checkpoint and appears with it: a complete checkpoint has one.


FORMAT = 1
ITEM = "record"
FILE = "metadata"  # Orbax's name for the file of a JSON item

# What storage says when the trouble is not in the contents: another try may do.
UNREACHABLE = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED"),
    *("RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"),
)


class Damaged(ValueError):
    """The contents of a checkpoint are not what was written."""


class Misfit(ValueError):
    """A checkpoint is whole, but belongs to another model or a newer version."""


def make(
    items: dict[str, Any], run: dict[str, Any], quarantine: Sequence[Sequence[Any]] = ()
) -> dict[str, Any]:
    """The record of {item: tree of arrays}; run: the contents of the run's config.json;
    quarantine: the rows of data/quarantine.py that the run had found."""
    trees = {}
    for item, tree in items.items():
        sums = of_tree(tree)
        trees[item] = {k: [shape, sums[k]] for k, shape in tree_shapes(tree).items()}
    manifest = {"format": FORMAT, "config": run, "items": trees}
    if quarantine:
        manifest["quarantine"] = list(quarantine)
    return json_files.seal(manifest)


def read_record(folder: epath.Path) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises Damaged when it is missing or incomplete, Misfit for another format.
    """
    file = folder / ITEM / FILE
    try:
        record = json_files.read_sealed(file)
        number, _, _ = record["format"], record["items"], record["config"]
    except FileNotFoundError:
        raise Damaged(f"{file} is missing") from None
    except KeyError as error:
        raise Damaged(f"{file} lacks {error}") from None
    except OSError:
        raise
    except ValueError as error:
        raise Damaged(str(error)) from None
    if number != FORMAT:
        raise Misfit(
            f"checkpoint {folder} has format {number}, this version reads format {FORMAT}; "
            "update coca_jax"
        )
    return record


def check_fits(folder: epath.Path, item: str, stored: dict[str, str], wanted: Any) -> None:
    """Raises Misfit naming the first array that the model and the checkpoint do not share.

    stored: {path: shape}, from the record. wanted: a tree of abstract arrays.
    """
    shapes = tree_shapes(wanted)
    for name in sorted(stored.keys() | shapes.keys()):
        there, here = stored.get(name, "missing"), shapes.get(name, "missing")
        if there != here:
            raise Misfit(
                f"checkpoint {folder} does not fit the model of this config ({item}/{name}: "
                f"{there} there, {here} here); use the config that made it, or a new workdir"
            )


def check_contents(folder: epath.Path, item: str, record: dict[str, Any], tree: Any) -> None:
    """Raises Damaged naming the first array whose contents are not those that were saved."""
    found = of_tree(tree)
    for name, (_, checksum) in record["items"][item].items():
        if found.get(name) != checksum:
            raise Damaged(f"{folder}: {item}/{name} holds other values than were saved")


def is_damage(error: Exception) -> bool:
    """Whether an error in reading says something of the contents, and not of the way to them."""
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return True
    if isinstance(error, (OSError, MemoryError)) or storage.is_of_network(error):
        return False
    return not any(word in str(error) for word in UNREACHABLE)
