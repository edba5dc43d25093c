"""`--encoder`: a run on a frozen image encoder that somebody else trained."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from coca_jax.interop import export_format, onnx_encoder, onnx_file, weights_files
from coca_jax.runtime import storage
from coca_jax.training import inherit

# Keys of config.model that follow from the encoder.
OF_THE_ENCODER = ("image", "image_size", "patch_size", "image_mean", "image_std")
FOLDER, FEATURES = "encoder", "features"  # in the workdir


def use(config: ConfigDict, place: str, workdir: str, given: Collection[str]) -> ConfigDict:
    """The config of a run on the encoder at `place`: its sizes and preprocessing, its weights,
    which do not move, and its tokens, computed once and stored in WORKDIR/features.

    place: a run, an export, FILE.onnx[:OUTPUT], or weights that `convert` reads; the last two are
    written to WORKDIR/encoder. given: keys that the command line sets, which stay.
    Raises FileNotFoundError and ValueError as what reads such weights.
    """
    config = config.copy_and_resolve_references().unlock()
    for key in ("init_from", "init_parts", "optimizer.image_learning_rate"):
        if key in given:
            raise ValueError(
                f"--encoder={place} and --config.{key} both say what the image encoder is. Give "
                "one of them."
            )
    folder = _folder(place, os.path.join(workdir, FOLDER))
    config.update(init_from=folder, init_parts="image", image_sizes=())
    kept = {key: config.model[key] for key in OF_THE_ENCODER if f"model.{key}" in given}
    inherit.leave(config, *(f"model.{key}" for key in OF_THE_ENCODER), "data.resize")
    config.model.update(kept)
    config.optimizer.image_learning_rate = 0.0
    settings: dict[str, Any] = dict(augment="none", flip=False, features=_features(workdir))
    config.data.update({k: v for k, v in settings.items() if f"data.{k}" not in given})
    config = inherit.fill(config, workdir)
    config.model.image.patch_dropout = 0.0  # an image has the same tokens at each visit
    return config


def _features(workdir: str) -> str:
    return "" if storage.is_remote(workdir) else os.path.join(workdir, FEATURES)


def _folder(place: str, into: str) -> str:
    """The encoder folder at a place, or what was made of it in the folder `into`."""
    if export_format.is_export(into):  # a run that resumes
        return into
    if onnx_file.is_onnx(place):
        path, output = onnx_file.split(place)
        onnx_encoder.write(path, into, output)
        return into
    if _is_ours(place):
        return os.path.abspath(place)
    from coca_jax import inference
    from coca_jax.inference import export_folder

    export_folder.write(inference.load(place, narrow=False), into)
    return into


def _is_ours(path: str) -> bool:
    """Whether it is a local folder of a run or an export, from which training starts as it is."""
    if not os.path.isdir(path):
        return False
    foreign = any(os.path.exists(os.path.join(path, name)) for name in weights_files.FOREIGN)
    return export_format.is_export(path) or not foreign
