"""Configurations of image and text towers, of transformers (config.json) and open_clip, as
config.model.

Read from strangers' files: every number is checked by config.Model, what changes the model and is
not known here is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from coca_jax.data import bounded_json, files
from coca_jax.interop import open_clip_config, open_clip_preprocess, towers_open_clip
from coca_jax.interop.open_clip_keys import short

CONFIG_FILE, PREPROCESSOR = "config.json", "preprocessor_config.json"
TOKENIZER = "tokenizer_config.json"
# SigLIP 2 has Gemma's vocabulary, which pads with a symbol of its own; its texts keep their
# punctuation.
SIGLIP2_TOKENIZERS, SIGLIP2_IDS = ("Gemma", "Siglip2"), 256_000
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


def find(weights: str, model: str = "") -> dict[str, Any] | None:
    """The configuration of towers beside a file of weights, or, if given, in the file `model`
    alone: dict(model, resize, mean, std, and eos_id where texts are pooled at it); None where it
    is of no such model. Raises ValueError for what is not supported, naming the key."""
    folder = os.path.dirname(weights)
    beside = [os.path.join(folder, n) for n in (open_clip_config.CONFIG_FILE, CONFIG_FILE)]
    for name in [model] if model else beside:
        if not os.path.isfile(name):
            continue
        try:
            found = bounded_json.parse(files.read_bounded(name))
            cfg = found.get("model_cfg", found)
            if isinstance(cfg, dict) and "vision_cfg" in cfg:
                if "multimodal_cfg" in cfg:
                    return None
                return towers_open_clip.read(cfg, found.get("preprocess_cfg"))
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
    model = towers_open_clip.model_of(
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
    found = dict(model=model, **preprocess)
    if config["model_type"] == "metaclip_2":
        found["eos_id"] = text.get("eos_token_id", 49407)
    if not clip:
        words = _tokenizer_class(folder)
        second = words.startswith(SIGLIP2_TOKENIZERS) or (
            not words and text["vocab_size"] == SIGLIP2_IDS
        )
        model["pad_id"] = -1 if second else text["pad_token_id"]
        model["clean"] = "lower" if second else "canonical"
    return found


def _tokenizer_class(folder: str) -> str:
    """What the tokenizer's file beside the weights calls itself, or ''."""
    path = os.path.join(folder, TOKENIZER)
    given = bounded_json.parse(files.read_bounded(path)) if os.path.isfile(path) else {}
    return str(given.get("tokenizer_class") or "")


def _check_preprocessor(given: Any, crop: bool) -> None:
    """Raises ValueError, naming the key, for images that come to a model otherwise than here; crop:
    whether a square of them is cut out."""
    if not isinstance(given, dict):
        raise ValueError(f"{PREPROCESSOR}: not a JSON object")
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if given.get(key) is False:
            raise ValueError(f"{PREPROCESSOR}: {key}=false; images are resized and normalised here")
    factor = given.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-3:
        raise ValueError(f"{PREPROCESSOR}: rescale_factor={short(factor)}; only 1/255 is known")
    filters = {3: "bicubic"} if crop else {2: "bilinear", 3: "bicubic"}  # PIL's numbers
    how = given.get("resample")
    if how is not None and not (isinstance(how, int) and how in filters):
        wanted = " or ".join(f"{number} ({name})" for number, name in filters.items())
        ways = "cropped" if crop else "squashed"
        raise ValueError(f"{PREPROCESSOR}: resample={short(how)}; of {ways} images only {wanted}")
    size, cut = (_side(given.get(name)) for name in ("size", "crop_size"))
    if given.get("do_center_crop") and size and cut and size != cut:
        raise ValueError(
            f"{PREPROCESSOR}: size={size} and crop_size={cut}: images are resized to the crop's "
            "own size here; set both alike if that is meant"
        )


def _side(given: Any) -> int:
    """The shorter side that a size asks for; 0 where it is none."""
    if isinstance(given, dict):
        sides = [given.get(name) for name in ("shortest_edge", "height", "width")]
        return min((side for side in sides if isinstance(side, int)), default=0)
    return given if isinstance(given, int) else 0


def _preprocessor(folder: str, clip: bool) -> dict[str, Any]:
    """How images come to the model's size, and their mean and deviation."""
    path = os.path.join(folder, PREPROCESSOR)
    given = bounded_json.parse(files.read_bounded(path)) if os.path.isfile(path) else {}
    crop = given.get("do_center_crop", clip) if isinstance(given, dict) else clip
    _check_preprocessor(given, crop)
    half = (0.5, 0.5, 0.5)
    numbers = {k: given[f"image_{k}"] for k in ("mean", "std") if f"image_{k}" in given}
    mode = "shortest" if crop else "squash"
    return open_clip_preprocess.read(numbers, mode, *(() if clip else (half, half)))
