"""Reads the tensors of a PyTorch .bin / .pt file without PyTorch and without running its pickle.

A file of torch.save is a zip archive of `data.pkl`, which describes the tensors, and one stored
entry of bytes a storage. The pickle may only name the handful of constructors below, each of which
is replaced by an inert class of this module: anything else in it is refused by name. Sizes are
bounded, as a stranger's file may ask for any: of the pickle, of the names in it and of what a
compressed storage unpacks to.
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
MAX_PICKLE = 16 << 20  # bytes; a state dict takes about 250 for a tensor
MAX_NAME = 1000  # characters of a tensor's name
MAX_RATIO = 200  # of an unpacked storage to its compressed bytes, above MAX_PICKLE
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Maps the tensors of a state dict, by name; a training checkpoint's wrapper is taken off.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or its pickle asks for anything but tensors (named).
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a regular file")
    try:
        with _archive(path) as archive:
            return _read(path, archive)
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # a damaged zip file surfaces as any of a dozen types
        raise ValueError(f"{path}: damaged: {type(error).__name__}: {error}") from None


class _Refused(Exception):
    """What is wrong with a file, in words of this module."""


def _archive(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        with open(path, "rb") as file:
            begun = file.read(4) == b"PK\3\4"
        if begun:  # the list of what it holds stands at its end
            raise _Refused("cut short, as by a download that broke off; get it again") from None
        raise _Refused(
            "not a zip archive of torch.save; files older than PyTorch 1.6 must be saved again "
            "with a newer one"
        ) from None


def _read(path: str, archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    names = archive.namelist()
    pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise _Refused("no data.pkl in it; it was not written by torch.save")
    root = pickles[0][: -len("data.pkl")]
    if any(name.startswith(root + "code/") for name in names):
        raise _Refused("a TorchScript archive; save its state_dict() instead")
    if root + "byteorder" in names and _entry(archive, root + "byteorder", 64) != b"little":
        raise _Refused("big-endian; save it on a little-endian machine")
    storages = _Storages(path, archive, root + "data/")
    pickled = _entry(archive, pickles[0], MAX_PICKLE)
    try:
        loaded = _Unpickler(io.BytesIO(pickled), storages).load()
    except _Refused:
        raise
    except Exception as error:  # a damaged pickle surfaces as any of a dozen types
        raise _Refused(f"damaged pickle: {type(error).__name__}: {error}") from None
    return {name: tensor.array() for name, tensor in _tensors(loaded).items()}


def _entry(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """An entry of an archive, however it is compressed, of at most so many bytes."""
    with archive.open(name) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise _Refused(f"{name} has more than {most} bytes")
    return data


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
        self.archive, self.root = archive, root
        self.file = np.memmap(path, np.uint8, mode="r")
        self.cache: dict[str, np.ndarray] = {}

    def load(self, key: str) -> np.ndarray:
        if key not in self.cache:
            try:
                info = self.archive.getinfo(self.root + key)
            except KeyError:
                raise _Refused(f"storage {key[:80]} is missing; the file is damaged") from None
            if info.flag_bits & 1:
                raise _Refused(f"storage {key} is encrypted; save it without")
            if info.compress_type == zipfile.ZIP_STORED:
                self.cache[key] = self._mapped(key, info)
            elif info.file_size > max(MAX_PICKLE, MAX_RATIO * info.compress_size):
                raise _Refused(
                    f"storage {key} unpacks from {info.compress_size} bytes to {info.file_size}; "
                    "save it uncompressed"
                )
            else:
                self.cache[key] = np.frombuffer(self.archive.read(info), np.uint8)
        return self.cache[key]

    def _mapped(self, key: str, info: zipfile.ZipInfo) -> np.ndarray:
        start = info.header_offset
        local = self.file[start : start + 30].tobytes() if start >= 0 else b""
        if len(local) < 30:
            raise _Refused(f"cut short in storage {key}")
        name_length, extra_length = struct.unpack("<HH", local[26:30])
        begin = start + 30 + name_length + extra_length
        if begin + info.file_size > self.file.size:
            raise _Refused(f"cut short in storage {key}")
        return self.file[begin : begin + info.file_size]


class _Dtype:
    """Stands for torch.FloatStorage and its kin."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class _Storage:
    def __init__(self, storages: _Storages, key: str, dtype: np.dtype):
        self.storages, self.key, self.dtype = storages, key, dtype

    def __repr__(self) -> str:  # in messages of the pickle machine
        return f"storage {self.key[:80]}"


class _Tensor:
    """Stands for torch._utils._rebuild_tensor_v2: what a tensor is made of, not yet read."""

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any):
        self.storage, self.offset = storage, offset
        self.shape, self.stride = shape, stride

    def array(self) -> np.ndarray:
        if not isinstance(self.storage, _Storage):
            raise _Refused("a tensor without a storage; the file is damaged")
        numbers = (self.offset, *self.shape[:65], *self.stride[:65])
        if len(numbers) > 65 or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise _Refused("a tensor with impossible sizes; the file is damaged")
        dtype = self.storage.dtype
        data = self.storage.storages.load(self.storage.key)
        data = data[: data.size // dtype.itemsize * dtype.itemsize].view(dtype)
        if len(self.shape) != len(self.stride):
            raise _Refused("a tensor with as many strides as it has not axes; file damaged")
        empty = math.prod(self.shape) == 0
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride))
        if not empty and last >= data.size:
            raise _Refused("a tensor reaches beyond its storage; the file is damaged")
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


class _Unpickler(pickle._Unpickler):
    """The pickle machine in Python: the one in C reserves memory up to any index that is named."""

    stack: list

    def __init__(self, file: io.BytesIO, storages: _Storages):
        super().__init__(file, encoding="utf-8")
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Parameter
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Dtype(STORAGES[name])
        raise _Refused(
            f"its pickle asks for {module}.{name}, which is not a tensor; refused. "
            "Save the model's state_dict() alone"
        )

    def persistent_load(self, saved: Any) -> _Storage:
        if not (isinstance(saved, tuple) and len(saved) == 5 and saved[0] == "storage"):
            raise _Refused("a storage that torch.save does not write; refused")
        _, kind, key, _, _ = saved
        if not isinstance(kind, _Dtype) or not isinstance(key, str):
            raise _Refused("a storage that torch.save does not write; refused")
        return _Storage(self.storages, key, kind.dtype)

    def load_build(self) -> None:
        """Attributes of an object. A state dict has the versions of its modules there, which say
        nothing here; on what this module defines nothing is ever set."""
        self.stack.pop()
        if type(self.stack[-1]) is not collections.OrderedDict:
            raise _Refused("its pickle sets attributes of what is no state dict; refused")

    def load_bytearray8(self) -> None:
        """Reserves as many bytes as it names, before it reads one."""
        raise _Refused("its pickle holds a bytearray, which is no tensor; refused")

    dispatch = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8  # type: ignore[assignment]


def _tensors(loaded: Any) -> dict[str, _Tensor]:
    for _ in WRAPPERS:  # one in another at most; a dict may hold itself
        inner = [key for key in WRAPPERS if isinstance(loaded, dict) and key in loaded]
        inner = [key for key in inner if isinstance(loaded[key], dict)]
        if not inner:
            break
        loaded = loaded[inner[0]]
    if not isinstance(loaded, dict):
        raise _Refused(f"holds a {type(loaded).__name__}, not a state dict")
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise _Refused(f"an entry of the state dict has a {type(name).__name__} for a name")
        if len(name) > MAX_NAME or not isinstance(value, _Tensor):
            raise _Refused(f"entry {name[:80]!r} of the state dict is not a tensor")
    return loaded
