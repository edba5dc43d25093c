"""Reads the weights of an ONNX file that torch.onnx.export wrote of a DINOv2 of transformers.

Most tensors have their names of torch there. The exporter folds two kinds without a name: the
transposed matrices of linear layers, whose node says which layer it was, and the learned positions,
split into those of the class token and of the patches.
"""

from __future__ import annotations

import os

import numpy as np

from coca_jax.runtime import extras

_FOLDED = "onnx::"  # how the exporter names tensors that it made


def is_onnx(place: str) -> bool:
    """Whether a place is FILE.onnx, or FILE.onnx:OUTPUT."""
    return split(place)[0].endswith(".onnx")


def split(place: str) -> tuple[str, str]:
    """(path, output) of FILE.onnx:OUTPUT; output: '' where none is named."""
    head, mark, output = place.partition(".onnx:")
    return (f"{head}.onnx", output) if mark else (place, "")


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of an encoder's module by their names of torch; other modules of the file, as a
    head, are left out where the encoder is one called 'backbone'.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the package onnx is missing, or it is not an ONNX file.
    """
    path = os.fspath(path)
    extras.check("onnx", "onnx", path)
    import onnx

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf and onnx have several
        raise ValueError(f"{path}: not an ONNX file, or a damaged one: {error}") from None
    stored = {one.name: one for one in graph.initializer}
    found = {
        name: onnx.numpy_helper.to_array(one)
        for name, one in stored.items()
        if not name.startswith(_FOLDED)
    }
    split: dict[str, np.ndarray] = {}
    for node in graph.node:
        module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        for name in node.input:
            if not name.startswith(_FOLDED) or name not in stored:
                continue
            array = onnx.numpy_helper.to_array(stored[name])
            if node.op_type == "MatMul" and array.ndim == 2:
                found[f"{module}.weight"] = array.T
            elif module.endswith("embeddings") and array.ndim == 3:
                split[node.op_type] = array
                place = f"{module}.position_embeddings"
    if split.keys() >= {"Concat", "Reshape"}:
        found[place] = np.concatenate([split["Concat"], split["Reshape"]], axis=1)
    elif "Add" in split:  # of an export for one image size
        found[place] = split["Add"]
    own = {name: x for name, x in found.items() if name.startswith("backbone.")}
    return own or found
