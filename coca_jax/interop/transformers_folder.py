"""A model as a folder for Hugging Face transformers: PyTorch weights, tokenizer, and the modeling
code of modeling_coca.py, which needs no coca_jax."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import string
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from coca_jax.config import BLOCK, Model, StoredConfig, shapes
from coca_jax.data.vocabulary import ClipBpe, SentencePiece, Vocabulary
from coca_jax.interop import export_format, safetensors
from coca_jax.models import image_encoder, layers, param_groups
from coca_jax.runtime import storage

CODE, CARD, WEIGHTS = "modeling_coca.py", "README.md", export_format.HUB_PARAMS
DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # --dtype: as safetensors calls it

# Our names of modules -> those of modeling_coca.py, where they differ.
_MODULES = dict(
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="out_proj",
    query_norm="q_norm",
    key_norm="k_norm",
    image_to_joint="image_projection",
    text_to_joint="text_projection",
    log_scale="logit_scale",
    positions="position_embedding",
)
_MLP = {"in": "up_proj", "gate": "gate_proj", "out": "down_proj"}


def check(config: StoredConfig) -> None:
    """Raises ValueError for a model that modeling_coca.py does not express."""
    if config.model.family != "coca":
        raise ValueError(
            f"model.family={config.model.family!r}: a model without a decoder, which "
            "--to=transformers does not write. Use `coca-jax export --format=hub`"
        )
    if config.model.image.onnx:
        raise ValueError(
            f"model.image.onnx={config.model.image.onnx!r}: the image encoder is an ONNX file, "
            "which the PyTorch code does not contain. Use `coca-jax export`"
        )
    if config.data.resize == "native":
        raise ValueError(
            "data.resize='native': images of any shape are not part of the PyTorch code. Use the "
            "run itself, or train with data.resize='squash'"
        )


def write(
    params: dict, config: StoredConfig, vocabulary: Vocabulary, out: str, name: str, dtype: str
) -> dict[str, np.ndarray]:
    """Writes the folder `out`; returns its tensors.

    name: of the model, for the card. dtype: 'float32' or 'bfloat16', of the weights.
    Raises ValueError as `check`, and for weights that are NaN or infinite.
    """
    check(config)
    params = param_groups.without_training_aids(params)
    found = dict(tensors(params, config.model))
    rounded = safetensors.DTYPES[DTYPES[dtype]]
    found = {path: np.asarray(array, rounded) for path, array in found.items()}
    export_format.refuse_other(out, found, WEIGHTS)
    settings = configuration(params, config, vocabulary, dtype)
    with storage.atomic_folder(out, last=export_format.CONFIG) as folder:
        blocks = {path: export_format.blocks(path, array) for path, array in found.items()}
        safetensors.write(os.path.join(folder, WEIGHTS), blocks, dtype=DTYPES[dtype])
        vocabulary.save(os.path.join(folder, settings["tokenizer"]["file"]))
        storage.remove(os.path.join(folder, CODE))
        shutil.copyfile(pathlib.Path(__file__).with_name(CODE), os.path.join(folder, CODE))
        storage.write_text(os.path.join(folder, CARD), card(settings, name, found))
        text = json.dumps(settings, indent=2) + "\n"
        storage.write_text(os.path.join(folder, export_format.CONFIG), text)
    return found


def configuration(
    params: dict, config: StoredConfig, vocabulary: Vocabulary, dtype: str
) -> dict[str, Any]:
    """config.json: what modeling_coca.py needs of the model's configuration, the block options of
    each tower written out."""
    model = config.model

    def block(own: Any) -> dict[str, Any]:
        return {name: getattr(model, name) for name in BLOCK} | dict(own)

    image, text, pooler = (part.to_dict() for part in (model.image, model.text, model.pooler))
    image["block"] = block(model.image.block)
    text["block"], text["multimodal_block"] = map(
        block, (model.text.block, model.text.multimodal_block)
    )
    pooler["block"] = block(model.pooler.block)
    for part, names in (
        (image, ("patch_dropout", "table_size", "resample")),
        (pooler, ("token_dropout", "query_std")),
    ):
        for name in names:  # of training alone
            del part[name]
    settings: dict[str, Any] = dict(
        model_type="coca",
        architectures=["CoCaModel"],
        auto_map={
            "AutoConfig": "modeling_coca.CoCaConfig",
            "AutoModel": "modeling_coca.CoCaModel",
        },
        torch_dtype=dtype,
        model=dict(
            image_size=list(shapes.pair(model.image_size)),
            patch_size=list(shapes.pair(model.patch_size)),
            embed_dim=model.embed_dim,
            image_mean=list(model.image_mean),
            image_std=list(model.image_std),
            logit_bias=param_groups.sigmoid_bias(params) is not None,
            image=image,
            text=text,
            pooler=pooler,
        ),
        preprocess=dict(
            resize=config.data.resize,
            num_frames=config.data.num_frames,
            label_token=config.data.label_token,
        ),
        tokenizer=tokenizer_settings(vocabulary),
    )
    if param_groups.has_task_head(params):
        width, heads = config.head.sizes(model)
        settings["head"] = dict(
            kind=config.head.kind,
            num_queries=config.head.num_queries,
            width=width,
            num_heads=heads,
        )
        settings["class_names"] = list(config.class_names)
    return settings


def tokenizer_settings(vocabulary: Vocabulary) -> dict[str, Any]:
    """Its kind, file and special ids in config.json."""
    kind, file = "tokenizers", "tokenizer.json"
    if isinstance(vocabulary, SentencePiece):
        kind, file = "sentencepiece", "tokenizer.model"
    elif isinstance(vocabulary, ClipBpe):
        kind, file = "clip_bpe", "tokenizer.bpe.gz"
    ids = {
        f"{name}_id": getattr(vocabulary, f"{name}_id")
        for name in ("pad", "bos", "eos", "unk", "label", "hidden")
    }
    return dict(kind=kind, file=file, size=vocabulary.size, **ids)


def tensors(params: dict, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """The state dict of modeling_coca.py: (name, float32 array)."""
    for path, leaf in export_format.flatten(params).items():
        names, array = path.split("/"), np.asarray(leaf, np.float32)
        if path == "image_encoder/positions/value":
            array = _positions(array, model)
        if names[:2] == ["image_encoder", "stem"]:
            continue  # below: kernels and gains are one
        if "layers" in names:  # a stack, its first axis over layers
            at = names.index("layers")
            for number, layer in enumerate(array):
                yield _tensor([*names[:at], str(number), *names[at + 1 :]], layer, model)
        else:
            yield _tensor(names, array, model)
    if model.image.conv_widths:
        yield from _stem(params["image_encoder"]["stem"], model.image.conv_depths)


def _positions(table: np.ndarray, model: Model) -> np.ndarray:
    """The positions of images of the model's own size, which the PyTorch code does not resample."""
    classes, grid, width = int(model.image.class_token), model.table_grid, table.shape[-1]
    if grid == model.grid:
        return table
    places = jnp.asarray(table[classes:].reshape(*grid, width))
    places = image_encoder.resample_positions(places, model.grid, model.image.resample)
    return np.concatenate([table[:classes], np.asarray(places).reshape(-1, width)])


def _tensor(names: list[str], array: np.ndarray, model: Model) -> tuple[str, np.ndarray]:
    *modules, leaf = names
    if modules == ["image_encoder", "patch_embedding"] and leaf == "kernel":
        # [row, column, channel] of a patch, flat, or the stem's channels.
        sizes = (1, 1) if model.image.conv_widths else shapes.pair(model.patch_size)
        array = array.reshape(*sizes, -1, array.shape[-1]).transpose(3, 2, 0, 1)
    elif leaf == "kernel":
        outputs = 2 if modules[-1] in layers.BY_HEAD else 1  # heads and their width
        rows = int(np.prod(array.shape[: array.ndim - outputs]))
        array = array.reshape(rows, -1).T
    elif leaf == "bias" and modules[-1] in layers.BY_HEAD:
        array = array.reshape(-1)
    if modules[-2:-1] == ["head"] and modules[0] == "text_decoder":  # head/kernel/value
        return f"text_decoder.lm_head.{'weight' if modules[-1] == 'kernel' else 'bias'}", array.T
    if modules[-1].endswith("_scale") and leaf == "gain":
        return ".".join([*modules[:-1], "layer_scale", modules[-1].removesuffix("_scale")]), array
    in_mlp = len(modules) > 1 and modules[-2].endswith("mlp")
    # A pooler's learned query and its norm keep their names.
    in_pooler = modules[-1] in ("query", "query_norm") and modules[-2].endswith("pooler")
    if in_mlp:
        modules[-1] = _MLP[modules[-1]]
    elif not in_pooler:
        modules[-1] = _MODULES.get(modules[-1], modules[-1])
    if leaf == "value":  # a table; an embedding is a module of its own
        return ".".join(modules) + (".weight" if modules[-1] == "token_embedding" else ""), array
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"]), array


def _stem(params: dict, depths: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    convolutions = {}
    for stage, depth in enumerate(depths):
        convolutions[f"down.{stage}"] = params[f"down{stage}"]
        for number in range(depth):
            block = params[f"block{stage}_{number}"]
            convolutions[f"blocks.{stage}.{number}.0"] = block["in"]
            convolutions[f"blocks.{stage}.{number}.1"] = block["out"]
    for name, part in convolutions.items():
        kernel = image_encoder.standardized(jnp.asarray(part["kernel"]), jnp.asarray(part["gain"]))
        yield f"image_encoder.stem.{name}.weight", np.asarray(kernel).transpose(3, 2, 0, 1)
        yield f"image_encoder.stem.{name}.bias", np.asarray(part["bias"], np.float32)


def card(settings: dict[str, Any], name: str, found: dict[str, np.ndarray]) -> str:
    """README.md of the folder."""
    template = string.Template(pathlib.Path(__file__).with_name("transformers_card.md").read_text())
    kind, model = settings["tokenizer"]["kind"], settings["model"]
    packages = dict(sentencepiece="sentencepiece", tokenizers="tokenizers", clip_bpe="ftfy")
    return template.substitute(
        name=name,
        parameters=f"{sum(array.size for array in found.values()):,}",
        size=" x ".join(map(str, model["image_size"])),
        resize=settings["preprocess"]["resize"],
        embed_dim=model["embed_dim"],
        max_len=model["text"]["max_len"],
        vocabulary=f"{settings['tokenizer']['size']:,}",
        dtype=settings["torch_dtype"],
        package=packages[kind],
    )
