"""SigLIP as open_clip has it: an image trunk of timm, and open_clip's text tower that sees all of a
text. Which trunk, its name says; its sizes are timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from coca_jax.interop.open_clip_config import (
    is_number,
    short,
    text_cleaning,
    text_sizes,
    timm_model,
    timm_name,
    timm_trunk,
)

# vit_<name>_patch<P>_siglip_<S>: (width, layers, heads, MLP over width).
TRUNKS: dict[str, tuple[int, int, int, float]] = {
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 3.7362),
    "giantopt": (1536, 40, 16, 4.0),
}
# Those whose MLPs have the tanh form of GELU; the older ones have the exact one.
_TANH = re.compile(r"vit_(base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt)")
_NAME = re.compile(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)")
EPS = 1e-6
_VISION = {"image_size", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj"}
_TEXT = {
    *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "no_causal_mask"),
    *("proj_bias", "pool_type", "norm_kwargs", "act_kwargs", "hf_tokenizer_name"),
    "tokenizer_kwargs",
}
# SigLIP's vocabularies (32,000 ids, of several languages 250,000) pad with their end symbol, 1;
# that of SigLIP 2 has a symbol for it, 0.
T5_PAD, GEMMA_IDS, GEMMA_PAD = 1, 256_000, 0
_CLEANINGS = ("canonicalize", "lower")


def is_siglip(cfg: Mapping[str, Any]) -> bool:
    """Whether open_clip's configuration has a trunk of timm that is SigLIP's."""
    return _NAME.fullmatch(timm_name(cfg)) is not None


def to_model(cfg: Mapping[str, Any], preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """config.model of SigLIP in open_clip's configuration. preprocess: mean and std.

    Raises ValueError for what changes the model and is not known here, naming the key.
    """
    named = timm_trunk(cfg, _NAME, TRUNKS, "SigLIP's")
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    _check(vision, text, named.image_size)
    width, layers, heads, ratio = TRUNKS[named.name]
    activation = "gelu" if _TANH.match(named.full) else "gelu_exact"
    of_text = "gelu" if text.get("act_kwargs") else "gelu_exact"
    return timm_model(cfg, preprocess, named) | dict(
        family="siglip",
        activation=activation,
        norm_eps=EPS,
        clean="lower" if text_cleaning(text, _CLEANINGS) == "lower" else "canonical",
        mend_texts=True,
        pad_id=GEMMA_PAD if text["vocab_size"] == GEMMA_IDS else T5_PAD,
        image=dict(width=width, depth=layers, mlp_dim=int(width * ratio), num_heads=heads),
        text=text_sizes(text)
        | dict(block={} if of_text == activation else dict(activation=of_text)),
        pooler=dict(num_heads=heads),
    )


def _check(vision: Mapping[str, Any], text: Mapping[str, Any], size: int) -> None:
    """Raises ValueError for what SigLIP does not have, naming the key."""
    tanh = dict(approximate="tanh")
    for part, section, key, allowed in (
        ("vision_cfg", vision, "timm_pool", ("map",)),
        ("vision_cfg", vision, "timm_proj", ("none",)),
        ("vision_cfg", vision, "image_size", (size,)),
        ("text_cfg", text, "no_causal_mask", (True,)),
        ("text_cfg", text, "proj_bias", (True,)),
        ("text_cfg", text, "pool_type", ("last",)),
        ("text_cfg", text, "norm_kwargs", (dict(eps=EPS),)),
        ("text_cfg", text, "act_kwargs", (None, {}, tanh)),
    ):
        if section.get(key) not in allowed:
            raise ValueError(f"{part}.{key}={short(section.get(key))}; of SigLIP only {allowed[0]}")
    for part, section, known_keys in (("vision_cfg", vision, _VISION), ("text_cfg", text, _TEXT)):
        for key, value in section.items():
            if key not in known_keys and value not in (None, False, {}):
                raise ValueError(f"{part}.{key}={short(value)} is not supported of a SigLIP model")
    for key in ("context_length", "vocab_size", "width", "heads", "layers"):
        value = text.get(key)
        if not is_number(value) or value <= 0:
            raise ValueError(f"text_cfg.{key}={short(value)}: give a number above 0")
