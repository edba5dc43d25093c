"""The safetensors format: arrays mapped from a file, and written one block at a time.

The package `safetensors` reads and checks the header (its size, that the arrays lie one behind the
other without a gap or an overlap). What it does not do is done here: arrays that stay on the disk
until they are used, and a file that is written with no more than one block in memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from coca_jax.runtime import progress as bars
from coca_jax.runtime import storage

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class Blocks(NamedTuple):
    """A float32 array of `shape` in pieces: `parts()` gives them in C order, one after another."""

    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Maps the arrays of a file, by name; nothing is read before it is used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not safetensors, is cut short, or its header is inconsistent.
    """
    path = os.fspath(path)
    arrays = {}
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: not a regular file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file, open(path, "rb") as raw:
            (position,) = struct.unpack("<Q", raw.read(8))
            position += 8
            data = np.memmap(path, np.uint8, mode="r")
            for name in file.offset_keys():  # in the order of their bytes, which leave no gap
                array = _view(path, data[position:], name, file.get_slice(name))
                position += array.nbytes
                arrays[name] = array
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one: {error}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    return arrays


def about(path: str | os.PathLike[str]) -> dict[str, str]:
    """What `write` was told about the arrays of a file. Raises ValueError for a damaged one."""
    try:
        with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one: {error}") from None


def _view(path: str, data: np.ndarray, name: str, entry: Any) -> np.ndarray:
    dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
    if dtype not in DTYPES:
        raise ValueError(f"{path}: {name} has dtype {dtype}; save it as one of {', '.join(DTYPES)}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    try:
        return data[:size].view(DTYPES[dtype]).reshape(shape)
    except ValueError as error:  # more axes than numpy knows
        raise ValueError(f"{path}: {name} of {len(shape)} axes: {error}") from None


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Blocks],
    *,
    progress: bool = False,
    about: Mapping[str, str] | None = None,
    dtype: str = "F32",
) -> None:
    """Writes float32 arrays, block by block; the file appears under its name when complete.
    progress: show a bar of its bytes. about: words that the file says of them. dtype: of DTYPES,
    to which they are rounded.

    Raises:
        ValueError: an array's blocks do not add up to its shape.
    """
    header, offset, stored = {}, 0, DTYPES[dtype]
    for name, blocks in tensors.items():
        end = offset + stored.itemsize * math.prod(blocks.shape)
        header[name] = dict(dtype=dtype, shape=list(blocks.shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt", **(about or {})}, **header}).encode()
    text += b" " * (-len(text) % 8)  # the arrays start aligned
    bar = bars.Bar(offset, "bytes", shown=progress, thousands=True)
    with storage.whole_file(path) as temporary, bar, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, blocks in tensors.items():
            before = file.tell()
            for block in blocks.parts():
                data = np.ascontiguousarray(block, stored).view(np.uint8).data
                file.write(data)
                bar.update(data.nbytes)
            if file.tell() - before != stored.itemsize * math.prod(blocks.shape):
                raise ValueError(f"{name}: its blocks do not add up to its shape {blocks.shape}")


def same(there: Mapping[str, np.ndarray], tensors: Mapping[str, Blocks]) -> bool:
    """Whether a file's arrays are those that would be written, value for value, and no others."""
    if {name: x.shape for name, x in there.items()} != {k: x.shape for k, x in tensors.items()}:
        return False
    for name, blocks in tensors.items():
        flat, begin = there[name].reshape(-1), 0
        for block in blocks.parts():
            end = begin + block.size
            if not np.array_equal(flat[begin:end], np.asarray(block, np.float32).reshape(-1)):
                return False
            begin = end
    return True


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises ValueError naming an array that has values which are NaN or infinite."""
    with np.errstate(all="ignore"):
        if np.isfinite(array.sum(dtype=np.float64)):  # without a second array where all is well
            return
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise ValueError(f"{name} has {bad} values that are not finite (NaN or infinite)")
