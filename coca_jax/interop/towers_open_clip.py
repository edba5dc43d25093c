"""Configurations of open_clip's image and text towers, as config.model: its own Vision Transformers
(CLIP, MetaCLIP 1 and 2, OpenVision, CLIPA) and trunks of timm (SigLIP, PE-Core).

Read from strangers' files: every number is checked by config.Model, what changes the model and is
not known here is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coca_jax.interop import open_clip_preprocess, pe_core, timm_trunks
from coca_jax.interop.open_clip_keys import (
    is_number,
    is_whole,
    mlp_width,
    short,
    sides,
    text_cleaning,
    text_sizes,
)
from coca_jax.models import tower_kinds
from coca_jax.models.tower_kinds import CLASS, QUERY

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
        how = open_clip_preprocess.read(preprocess_cfg, "squash", (0.5,) * 3, (0.5,) * 3)
        return dict(model=timm_trunks.to_model(cfg, how), **how)
    if pe_core.is_pe_core(cfg):
        how = open_clip_preprocess.read(preprocess_cfg, "squash", (0.5,) * 3, (0.5,) * 3)
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
    how = open_clip_preprocess.read(preprocess_cfg)
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
    kind = tower_kinds.of(family)
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
