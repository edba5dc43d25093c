"""Configurations of image and text towers, of transformers (config.json) and open_clip, as
config.model.

Read from strangers' files: every number is checked by config.Model, what changes the model and is
not known here is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from coca_jax.config import heads
from coca_jax.config.heads import CLASS, QUERY
from coca_jax.data.sources import files
from coca_jax.interop import open_clip_config, pe_core, timm_trunks
from coca_jax.interop.open_clip_config import (
    is_number,
    is_whole,
    mlp_width,
    short,
    sides,
    text_cleaning,
    text_sizes,
)
from coca_jax.runtime import bounded_json

# Configurations of open_clip's image and text towers, as config.model: its own Vision Transformers
# (CLIP, MetaCLIP 1 and 2, OpenVision, CLIPA) and trunks of timm (SigLIP, PE-Core).
#
# Read from strangers' files: every number is checked by config.Model, what changes the model and is
# not known here is refused by name.


# Keys of the sections that are read, and those without effect here.
_READ = {
    "vision_cfg": (
        *("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"),
        *("no_ln_pre", "pool_type", "final_ln_after_pool", "norm_kwargs", "act_kwargs"),
    ),
    "text_cfg": (
        *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
        *("no_causal_mask", "pool_type", "eos_id", "norm_kwargs", "act_kwargs"),
    ),
}
_NUMBERS = ("layers", "width", "head_width", "mlp_ratio", "context_length", "vocab_size", "heads")
_WITHOUT_EFFECT = ("output_tokens", "patch_dropout", "hf_tokenizer_name", "tokenizer_kwargs")
_TANH = dict(approximate="tanh")
EPS = 1e-5


def read(cfg: Mapping[str, Any], preprocess_cfg: Any) -> dict[str, Any]:
    """dict(model, resize, mean, std, and eos_id where texts are pooled at it) of open_clip's
    `model_cfg` and `preprocess_cfg`. Raises ValueError for what is not supported, naming the key.
    """
    if timm_trunks.is_siglip(cfg):
        how = open_clip_config.read(preprocess_cfg, "squash", (0.5,) * 3, (0.5,) * 3)
        return dict(model=timm_trunks.to_model(cfg, how), **how)
    if pe_core.is_pe_core(cfg):
        how = open_clip_config.read(preprocess_cfg, "squash", (0.5,) * 3, (0.5,) * 3)
        return dict(model=pe_core.to_model(cfg, how), **how)
    return _of_own_towers(cfg, preprocess_cfg)


def _of_own_towers(cfg: Mapping[str, Any], preprocess_cfg: Any) -> dict[str, Any]:
    """Vision Transformers of open_clip itself."""
    for part, read_keys in _READ.items():
        section = cfg.get(part)
        if not isinstance(section, dict):
            raise ValueError(f"{part}={short(section)}: not a JSON object")
        for key, value in section.items():
            if key in _NUMBERS and not (is_number(value) and value > 0):
                raise ValueError(f"{part}.{key}={short(value)}: give a number above 0")
            if key not in (*read_keys, *_WITHOUT_EFFECT) and value not in (None, False, {}):
                raise ValueError(f"{part}.{key}={short(value)} is not supported of image towers")
    if "embed_dim" not in cfg:
        raise ValueError("the configuration has no embed_dim: it is not one of open_clip's models")
    image, text = cfg["vision_cfg"], cfg["text_cfg"]
    family = _family(image, text)
    options = {p: _block(cfg, s, p) for p, s in (("vision_cfg", image), ("text_cfg", text))}
    own, of_text = options["vision_cfg"], options["text_cfg"]
    how = open_clip_config.read(preprocess_cfg)
    width, head = image.get("width", 768), image.get("head_width", 64)
    if width % head:
        raise ValueError(f"vision_cfg.head_width={head} does not divide the width {width}")
    model = model_of(
        family,
        embed_dim=cfg["embed_dim"],
        preprocess=how,
        **own,
        image=dict(
            size=image.get("image_size", 224),
            patch=image.get("patch_size", 16),
            width=width,
            depth=image.get("layers", 12),
            mlp_dim=mlp_width(image, "vision_cfg", width),
            num_heads=width // head,
            pre_norm=not image.get("no_ln_pre"),
        ),
        text=text_model(text, own, of_text),
    )
    text_cleaning(text, ("lower" if not text.get("hf_tokenizer_name") else "whitespace",))
    model["mend_texts"] = bool(text.get("hf_tokenizer_name"))  # else CLIP's, which mends by itself
    found: dict[str, Any] = dict(model=model, **how)
    if family == "openvision":
        model["pad_id"] = 0
    elif text.get("pool_type") == "eos":
        found["eos_id"] = text.get("eos_id", 2)
        if not is_whole(found["eos_id"]):
            raise ValueError(f"text_cfg.eos_id={short(found['eos_id'])}: give a whole number")
    return found


def _family(image: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """'clip' or 'openvision', by how images and texts are pooled. Raises ValueError for others."""
    wanted: list[tuple[Mapping[str, Any], str, tuple, Any]]
    if image.get("pool_type", "tok") == "tok":
        family = "clip"
        wanted = [
            (text, "pool_type", ("argmax", "eos"), "argmax"),
            (text, "no_causal_mask", (False, None), None),
        ]
    else:
        family = "openvision"
        wanted = [
            (image, "pool_type", ("avg",), None),
            (image, "final_ln_after_pool", (True,), None),
            (text, "pool_type", ("last",), None),
            (text, "no_causal_mask", (True,), None),
        ]
        words = text.get("tokenizer_kwargs")
        if not isinstance(words, dict) or words.get("strip_sep_token") is not True:
            raise ValueError(
                f"text_cfg.tokenizer_kwargs={short(words)}: with pooled patches (OpenVision, "
                "CLIPA) only {'strip_sep_token': true}"
            )
    for section, key, allowed, default in wanted:
        value = section.get(key, default)
        if value not in allowed:
            part = "vision_cfg" if section is image else "text_cfg"
            tokens = short(image.get("pool_type", "tok"))
            raise ValueError(
                f"{part}.{key}={short(value)}: with vision_cfg.pool_type={tokens} only {allowed[0]}"
            )
    return family


def _block(cfg: Mapping[str, Any], section: Mapping[str, Any], part: str) -> dict[str, Any]:
    """dict(activation, eps) of a tower's blocks."""
    norm, act = section.get("norm_kwargs") or {}, section.get("act_kwargs") or {}
    if not isinstance(norm, dict) or not norm.keys() <= {"eps"}:
        raise ValueError(f"{part}.norm_kwargs={short(norm)}; only {{'eps': a number}}")
    if act not in ({}, _TANH, dict(approximate="none")) or (act and cfg.get("quick_gelu")):
        raise ValueError(f"{part}.act_kwargs={short(act)}; only {_TANH}, without quick_gelu")
    usual = "quick_gelu" if cfg.get("quick_gelu") else "gelu_exact"
    return dict(activation="gelu" if act == _TANH else usual, eps=norm.get("eps", EPS))


def text_model(
    text: dict[str, Any], image: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """config.model.text of open_clip's text_cfg; image, own: dict(activation, eps) of the blocks of
    both towers."""
    names = dict(activation="activation", eps="norm_eps")
    return dict(
        text_sizes(text),
        block={name: own[key] for key, name in names.items() if own[key] != image[key]},
    )


def model_of(
    family: str,
    *,
    embed_dim: int,
    preprocess: Mapping[str, Any],
    activation: str,
    eps: float,
    image: dict[str, Any],
    text: dict[str, Any],
) -> dict[str, Any]:
    """config.model of towers. image: config.model.image, but for what its family has otherwise than
    by default, with `size` and `patch`."""
    kind = heads.tower_kind(family)
    pooled = kind.pool == QUERY
    pixels = dict(
        image_size=sides(image.pop("size"), "image_size"),
        patch_size=sides(image.pop("patch"), "patch_size"),
    )
    arrangement = dict(
        class_token=not pooled, pre_norm=kind.pool == CLASS, final_norm=pooled, patch_bias=pooled
    )
    return dict(
        family=family,
        **pixels,
        embed_dim=embed_dim,
        dtype="float32",
        image_mean=tuple(preprocess["mean"]),
        image_std=tuple(preprocess["std"]),
        activation=activation,
        norm_eps=eps,
        image=arrangement | image,
        text=text,
        pooler=dict(num_heads=(image if pooled else text)["num_heads"]),
    )


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
                return read(cfg, found.get("preprocess_cfg"))
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
    model = model_of(
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
    return open_clip_config.read(numbers, mode, *(() if clip else (half, half)))
