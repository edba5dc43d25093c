"""coca_jax: contrastive captioners (CoCa, Yu et al. 2022) in JAX and Flax.

Importing this package costs almost nothing; `load` pulls in JAX when it is called.
"""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import jax

    from coca_jax.inference import CoCaModel
    from coca_jax.inference.generation.config import GenerationConfig as GenerationConfig

__version__ = "0.2.0"


def load(
    path: str | os.PathLike[str],
    pretrained: str | None = None,
    *,
    dtype: str | None = None,
    batch_size: int = 64,
    num_frames: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    class_names: Sequence[str] | None = None,
    narrow: bool = True,
) -> CoCaModel:
    """Loads a run, a checkpoint, an export, a weights file or a model of the hub.

    Args:
        path: a run's workdir or one of its steps, an export, open_clip's or transformers' weights
            (local or gs://, s3://), 'hf-hub:OWNER/NAME[@revision]', or an open_clip model name.
        pretrained: tag of the weights for a model name, as in
            `load("ViT-L-14", pretrained="openai")`; the same as `load("ViT-L-14:openai")`.
            `list_pretrained()` lists the pairs.
        dtype: 'float32' or 'bfloat16', for weights and compute; default: the model's own.
        batch_size: images or texts per batch, over all devices.
        num_frames: frames per video; 0 for images; default: as in training.
        devices: where to run; default: all devices of this process.
        class_names: names of the task head's classes; default: those stored with the model.
        narrow: keep the matrices of a bfloat16 model in bfloat16; False keeps the stored precision.

    Returns:
        A `CoCaModel`, or for weights without a decoder (CLIP, SigLIP, ...) a `TwoTowerModel`.

    Raises:
        FileNotFoundError: nothing of that kind at `path`, or the hub can't be reached.
        ValueError: damaged or mismatched files, an unknown name, tag or dtype, or a missing extra.
    """
    from coca_jax import inference

    return inference.load(
        path,
        pretrained,
        dtype=dtype,
        batch_size=batch_size,
        num_frames=num_frames,
        devices=devices,
        class_names=class_names,
        narrow=narrow,
    )


def __getattr__(name: str) -> typing.Any:
    """`coca_jax.apps` and `coca_jax.GenerationConfig`, imported at first use."""
    import importlib

    if name == "GenerationConfig":
        return importlib.import_module("coca_jax.inference.generation.config").GenerationConfig
    if name != "apps":
        raise AttributeError(f"module 'coca_jax' has no attribute {name!r}")
    return importlib.import_module("coca_jax.apps")


def list_pretrained() -> list[tuple[str, str]]:
    """The (model, tag) pairs that `load(model, pretrained=tag)` accepts."""
    from coca_jax.interop import hub

    return sorted(hub.PRETRAINED)


def push_to_hub(
    model: CoCaModel,
    name: str,
    *,
    scores: Mapping[str, float | None] | None = None,
    private: bool = False,
) -> str:
    """Uploads a model with a model card to the Hugging Face hub and returns its URL.

    Args:
        model: what `load` returned.
        name: the repository, 'owner/name'; created if it is missing.
        scores: metrics for the card, as in a run's eval.json.
        private: create the repository as a private one.
    """
    from coca_jax.inference import export_folder

    return export_folder.push_to_hub(model, name, scores=scores, private=private)
