"""Reads the tensors of a PyTorch .bin / .pt file without PyTorch and without running its pickle.

A file of torch.save is a zip archive of `data.pkl`, which describes the tensors, and one stored
entry of bytes a storage. The pickle may only name the handful of constructors below, each of which
is replaced by an inert class of this module: anything else in it is refused by name.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Maps the tensors of a state dict, by name; a training checkpoint's wrapper is taken off.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or its pickle asks for anything but tensors (named).
    """
    path = os.fspath(path)
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise ValueError(
            f"{path}: not a zip archive of torch.save; files older than PyTorch 1.6 must be saved "
            "again with a newer one"
        ) from None
    with archive:
        names = archive.namelist()
        pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ValueError(f"{path}: no data.pkl in it; it was not written by torch.save")
        root = pickles[0][: -len("data.pkl")]
        if any(name.startswith(root + "code/") for name in names):
            raise ValueError(f"{path}: a TorchScript archive; save its state_dict() instead")
        if root + "byteorder" in names and archive.read(root + "byteorder") != b"little":
            raise ValueError(f"{path}: big-endian; save it on a little-endian machine")
        storages = _Storages(path, archive, root + "data/")
        unpickler = _Unpickler(io.BytesIO(archive.read(pickles[0])), path, storages)
        try:
            loaded = unpickler.load()
        except ValueError:
            raise
        except Exception as error:  # a damaged pickle surfaces as any of a dozen types
            raise ValueError(f"{path}: damaged pickle: {error}") from None
        return {name: tensor.array() for name, tensor in _tensors(path, loaded).items()}


def strip_prefixes(names: Any) -> dict[str, str]:
    """Names in a file -> names in the model: a prefix that all of them have is taken off."""
    plain = {name: name for name in names}
    stripped = True
    while stripped and plain:
        stripped = False
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in plain.values()):
                plain = {name: short[len(prefix) :] for name, short in plain.items()}
                stripped = True
    return plain


class _Storages:
    """The bytes of each storage, mapped when stored plainly and unpacked when compressed."""

    def __init__(self, path: str, archive: zipfile.ZipFile, root: str):
        self.path, self.archive, self.root = path, archive, root
        self.file = np.memmap(path, np.uint8, mode="r")
        self.cache: dict[str, np.ndarray] = {}

    def load(self, key: str) -> np.ndarray:
        if key not in self.cache:
            try:
                info = self.archive.getinfo(self.root + key)
            except KeyError:
                raise ValueError(f"{self.path}: storage {key} is missing; file damaged") from None
            if info.compress_type == zipfile.ZIP_STORED:
                local = self.file[info.header_offset : info.header_offset + 30].tobytes()
                name_length, extra_length = struct.unpack("<HH", local[26:30])
                begin = info.header_offset + 30 + name_length + extra_length
                if begin + info.file_size > self.file.size:
                    raise ValueError(f"{self.path}: cut short in storage {key}")
                self.cache[key] = self.file[begin : begin + info.file_size]
            else:
                self.cache[key] = np.frombuffer(self.archive.read(info), np.uint8)
        return self.cache[key]


class _Dtype:
    """Stands for torch.FloatStorage and its kin."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class _Storage:
    def __init__(self, storages: _Storages, key: str, dtype: np.dtype):
        self.storages, self.key, self.dtype = storages, key, dtype


class _Tensor:
    """Stands for torch._utils._rebuild_tensor_v2: what a tensor is made of, not yet read."""

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any):
        self.storage, self.offset = storage, offset
        self.shape, self.stride = shape, stride

    def array(self) -> np.ndarray:
        if not isinstance(self.storage, _Storage):
            raise ValueError("a tensor without a storage; the file is damaged")
        numbers = (self.offset, *self.shape, *self.stride)
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a tensor with impossible sizes; the file is damaged")
        dtype = self.storage.dtype
        data = self.storage.storages.load(self.storage.key)
        data = data[: data.size // dtype.itemsize * dtype.itemsize].view(dtype)
        if len(self.shape) != len(self.stride):
            raise ValueError("a tensor with as many strides as it has not axes; file damaged")
        empty = math.prod(self.shape) == 0
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride))
        if not empty and last >= data.size:
            raise ValueError("a tensor reaches beyond its storage; the file is damaged")
        if empty:
            return np.zeros(self.shape, dtype)
        strides = tuple(s * dtype.itemsize for s in self.stride)
        return np.lib.stride_tricks.as_strided(
            data[self.offset :], self.shape, strides, writeable=False
        )


class _Parameter:
    """Stands for torch._utils._rebuild_parameter, which wraps a tensor."""

    def __new__(cls, tensor: Any, *_: Any) -> Any:
        return tensor


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: str, storages: _Storages):
        super().__init__(file, encoding="utf-8")
        self.path, self.storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Parameter
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Dtype(STORAGES[name])
        raise ValueError(
            f"{self.path}: its pickle asks for {module}.{name}, which is not a tensor; refused. "
            "Save the model's state_dict() alone"
        )

    def persistent_load(self, saved: Any) -> _Storage:
        if not (isinstance(saved, tuple) and len(saved) == 5 and saved[0] == "storage"):
            raise ValueError(f"{self.path}: a storage that torch.save does not write; refused")
        _, kind, key, _, _ = saved
        if not isinstance(kind, _Dtype) or not isinstance(key, str):
            raise ValueError(f"{self.path}: a storage that torch.save does not write; refused")
        return _Storage(self.storages, key, kind.dtype)


def _tensors(path: str, loaded: Any) -> dict[str, _Tensor]:
    while isinstance(loaded, dict):
        inner = [key for key in WRAPPERS if isinstance(loaded.get(key), dict)]
        if not inner:
            break
        loaded = loaded[inner[0]]
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise ValueError(f"{path}: entry {name!r} of the state dict is not a tensor")
    return loaded
