"""Files of other programs' weights: found in a folder, known by their first bytes, mapped."""

from __future__ import annotations

import os

import numpy as np

from coca_jax.interop import (
    export_format,
    onnx_file,
    open_clip_config,
    safetensors,
    torch_file,
    towers_config,
)
from coca_jax.runtime import storage

FOREIGN = (*open_clip_config.WEIGHTS_FILES, *towers_config.WEIGHTS_FILES)
_INDEX = ".index.json"  # behind the name of a file that lies there in shards
_POINTER = b"version https://git-lfs"
_OTHERS = {  # first bytes -> what else a file of that name may be
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
    b"GIF8": "a GIF picture",
    b"<!doctype html": "a page of HTML, as of a download that asks for a login",
    b"<html": "a page of HTML, as of a download that asks for a login",
    b"\x1f\x8b": "a gzip file",
}


def find(path: str) -> str:
    """The file of weights that `path` is, or that lies in the folder `path`.

    Raises:
        FileNotFoundError: no such file or folder, or no weights in it.
        ValueError: a run or an export, or weights in shards.
    """
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise FileNotFoundError(f"--input={path}: no such file or folder")
        export_format.refuse_file(path)
        return path
    if os.path.exists(os.path.join(path, "modeling_coca.py")):
        raise ValueError(
            f"{path}: written for transformers (modeling_coca.py), which coca_jax does not read "
            "back. Give the run or export that it was made from"
        )
    for name in FOREIGN:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    if (storage.place(path) / "checkpoints").exists():
        raise ValueError(f"--input={path} is a run of coca_jax; --to=open_clip converts it")
    if export_format.is_export(path):
        raise ValueError(
            f"--input={path} is converted already, coca_jax reads it as it is; --to=open_clip "
            "writes it for open_clip"
        )
    refuse_shards(path)
    raise FileNotFoundError(f"--input={path}: no {' or '.join(open_clip_config.WEIGHTS_FILES)}")


def refuse_shards(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a folder whose weights lie in several files."""
    for name in FOREIGN:
        index = storage.place(path) / f"{name}{_INDEX}"
        if index.exists():
            raise ValueError(
                f"{index}: its weights are in shards, which are not read; write them as one file, "
                "as by transformers' save_pretrained(DIR, max_shard_size='100GB')"
            )


def refuse(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a file of weights, or a folder with one, where a run or an export of
    coca_jax is wanted."""
    place = storage.place(path)
    names = [f"{name}{end}" for name in FOREIGN for end in ("", _INDEX)]
    found = [place] if place.is_file() else [place / n for n in names if (place / n).exists()]
    if found:
        name = found[0].name
        already = name in open_clip_config.WEIGHTS_FILES
        origin = f"open_clip's already ({name})" if already else f"another program's ({name})"
        raise ValueError(
            f"--input={path} is {origin}, not a run or an export; to write a CoCa of open_clip's "
            f"anew, convert it (coca-jax convert --input={path} --out=weights) and give "
            "--input=weights"
        )


def read(path: str) -> dict[str, np.ndarray]:
    """Tensors of a file by their names in the model, mapped, not read (but of an ONNX file). Which
    kind it is its first bytes say, for people rename files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is neither safetensors nor of torch.save, or two tensors have one name.
    """
    _refuse_others(path)
    if path.endswith(".onnx"):
        return onnx_file.read(path)
    is_safetensors = _is_safetensors(path)
    tensors = safetensors.read(path) if is_safetensors else torch_file.read(path)
    names = torch_file.strip_prefixes(tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}


def _is_safetensors(path: str) -> bool:
    """Whether a file is of this kind by its first bytes, or by its name where they say nothing."""
    begun = b""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            begun = file.read(9)
    if begun.startswith(b"PK\3\4"):  # a zip archive, which is torch.save's kind
        return False
    return begun[8:] == b"{" or path.endswith(".safetensors")  # JSON behind its length


def _refuse_others(path: str) -> None:
    """Raises ValueError that says what a regular file is whose first bytes are of no weights."""
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        begun = file.read(len(_POINTER))
    if begun == _POINTER:
        raise ValueError(
            f"{path}: a pointer of git-lfs, not the weights; run `git lfs pull` in its repository"
        )
    for first, what in _OTHERS.items():
        if begun.lower().startswith(first.lower()):
            raise ValueError(f"{path}: {what}, not weights (.bin, .pt, .pth, .safetensors)")
