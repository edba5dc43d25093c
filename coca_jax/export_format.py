"""The export folder: weights without optimizer state, with all that it takes to use them.

    config.json          'model' (config.model), 'preprocess', 'tokenizer'
    params.safetensors   float32, by path 'a/b/c', layers stacked: the layout of models/
    vocabulary.*         the tokenizer's file

The configuration is written last: a folder that has one is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from coca_jax import storage
from coca_jax.config import StoredConfig, read
from coca_jax.data import bounded_json
from coca_jax.interop import safetensors_file
from coca_jax.interop.safetensors_file import Blocks

if TYPE_CHECKING:
    import jax

_DEEPEST = 32  # levels of a tree of parameters
CONFIG, PARAMS = "config.json", "params.safetensors"
PLATFORMS = ("cpu", "tpu", "cuda", "rocm")  # that exported programs may be for


def check_platforms(platforms: Iterable[str]) -> None:
    """Raises ValueError for a platform that programs cannot be exported for."""
    for platform in platforms:
        if platform not in PLATFORMS:
            raise ValueError(f"--platforms={platform}: choose from {', '.join(PLATFORMS)}")


def is_export(directory: str | os.PathLike[str]) -> bool:
    """Whether the folder, which may be in a bucket, is a complete export."""
    return all((storage.place(directory) / name).exists() for name in (CONFIG, PARAMS))


def write_export(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    vocabulary_path: str | os.PathLike[str],
) -> None:
    """Writes an export folder.

    Args:
        params: nested dict of arrays, or flat by path; an array may be `Blocks`, which are written
            one at a time.
        config: 'model', and 'preprocess' {'resize', 'mean', 'std'}; 'tokenizer' is added.
        vocabulary_path: the tokenizer's file, copied.

    Raises:
        FileNotFoundError: no such vocabulary.
    """
    os.makedirs(directory, exist_ok=True)
    tensors = {path: _blocks(array) for path, array in flatten(params).items()}
    safetensors_file.write(os.path.join(directory, PARAMS), tensors)
    name = "vocabulary" + _suffixes(vocabulary_path)
    target = os.path.join(directory, name)
    if os.path.abspath(target) != os.path.abspath(vocabulary_path):
        shutil.copyfile(vocabulary_path, target)
    plain = dict(config)
    plain["tokenizer"] = plain.get("tokenizer", {}) | {"file": name}
    temporary = os.path.join(directory, f"{CONFIG}.tmp")
    with open(temporary, "w") as file:
        json.dump(plain, file, indent=2)
    os.replace(temporary, os.path.join(directory, CONFIG))


def read_export(directory: str | os.PathLike[str]) -> tuple[dict, StoredConfig]:
    """(params, config) of an export folder; params is a nested dict of float32 arrays mapped from
    the file, so nothing is read before it is used. From a bucket a temporary copy is mapped.

    Raises:
        FileNotFoundError: the folder is not an export.
        ValueError: a file in it is damaged.
    """
    config = read_config(directory)
    with storage.local_copy(storage.place(directory) / PARAMS) as file:
        arrays = safetensors_file.read(file)
    try:
        return unflatten(arrays), config
    except ValueError as error:
        raise ValueError(f"{os.path.join(directory, PARAMS)}: {error}") from None


def read_config(directory: str | os.PathLike[str]) -> StoredConfig:
    """The configuration of an export folder; `data.resize` is what it says of preprocessing.

    Raises:
        FileNotFoundError: the folder is not an export.
        ValueError: its configuration is damaged.
    """
    path = storage.place(directory) / CONFIG
    if not is_export(directory):
        raise FileNotFoundError(f"{os.fspath(directory)}: no {CONFIG} and {PARAMS}: not an export")
    try:
        found = bounded_json.parse(path.read_bytes())
        for section in ("model", "tokenizer"):
            if not isinstance(found, dict) or not isinstance(found.get(section), dict):
                raise ValueError(f"it has no {section!r}; it is not the configuration of an export")
        kept = ("model", "head", "class_names")
        tree: dict[str, Any] = {key: found[key] for key in kept if key in found}
        preprocess = found.get("preprocess") or {}
        if "resize" in preprocess:
            tree["data"] = {"resize": preprocess["resize"]}
        tree["tokenizer"] = _tokenizer(found["tokenizer"].get("file"))
        return read(StoredConfig, tree, old=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _tokenizer(name: Any) -> str:
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise ValueError(f"tokenizer.file={name!r} is not the name of a file beside it")
    return name


def vocabulary_path(directory: str | os.PathLike[str]) -> str:
    """The tokenizer's file in an export folder.

    Raises ValueError where the configuration names anything but a file in it.
    """
    return os.path.join(directory, read_config(directory).tokenizer)


def place(params: Any, shardings: Any) -> Any:
    """Mapped arrays -> arrays on a mesh; each process reads the parts that its devices hold.

    Args:
        params: nested dict of arrays (as `read_export` gives).
        shardings: the same tree of jax.sharding.NamedSharding.
    """
    import jax  # only here: commands read a folder's configuration without it

    def one(array: np.ndarray, sharding: Any) -> jax.Array:
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: np.array(array[index])
        )

    return jax.tree.map(one, params, shardings)


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> flat dict by path 'a/b/c'."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """The inverse of `flatten`.

    Raises ValueError for a path that is another one's parent, or deeper than any model's.
    """
    nested: dict = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        inner = nested
        for parent in parents[:_DEEPEST]:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                break
        if len(parents) > _DEEPEST or not isinstance(inner, dict) or name in inner:
            raise ValueError(f"the array {path[:200]!r} fits no tree of parameters")
        inner[name] = value
    return nested


def _blocks(array: Any) -> Blocks:
    if isinstance(array, Blocks):
        return array

    def parts() -> Iterable[np.ndarray]:
        yield np.asarray(array, np.float32)

    return Blocks(tuple(array.shape), parts)


def _suffixes(path: str | os.PathLike[str]) -> str:
    name = os.path.basename(os.fspath(path))
    if name.endswith(".gz"):
        return ".bpe.gz"
    return os.path.splitext(name)[1]
