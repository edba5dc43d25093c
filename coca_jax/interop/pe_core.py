"""PE-Core (Perception Encoder, Bolya et al. 2025) as open_clip has it: an image trunk of timm with
rotary positions and a pooler, and open_clip's text tower. Which trunk, its name says; its sizes are
timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from coca_jax.interop.open_clip_config import (
    is_number,
    short,
    text_cleaning,
    text_sizes,
    timm_model,
    timm_name,
    timm_trunk,
)


class Trunk(NamedTuple):
    """Sizes of an image trunk. mlp_dim: of its blocks; that of the pooler is four times the width.
    class_token: whether it has one; the first patch is then at place 1 of both axes, else at 0."""

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    class_token: bool = True


# vit_pe_core_<name>_patch<P>_<S>
TRUNKS = dict(
    tiny=Trunk(192, 12, 3, 768),
    small=Trunk(384, 12, 6, 1536),
    base=Trunk(768, 12, 12, 3072),
    large=Trunk(1024, 24, 16, 4096),
    gigantic=Trunk(1536, 50, 16, 8960, class_token=False),
)
POOLER_HEADS, EPS, THETA = 8, 1e-5, 10_000.0
_NAME = re.compile(r"vit_pe_core_([a-z0-9]+)_patch(\d+)_(\d+)")
_VISION = ("image_size", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj")
_TEXT = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
_WITHOUT_EFFECT = ("output_tokens", "tokenizer_kwargs")


def is_pe_core(cfg: Mapping[str, Any]) -> bool:
    """Whether open_clip's configuration has a trunk of timm that is PE-Core's."""
    return _NAME.fullmatch(timm_name(cfg)) is not None


def to_model(cfg: Mapping[str, Any], preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """config.model of PE-Core in open_clip's configuration. preprocess: mean and std.

    Raises ValueError for what changes the model and is not known here, naming the key.
    """
    named = timm_trunk(cfg, _NAME, TRUNKS, "PE-Core's")
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    _check(cfg, vision, text, named.image_size)
    text_cleaning(text, ("lower",))
    trunk = TRUNKS[named.name]
    return timm_model(cfg, preprocess, named) | dict(
        family="pe",
        activation="gelu_exact",
        norm_eps=EPS,
        image=dict(
            width=trunk.width,
            depth=trunk.depth,
            mlp_dim=trunk.mlp_dim,
            num_heads=trunk.num_heads,
            class_token=trunk.class_token,
            pre_norm=True,
            patch_bias=False,
            rope_theta=THETA,
            rope_start=float(trunk.class_token),
            block=dict(positions="both"),
        ),
        text=text_sizes(text),
        pooler=dict(num_heads=POOLER_HEADS, mlp_dim=4 * trunk.width),
    )


def _check(
    cfg: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any], size: int
) -> None:
    """Raises ValueError for what PE-Core does not have, naming the key."""
    for part, section, key, allowed in (
        ("vision_cfg.", vision, "timm_pool", ("map",)),
        ("vision_cfg.", vision, "timm_proj", (None, "")),
        ("vision_cfg.", vision, "image_size", (size,)),
        ("", cfg, "quick_gelu", (False, None)),
    ):
        if section.get(key) not in allowed:
            given = short(section.get(key))
            raise ValueError(f"{part}{key}={given}; of PE-Core only {short(allowed[0])}")
    for part, section, known in (
        ("vision_cfg", vision, _VISION),
        ("text_cfg", text, (*_TEXT, *_WITHOUT_EFFECT)),
    ):
        for key, value in section.items():
            if key not in known and value not in (None, False, {}):
                raise ValueError(f"{part}.{key}={short(value)} is not supported of PE-Core")
            if key in _TEXT and not (is_number(value) and value > 0):
                raise ValueError(f"{part}.{key}={short(value)}: give a number above 0")
