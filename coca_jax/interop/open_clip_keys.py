"""The keys of open_clip's CoCa configurations: which are read, which must be as they are here, and
what their values may be. The files are strangers', so nothing is taken for granted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from coca_jax import image_shape

_UNSUPPORTED_BLOCK = dict(
    act_kwargs=(None, {}, {"approximate": "none"}, {"approximate": "tanh"}),
    block_type=(None, "default", "custom"),
    scaled_cosine_attn=(False,),
    scale_heads=(False,),
    scale_attn_inner=(False,),
    scale_attn=(False,),
    scale_fc=(False,),
)
# Keys that change the model, with the only values that are supported.
_REQUIRED: dict[str, dict[str, tuple]] = {
    "vision_cfg": _UNSUPPORTED_BLOCK | dict(timm_model_name=(None,), pool_type=("tok",)),
    "text_cfg": _UNSUPPORTED_BLOCK
    | dict(
        hf_model_name=(None,),
        hf_tokenizer_name=(None, ""),
        embed_cls=(True,),
        pad_id=(0,),
        no_causal_mask=(False,),
        proj_bias=(False,),
        proj_type=("linear",),
    ),
    "multimodal_cfg": {},
    "": {},
}
_READ_BLOCK = ("ls_init_value", "norm_kwargs", "qk_norm")
# Keys that are read below.
_READ: dict[str, set[str]] = {
    "vision_cfg": {
        *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"),
        *("patch_dropout", "attentional_pool", "attn_pooler_queries", "attn_pooler_heads"),
        "no_ln_pre",
        *_READ_BLOCK,
    },
    "text_cfg": {
        *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
        *("correct_cls_mask", "tokenizer_kwargs"),
        *_READ_BLOCK,
    },
    "multimodal_cfg": {"context_length", "width", "heads", "layers", "ls_init_value"},
    "": {"embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu"},
}
# Keys without effect on a model that passes the checks above. The decoder ignores most of its own.
_WITHOUT_EFFECT: dict[str, set[str]] = {
    "vision_cfg": {
        *("output_tokens", "pos_embed_type", "final_ln_after_pool", "timm_model_pretrained"),
        *("timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    },
    "text_cfg": {
        *("output_tokens", "eos_id", "pool_type", "final_ln_after_pool", "tokenizer_mode"),
        *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    },
    "multimodal_cfg": {
        *("vocab_size", "mlp_ratio", "dim_head", "n_queries", "attn_pooler_heads", "embed_cls"),
        *("output_tokens", "pad_id", "eos_id", "pool_type", "proj_bias", "proj_type"),
        *("no_causal_mask", "final_ln_after_pool", "tokenizer_mode", "tokenizer_kwargs"),
        *("hf_tokenizer_name", "hf_model_name", "hf_model_pretrained", "hf_proj_type"),
        "hf_pooler_type",
        *_UNSUPPORTED_BLOCK,
        *("norm_kwargs", "qk_norm"),
    },
    "": {
        "custom_text",
        "init_logit_scale",
        "init_logit_bias",
        "nonscalar_logit_scale",
        "cast_dtype",
    },
}

# Whole numbers from 1 up to these; above 0 and up to these; true or false.
_MOST = dict(
    embed_dim=65_536,
    layers=1024,
    width=65_536,
    head_width=65_536,
    heads=4096,
    attn_pooler_queries=65_536,
    attn_pooler_heads=4096,
    context_length=65_536,
    vocab_size=16_777_216,
    image_size=16_384,
)
_RATIOS = dict(mlp_ratio=64.0)
_SHARES = ("patch_dropout",)
_FLAGS = ("quick_gelu", "no_ln_pre", "correct_cls_mask", "qk_norm")


def check_numbers(section: dict[str, Any], part: str) -> None:
    """Raises ValueError for a key that is read and whose value can be no such thing."""
    for key in _READ[part] & section.keys():
        value, name = section[key], f"{part}.{key}" if part else key
        if key in _MOST and key != "image_size":
            if not is_whole(value) or not 1 <= value <= _MOST[key]:
                raise ValueError(f"{name}={short(value)}: give a whole number, 1 to {_MOST[key]}")
        elif key in _RATIOS:
            if not is_number(value) or not 0 < value <= _RATIOS[key]:
                raise ValueError(f"{name}={short(value)}: give a number above 0, to {_RATIOS[key]}")
        elif key in _SHARES:
            if not is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name}={short(value)}: give a share, 0 to below 1")
        elif key == "ls_init_value":
            if value is not None and (not is_number(value) or not 0 < value <= 10):
                raise ValueError(f"{name}={short(value)}: give a number above 0, to 10, or null")
        elif key == "norm_kwargs":
            _check_norm(value, name)
        elif key in _FLAGS and not isinstance(value, bool):
            raise ValueError(f"{name}={short(value)}: give true or false")


def _check_norm(value: Any, name: str) -> None:
    """Raises ValueError for other options of a norm than what it adds to the variance."""
    if value is None or value == {}:
        return
    if not isinstance(value, dict) or set(value) != {"eps"}:
        raise ValueError(f"{name}={short(value)} is not supported; only {{'eps': a number}}")
    if not is_number(value["eps"]) or not 1e-12 <= value["eps"] <= 1e-2:
        raise ValueError(f"{name}={short(value)}: give an eps from 1e-12 to 0.01")


def mlp_width(section: dict[str, Any], part: str, width: Any) -> int:
    """The channels inside an MLP on a residual stream of `width`, by the section's mlp_ratio.
    Raises ValueError for a width or a ratio that can be none."""
    ratio, most = section.get("mlp_ratio", 4.0), _RATIOS["mlp_ratio"]
    if not is_whole(width) or not 1 <= width <= _MOST["width"]:
        raise ValueError(f"{part}.width={short(width)}: give a whole number, 1 to {_MOST['width']}")
    if not is_number(ratio) or not 0 < ratio <= most:
        raise ValueError(f"{part}.mlp_ratio={short(ratio)}: give a number above 0, to {most}")
    return int(width * ratio)


def is_whole(value: Any) -> bool:
    """Whether it is an integer; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def short(value: Any) -> str:
    """A value of a stranger's file for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def section_of(config: dict[str, Any], part: str) -> dict[str, Any]:
    """A section of the configuration. Raises ValueError where it has none of that name."""
    if not isinstance(config.get(part), dict):
        raise ValueError(f"the configuration has no {part}: it is not one of open_clip's CoCa")
    return config[part]


def check_keys(section: dict[str, Any], part: str) -> None:
    """Raises ValueError for a key that is unknown, or must have another value than it has."""
    if part == "" and "embed_dim" not in section:
        raise ValueError("the configuration has no embed_dim: it is not one of open_clip's models")
    for key, value in section.items():
        name = f"{part}.{key}" if part else key
        allowed = _REQUIRED[part].get(key)
        if allowed is not None and value not in allowed:
            raise ValueError(
                f"{name}={short(value)} is not supported; only {' or '.join(map(repr, allowed))}"
            )
        if allowed is None and key not in _READ[part] | _WITHOUT_EFFECT[part]:
            raise ValueError(f"{name}={short(value)}: an unknown key; this layout is not supported")
    if part == "text_cfg" and not section.get("embed_cls", False):
        raise ValueError("text_cfg.embed_cls=False is not supported; only True")


def sides(size: Any, name: str) -> image_shape.Size:
    """A size given by one number or by (height, width). Raises ValueError for anything else."""
    given = list(size) if isinstance(size, (list, tuple)) else [size, size]
    most = _MOST["image_size"]
    if len(given) != 2 or not all(is_whole(one) and 1 <= one <= most for one in given):
        raise ValueError(f"{name}={short(size)}: give 1 to {most} pixels, or height and width")
    return image_shape.shortest(given)


def timm_name(cfg: Mapping[str, Any]) -> str:
    """The trunk of timm that open_clip's configuration names; '' where it names none."""
    vision = cfg.get("vision_cfg")
    name = vision.get("timm_model_name") if isinstance(vision, dict) else None
    return name if isinstance(name, str) else ""


class TimmTrunk(NamedTuple):
    """An image trunk of timm, as its name says it. full: the whole name."""

    full: str
    name: str
    patch_size: int
    image_size: int


def timm_trunk(
    cfg: Mapping[str, Any], pattern: re.Pattern[str], known: Iterable[str], whose: str
) -> TimmTrunk:
    """The trunk of a configuration whose `timm_name` matches: (name, patch, image size) are the
    groups of the pattern.

    Raises ValueError where the name is not among the known, or text_cfg is no section.
    """
    if not isinstance(cfg.get("text_cfg"), dict):
        raise ValueError(f"text_cfg={short(cfg.get('text_cfg'))}: not a JSON object")
    full = timm_name(cfg)
    name, patch, size = pattern.fullmatch(full).groups()
    if name not in known:
        raise ValueError(
            f"vision_cfg.timm_model_name={full}: of {whose} trunks only {', '.join(known)}"
        )
    return TimmTrunk(full, name, int(patch), int(size))


def timm_model(
    cfg: Mapping[str, Any], preprocess: Mapping[str, Any], trunk: TimmTrunk
) -> dict[str, Any]:
    """Of config.model, what is said alike of all trunks of timm. preprocess: mean and std."""
    return dict(
        image_size=trunk.image_size,
        patch_size=trunk.patch_size,
        embed_dim=cfg.get("embed_dim"),
        dtype="float32",
        image_mean=tuple(preprocess["mean"]),
        image_std=tuple(preprocess["std"]),
    )


def text_sizes(text: dict[str, Any]) -> dict[str, Any]:
    """Of config.model.text, what open_clip's text_cfg says of the sizes, with its defaults. Raises
    ValueError for a width or an mlp_ratio that can be none."""
    width = text.get("width", 512)
    return dict(
        width=width,
        unimodal_depth=text.get("layers", 12),
        mlp_dim=mlp_width(text, "text_cfg", width),
        num_heads=text.get("heads", 8),
        vocab_size=text.get("vocab_size", 49408),
        max_len=text.get("context_length", 77),
    )


def text_cleaning(text: Mapping[str, Any], known: tuple[str, ...]) -> str:
    """How open_clip's tokenizer cleans texts, by text_cfg; the first of `known` by default. Raises
    ValueError for another."""
    kwargs = text.get("tokenizer_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ValueError(f"text_cfg.tokenizer_kwargs={short(kwargs)}: not a JSON object")
    how = kwargs.get("clean", known[0])
    if how not in known:
        allowed = " or ".join(map(repr, known))
        raise ValueError(f"text_cfg.tokenizer_kwargs.clean={short(how)}; only {allowed} here")
    return str(how)
