"""The safetensors format: arrays mapped from a file, and written one block at a time.

A file is a little-endian uint64 (length of the header), the header as JSON (name -> dtype, shape,
offsets of its bytes) and the bytes. Reading maps the file, so only what is used is read; writing
takes an iterable of blocks for each array, so no more than one block need be in memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

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
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path}: not a safetensors file, or cut short")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise ValueError(f"{path}: not a safetensors file (no JSON header)") from None
    bytes_ = np.memmap(path, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    header.pop("__metadata__", None)
    return {name: _view(path, bytes_[8 + length :], name, entry) for name, entry in header.items()}


def _view(path: str, data: np.ndarray, name: str, entry: dict) -> np.ndarray:
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{path}: {name} has dtype {entry['dtype']}; save it as one of {', '.join(DTYPES)}"
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= data.size or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path}: {name} of shape {shape} has no such bytes; the file is damaged")
    return data[begin:end].view(dtype).reshape(shape)


def write(path: str | os.PathLike[str], tensors: Mapping[str, Blocks]) -> None:
    """Writes float32 arrays, block by block; the file appears under its name when complete.

    Raises:
        ValueError: an array's blocks do not add up to its shape.
    """
    header, offset = {}, 0
    for name, blocks in tensors.items():
        end = offset + 4 * math.prod(blocks.shape)
        header[name] = dict(dtype="F32", shape=list(blocks.shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # the arrays start aligned
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, blocks in tensors.items():
            before = file.tell()
            for block in blocks.parts():
                file.write(np.ascontiguousarray(block, "<f4").data)
            if file.tell() - before != 4 * math.prod(blocks.shape):
                raise ValueError(f"{name}: its blocks do not add up to its shape {blocks.shape}")
    os.replace(temporary, path)
