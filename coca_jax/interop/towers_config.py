"""Configurations of CLIP and SigLIP, of transformers (config.json) and open_clip, as config.model.

Read from strangers' files: every number is checked by config.Model, what changes the model and is
not known here is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from coca_jax.data import bounded_json, files
from coca_jax.interop import open_clip_config, timm_trunks
from coca_jax.interop.open_clip_keys import is_number, short, sides

CONFIG_FILE, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
FAMILIES = {"clip": "clip", "metaclip_2": "clip", "siglip": "siglip"}  # by transformers' model_type
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu_exact",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
}
# transformers leaves out of its files what is as by default.
_VISION: dict[str, Any] = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
)
_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": dict(
        vision_config=dict(_VISION, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5),
        text_config=dict(
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=8,
            max_position_embeddings=77,
            vocab_size=49408,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        ),
    ),
    "siglip": dict(
        vision_config=dict(
            _VISION, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6
        ),
        text_config=dict(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=64,
            vocab_size=32000,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            pad_token_id=1,
        ),
    ),
}
# Keys of open_clip's sections that are read, and those without effect here.
_READ = {
    "vision_cfg": ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
}
NOT_NUMBERS = ("image_size", "patch_size")  # or a pair of them
_WITHOUT_EFFECT = ("output_tokens", "patch_dropout", "hf_tokenizer_name", "tokenizer_kwargs")


def find(weights: str, model: str = "") -> dict[str, Any] | None:
    """The configuration of towers beside a file of weights, or in the file `model`: dict(model,
    resize, mean, std); None where it is of no such model. Raises ValueError for what is not
    supported, naming the key."""
    folder = os.path.dirname(weights)
    for name in (
        model,
        *(os.path.join(folder, n) for n in (open_clip_config.CONFIG_FILE, CONFIG_FILE)),
    ):
        if not name.endswith(".json") or not os.path.isfile(name):
            continue
        try:
            found = bounded_json.parse(files.read_bounded(name))
            cfg = found.get("model_cfg", found)
            if isinstance(cfg, dict) and "vision_cfg" in cfg:
                if "multimodal_cfg" in cfg:
                    return None
                return _of_open_clip(cfg, found.get("preprocess_cfg"))
            if str(found.get("model_type")) in FAMILIES:
                return _of_transformers(found, folder)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return None


def _of_transformers(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    family = FAMILIES[config["model_type"]]
    sections: dict[str, dict[str, Any]] = {}
    for name, defaults in _DEFAULTS[family].items():
        given = config.get(name) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{name}={short(given)}: not a JSON object")
        sections[name] = defaults | given
    image, text = sections["vision_config"], sections["text_config"]
    for key in ("hidden_act", "layer_norm_eps"):
        if image[key] != text[key]:
            raise ValueError(f"{key} is {image[key]!r} of images and {text[key]!r} of texts")
    if str(image["hidden_act"]) not in ACTIVATIONS:
        raise ValueError(f"hidden_act={short(image['hidden_act'])}; only {', '.join(ACTIVATIONS)}")
    clip = family == "clip"
    embed = config.get("projection_dim", 512) if clip else image["hidden_size"]
    preprocess = _preprocessor(folder, clip)
    model = _model(
        family,
        embed_dim=embed,
        preprocess=preprocess,
        activation=ACTIVATIONS[image["hidden_act"]],
        eps=image["layer_norm_eps"],
        image=dict(
            size=image["image_size"],
            patch=image["patch_size"],
            width=image["hidden_size"],
            depth=image["num_hidden_layers"],
            mlp_dim=image["intermediate_size"],
            num_heads=image["num_attention_heads"],
        ),
        text=dict(
            width=text["hidden_size"],
            unimodal_depth=text["num_hidden_layers"],
            mlp_dim=text["intermediate_size"],
            num_heads=text["num_attention_heads"],
            vocab_size=text["vocab_size"],
            max_len=text["max_position_embeddings"],
        ),
    )
    model["pad_id"] = -1 if clip else text["pad_token_id"]
    return dict(model=model, **preprocess)


def _of_open_clip(cfg: Mapping[str, Any], preprocess_cfg: Any) -> dict[str, Any]:
    if timm_trunks.is_siglip(cfg):
        return _siglip_of_open_clip(cfg, preprocess_cfg)
    for part, read in _READ.items():
        section = cfg.get(part)
        if not isinstance(section, dict):
            raise ValueError(f"{part}={short(section)}: not a JSON object")
        for key, value in section.items():
            if key in read and key not in NOT_NUMBERS and not (is_number(value) and value > 0):
                raise ValueError(f"{part}.{key}={short(value)}: give a number above 0")
            if key not in (*read, *_WITHOUT_EFFECT) and value not in (None, False, {}):
                raise ValueError(f"{part}.{key}={short(value)} is not supported of a CLIP model")
    if "embed_dim" not in cfg:
        raise ValueError("the configuration has no embed_dim: it is not one of open_clip's models")
    image, text = cfg["vision_cfg"], cfg["text_cfg"]
    filled = open_clip_config.check_preprocess({} if preprocess_cfg is None else preprocess_cfg)
    preprocess = dict(resize="crop", mean=list(filled["mean"]), std=list(filled["std"]))
    width, text_width = image.get("width", 768), text.get("width", 512)
    head = image.get("head_width", 64)
    if width % head:
        raise ValueError(f"vision_cfg.head_width={head} does not divide the width {width}")
    model = _model(
        "clip",
        embed_dim=cfg["embed_dim"],
        preprocess=preprocess,
        activation="quick_gelu" if cfg.get("quick_gelu") else "gelu_exact",
        eps=1e-5,
        image=dict(
            size=image.get("image_size", 224),
            patch=image.get("patch_size", 16),
            width=width,
            depth=image.get("layers", 12),
            mlp_dim=int(width * image.get("mlp_ratio", 4.0)),
            num_heads=width // head,
        ),
        text=dict(
            width=text_width,
            unimodal_depth=text.get("layers", 12),
            mlp_dim=int(text_width * text.get("mlp_ratio", 4.0)),
            num_heads=text.get("heads", 8),
            vocab_size=text.get("vocab_size", 49408),
            max_len=text.get("context_length", 77),
        ),
    )
    return dict(model=model, **preprocess)


def _siglip_of_open_clip(cfg: Mapping[str, Any], preprocess_cfg: Any) -> dict[str, Any]:
    """open_clip's SigLIP: its images are squashed to the square."""
    given = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    if isinstance(preprocess_cfg, dict):
        given |= {k: v for k, v in preprocess_cfg.items() if k != "resize_mode"}
        mode = preprocess_cfg.get("resize_mode") or "squash"
        if mode not in ("squash", "shortest"):
            raise ValueError(f"preprocess_cfg.resize_mode={short(mode)}; 'squash' or 'shortest'")
    else:
        mode = "squash"
    filled = open_clip_config.check_preprocess(given)
    numbers = dict(mean=list(filled["mean"]), std=list(filled["std"]))
    resize = "squash" if mode == "squash" else "crop"
    return dict(model=timm_trunks.to_model(cfg, numbers), resize=resize, **numbers)


def _model(
    family: str,
    *,
    embed_dim: int,
    preprocess: Mapping[str, Any],
    activation: str,
    eps: float,
    image: dict[str, Any],
    text: dict[str, Any],
) -> dict[str, Any]:
    """config.model of towers."""
    clip = family == "clip"
    heads = text["num_heads"] if clip else image["num_heads"]
    pixels = dict(
        image_size=sides(image.pop("size"), "image_size"),
        patch_size=sides(image.pop("patch"), "patch_size"),
    )
    arrangement = dict(class_token=clip, pre_norm=clip, final_norm=not clip, patch_bias=not clip)
    return dict(
        family=family,
        **pixels,
        embed_dim=embed_dim,
        dtype="float32",
        image_mean=tuple(preprocess["mean"]),
        image_std=tuple(preprocess["std"]),
        activation=activation,
        norm_eps=eps,
        image=image | arrangement,
        text=text,
        pooler=dict(num_heads=heads),
    )


def _preprocessor(folder: str, clip: bool) -> dict[str, Any]:
    """How images come to the model's size, and their mean and deviation."""
    path = os.path.join(folder, PREPROCESSOR)
    given = bounded_json.parse(files.read_bounded(path)) if os.path.isfile(path) else {}
    half = (0.5, 0.5, 0.5)
    mean, std = (open_clip_config.MEAN, open_clip_config.STD) if clip else (half, half)
    numbers = dict(mean=given.get("image_mean", mean), std=given.get("image_std", std))
    filled = open_clip_config.check_preprocess(numbers)
    cut = given.get("do_center_crop", clip)
    return dict(
        resize="crop" if cut else "squash", mean=list(filled["mean"]), std=list(filled["std"])
    )
