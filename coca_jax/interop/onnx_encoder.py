"""Any image encoder in an ONNX file as an encoder folder, in which onnxruntime runs it."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any

import numpy as np

from coca_jax.config import Model, read
from coca_jax.data.vocabulary import NoTexts
from coca_jax.interop import export_format
from coca_jax.interop.vision_weights import FAMILY, IMAGENET, USUAL_SIZE
from coca_jax.models import onnx_encoder
from coca_jax.runtime import storage

FILE = f"{export_format.ONNX}/encoder.onnx"  # in an encoder folder, and in exports


def describe(path: str, output: str = "", image_size: int = 0) -> dict[str, Any]:
    """config.model of the encoder in an ONNX file.

    image_size: of images where the file takes any; 0: 224. Images are normalised as ImageNet's.
    Raises FileNotFoundError and ValueError as `onnx_encoder.open_session`, and for an output that
    is not tokens of a grid of patches.
    """
    path = os.path.abspath(storage.from_home(path))
    session = onnx_encoder.open_session(path, output)
    height, width = session.runtime.get_inputs()[0].shape[2:]
    fixed = isinstance(height, int)
    if fixed and (height != width or image_size not in (0, height)):
        raise ValueError(f"{path}: takes images of {height} x {width}. Square images are needed.")
    size = height if fixed else image_size or USUAL_SIZE
    try:
        tokens = session.run(np.zeros((1, size, size, 3), np.float32))
        patch, classes, registers = onnx_encoder.grid_of(tokens.shape[1], size)
    except Exception as error:  # onnxruntime's own errors of a shape
        raise ValueError(f"{path}, output {session.output}: {str(error)[:300]}") from None
    width = tokens.shape[2]
    image = dict(
        width=width,
        depth=1,
        mlp_dim=width,
        num_heads=1,
        class_token=classes,
        registers=registers,
        onnx=path,
        onnx_output=session.output,
        onnx_sha256=onnx_encoder.sha256(path),
    )
    mean, std = IMAGENET
    model = dict(family=FAMILY, image_size=size, patch_size=patch, embed_dim=width, image=image)
    return model | dict(dtype="float32", image_mean=mean, image_std=std)


def write(path: str, out: str, output: str = "", image_size: int = 0) -> dict[str, Any]:
    """Writes the encoder folder `out`, with a copy of the file; returns its configuration.

    Raises as `describe`.
    """
    model = describe(path, output, image_size)
    read(Model, model, f"{path}: model")
    numbers = dict(mean=list(model["image_mean"]), std=list(model["image_std"]))
    config = dict(model=model, preprocess=dict(resize="squash", **numbers))
    programs = add_file(out, model)
    with tempfile.TemporaryDirectory() as scratch:
        words = os.path.join(scratch, "vocabulary.none")
        NoTexts().save(words)
        export_format.write_export(out, {}, config, words, programs=programs)
    return config


def add_file(out: str, model: dict[str, Any]) -> list[str]:
    """Copies the encoder's file of config.model, where there is one, into an export folder, whose
    configuration then names the copy; returns the names of files added."""
    source = model["image"].get("onnx")
    if not source:
        return []
    target = os.path.join(out, FILE)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if not (os.path.exists(target) and os.path.samefile(source, target)):
        shutil.copyfile(source, target)
    model["image"] = model["image"] | dict(onnx=FILE)
    return [FILE]
