"""open_clip's JSON model configurations to `config.model` and back."""

from __future__ import annotations

import math
from typing import Any

from coca_jax.config import Model
from coca_jax.models import pooler_kinds

# Files of a model as open_clip and the hub have it; of weights the first that is there is taken.
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def _released(embed_dim: int, image: dict[str, Any], heads: int) -> dict[str, Any]:
    text = dict(context_length=76, vocab_size=49408, width=embed_dim, heads=heads, layers=12)
    return dict(
        embed_dim=embed_dim,
        vision_cfg=dict(
            image_size=224,
            attentional_pool=True,
            attn_pooler_heads=8,
            output_tokens=True,
            **image,
        ),
        text_cfg=dict(text, embed_cls=True, output_tokens=True),
        multimodal_cfg=text,
        custom_text=True,
    )


# The models with public weights; any other comes with its own JSON.
RELEASED = {
    "coca_ViT-B-32": _released(512, dict(layers=12, width=768, patch_size=32), 8),
    "coca_ViT-L-14": _released(768, dict(layers=24, width=1024, patch_size=14), 12),
}

_UNSUPPORTED_BLOCK = dict(
    ls_init_value=(None,),
    act_kwargs=(None, {}),
    norm_kwargs=(None, {}, {"eps": 1e-5}),
    block_type=(None, "default"),
    qk_norm=(False,),
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
        embed_cls=(True,),
        pad_id=(0,),
        no_causal_mask=(False,),
        proj_bias=(False,),
        proj_type=("linear",),
    ),
    "multimodal_cfg": dict(ls_init_value=(None,)),
    "": {},
}
# Keys that are read below.
_READ: dict[str, set[str]] = {
    "vision_cfg": {
        *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"),
        *("patch_dropout", "attentional_pool", "attn_pooler_queries", "attn_pooler_heads"),
        "no_ln_pre",
    },
    "text_cfg": {
        *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
        "correct_cls_mask",
    },
    "multimodal_cfg": {"context_length", "width", "heads", "layers"},
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
        *("tokenizer_kwargs", "hf_tokenizer_name", "hf_model_pretrained", "hf_proj_type"),
        "hf_pooler_type",
    },
    "multimodal_cfg": {
        *("vocab_size", "mlp_ratio", "dim_head", "n_queries", "attn_pooler_heads", "embed_cls"),
        *("output_tokens", "pad_id", "eos_id", "pool_type", "proj_bias", "proj_type"),
        *("no_causal_mask", "final_ln_after_pool", "tokenizer_mode", "tokenizer_kwargs"),
        *("hf_tokenizer_name", "hf_model_name", "hf_model_pretrained", "hf_proj_type"),
        "hf_pooler_type",
        *(key for key in _UNSUPPORTED_BLOCK if key != "ls_init_value"),
    },
    "": {
        "custom_text",
        "init_logit_scale",
        "init_logit_bias",
        "nonscalar_logit_scale",
        "cast_dtype",
    },
}


def to_model(config: dict[str, Any], preprocess: dict[str, Any] | None = None) -> dict[str, Any]:
    """An open_clip CoCa configuration (`model_cfg`) as `config.model`; it computes in float32.

    preprocess: its `preprocess_cfg`, where there is one; its mean and std are used.

    Raises:
        ValueError: naming the first key that is unknown, or whose value has no counterpart here.
    """
    if not isinstance(config, dict):
        raise ValueError(f"the configuration is a {type(config).__name__}, not a JSON object")
    for part in ("", "vision_cfg", "text_cfg", "multimodal_cfg"):
        section = config if part == "" else _section(config, part)
        _check_keys(section, part)
        _check_numbers(section, part)
    _check_together(config)
    preprocess = check_preprocess(preprocess or {})
    image, fusion = config["vision_cfg"], config["multimodal_cfg"]
    return dict(
        image_size=_square(image.get("image_size", 224), "vision_cfg.image_size"),
        patch_size=_square(image.get("patch_size", 16), "vision_cfg.patch_size"),
        embed_dim=config["embed_dim"],
        dtype="float32",
        image_mean=tuple(preprocess["mean"]),
        image_std=tuple(preprocess["std"]),
        temperature=0.07,
        activation="quick_gelu" if config.get("quick_gelu", False) else "gelu_exact",
        image=_image(image),
        text=_text(config["text_cfg"], fusion, config["embed_dim"]),
        pooler=dict(
            kind=_POOLERS[image["attentional_pool"]],
            num_queries=image.get("attn_pooler_queries", 256),
            num_heads=image.get("attn_pooler_heads", 8),
            query_std=1.0,
            project=image["attentional_pool"] is True,
        ),
    )


_POOLERS: dict[Any, str] = {True: "open_clip", "cascade": "cascade", "parallel": "parallel"}


def _check_together(config: dict[str, Any]) -> None:
    """Raises ValueError for sections that do not fit together, or no pooler."""
    image, text, fusion = (config[k] for k in ("vision_cfg", "text_cfg", "multimodal_cfg"))
    embed_dim = config["embed_dim"]
    for name, width in (("text_cfg.width", text), ("multimodal_cfg.width", fusion)):
        if width.get("width", 512) != embed_dim:
            raise ValueError(f"{name}={width.get('width', 512)} differs from embed_dim={embed_dim}")
    if fusion.get("context_length", 77) < text.get("context_length", 77):
        raise ValueError(
            f"multimodal_cfg.context_length={fusion.get('context_length', 77)} is shorter than "
            f"text_cfg.context_length={text.get('context_length', 77)}"
        )
    kind = image.get("attentional_pool", False)
    if not isinstance(kind, (bool, str)) or kind not in _POOLERS:
        raise ValueError(
            f"vision_cfg.attentional_pool={_short(kind)}; only models with poolers (true, "
            "'cascade', 'parallel') are supported"
        )
    for name, wide, heads in (
        ("vision_cfg.head_width", image.get("width", 768), image.get("head_width", 64)),
        ("text_cfg.heads", embed_dim, text.get("heads", 8)),
        ("multimodal_cfg.heads", embed_dim, fusion.get("heads", 8)),
        ("vision_cfg.attn_pooler_heads", embed_dim, image.get("attn_pooler_heads", 8)),
    ):
        if wide % heads:
            raise ValueError(f"{name}={heads} does not divide the width {wide}")


def _image(image: dict[str, Any]) -> dict[str, Any]:
    """`vision_cfg` as config.model.image."""
    width = image.get("width", 768)
    return dict(
        width=width,
        depth=image.get("layers", 12),
        mlp_dim=int(width * image.get("mlp_ratio", 4.0)),
        num_heads=width // image.get("head_width", 64),
        class_token=True,
        pre_norm=not image.get("no_ln_pre", False),
        final_norm=image["attentional_pool"] is not True,
        patch_bias=False,
        patch_dropout=image.get("patch_dropout", 0.0),
    )


def _text(text: dict[str, Any], fusion: dict[str, Any], width: int) -> dict[str, Any]:
    """`text_cfg` and `multimodal_cfg` as config.model.text."""
    return dict(
        width=width,
        unimodal_depth=text.get("layers", 12),
        multimodal_depth=fusion.get("layers", 12),
        mlp_dim=int(width * text.get("mlp_ratio", 4.0)),
        num_heads=text.get("heads", 8),
        multimodal_mlp_dim=4 * width,
        multimodal_heads=fusion.get("heads", 8),
        vocab_size=text.get("vocab_size", 49408),
        max_len=text.get("context_length", 77),
        tie_embeddings=False,
        head_bias=False,
        cls_mask="exact" if text.get("correct_cls_mask", False) else "shifted",
        cross="open_clip",
    )


def from_model(model: Model) -> dict[str, Any]:
    """`config.model` as an open_clip configuration (`model_cfg`).

    Raises:
        ValueError: naming the first option that open_clip's CoCa does not have.
    """
    _check_expressible(model)
    image, text, pooler = model.image, model.text, model.pooler
    second = pooler_kinds.of(pooler.kind).second_pooler
    depths = dict(context_length=text.max_len, vocab_size=text.vocab_size, width=text.width)
    result: dict[str, Any] = dict(
        embed_dim=model.embed_dim,
        vision_cfg=dict(
            image_size=model.image_size,
            layers=image.depth,
            width=image.width,
            head_width=image.width // image.num_heads,
            mlp_ratio=image.mlp_dim / image.width,
            patch_size=model.patch_size,
            attentional_pool=pooler.kind if second else True,
            attn_pooler_queries=pooler.num_queries,
            attn_pooler_heads=pooler.num_heads,
            no_ln_pre=not image.pre_norm,
            output_tokens=True,
        ),
        text_cfg=dict(
            **depths,
            heads=text.num_heads,
            layers=text.unimodal_depth,
            mlp_ratio=text.mlp_dim / text.width,
            embed_cls=True,
            output_tokens=True,
        ),
        multimodal_cfg=dict(
            **depths,
            heads=text.multimodal_heads or text.num_heads,
            layers=text.multimodal_depth,
        ),
        custom_text=True,
    )
    if text.cls_mask == "exact":
        result["text_cfg"]["correct_cls_mask"] = True
    if model.activation == "quick_gelu":
        result["quick_gelu"] = True
    return result


def _check_expressible(model: Model) -> None:
    """Raises ValueError naming the first option of `config.model` that open_clip does not have."""
    image, text, pooler = model.image, model.text, model.pooler
    legacy = not pooler_kinds.of(pooler.kind).second_pooler
    fusion_mlp = text.multimodal_mlp_dim or text.mlp_dim
    only = "open_clip has only"
    for name, value, want in (
        ("text.cross", text.cross, "open_clip"),
        ("text.tie_embeddings", text.tie_embeddings, False),
        ("text.head_bias", text.head_bias, False),
        ("text.width", text.width, model.embed_dim),
        ("the upper half's mlp_dim", fusion_mlp, 4 * text.width),
        ("image.class_token", image.class_token, True),
        ("image.patch_bias", image.patch_bias, False),
        ("image.final_norm", image.final_norm, not legacy),
        ("pooler.project", pooler.project, legacy),
    ):
        if value != want:
            raise ValueError(f"model.{name}={value!r}: {only} {want!r}; it cannot go back there")
    from coca_jax.models.layers import BlockOptions  # heavy, and only needed to go back
    from coca_jax.ops.reference import Reference

    options = BlockOptions.from_config(model, Reference())
    for name, value in options.beyond(("activation", "dtype", "ops")).items():
        raise ValueError(f"model.{name}={value!r}: open_clip's CoCa has no such option")
    if model.activation == "gelu":
        raise ValueError(f"model.activation='gelu': {only} 'gelu_exact' and 'quick_gelu'")
    for tower, width in ((image, image.width), (text, text.width)):
        if int(width * (tower.mlp_dim / width)) != tower.mlp_dim:
            raise ValueError(f"mlp_dim={tower.mlp_dim} is no multiple that open_clip can express")


def check_preprocess(preprocess: dict[str, Any]) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` with its defaults filled in.

    Raises:
        ValueError: another resizing than the shortest side, bicubic, and the centre.
    """
    if not isinstance(preprocess, dict):
        raise ValueError(f"preprocess_cfg={_short(preprocess)}: not a JSON object")
    filled = dict(mean=MEAN, std=STD, interpolation="bicubic", resize_mode="shortest") | preprocess
    for key, least in (("mean", -math.inf), ("std", 0.0)):
        values: Any = filled[key]
        whole = isinstance(values, (list, tuple)) and len(values) == 3
        if not whole or not all(_is_number(value) and value > least for value in values):
            above = "" if least else ", above 0"
            raise ValueError(
                f"preprocess_cfg.{key}={_short(values)}: give three numbers{above}, of red, green "
                "and blue"
            )
    for key, want in (("interpolation", "bicubic"), ("resize_mode", "shortest")):
        if filled[key] not in (want, None):
            raise ValueError(
                f"preprocess_cfg.{key}={_short(filled[key])}; only {want!r} is supported"
            )
    return filled


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
_FLAGS = ("quick_gelu", "no_ln_pre", "correct_cls_mask")


def _check_numbers(section: dict[str, Any], part: str) -> None:
    """Raises ValueError for a key that is read and whose value can be no such thing."""
    for key in _READ[part] & section.keys():
        value, name = section[key], f"{part}.{key}" if part else key
        if key in _MOST and key != "image_size":
            if not _is_whole(value) or not 1 <= value <= _MOST[key]:
                raise ValueError(f"{name}={_short(value)}: give a whole number, 1 to {_MOST[key]}")
        elif key in _RATIOS:
            if not _is_number(value) or not 0 < value <= _RATIOS[key]:
                raise ValueError(
                    f"{name}={_short(value)}: give a number above 0, to {_RATIOS[key]}"
                )
        elif key in _SHARES:
            if not _is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name}={_short(value)}: give a share, 0 to below 1")
        elif key in _FLAGS and not isinstance(value, bool):
            raise ValueError(f"{name}={_short(value)}: give true or false")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _short(value: Any) -> str:
    """A value of a stranger's file for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _section(config: dict[str, Any], part: str) -> dict[str, Any]:
    if not isinstance(config.get(part), dict):
        raise ValueError(f"the configuration has no {part}: it is not one of open_clip's CoCa")
    return config[part]


def _check_keys(section: dict[str, Any], part: str) -> None:
    if part == "" and "embed_dim" not in section:
        raise ValueError("the configuration has no embed_dim: it is not one of open_clip's models")
    for key, value in section.items():
        name = f"{part}.{key}" if part else key
        allowed = _REQUIRED[part].get(key)
        if allowed is not None and value not in allowed:
            raise ValueError(
                f"{name}={_short(value)} is not supported; only {' or '.join(map(repr, allowed))}"
            )
        if allowed is None and key not in _READ[part] | _WITHOUT_EFFECT[part]:
            raise ValueError(
                f"{name}={_short(value)}: an unknown key; this layout is not supported"
            )
    if part == "text_cfg" and not section.get("embed_cls", False):
        raise ValueError("text_cfg.embed_cls=False is not supported; only True")


def _square(size: Any, name: str) -> int:
    sizes = list(size) if isinstance(size, (list, tuple)) else [size]
    if not sizes or any(not _is_whole(one) or one != sizes[0] for one in sizes):
        raise ValueError(f"{name}={_short(size)}: only squares are supported")
    if not 1 <= sizes[0] <= _MOST["image_size"]:
        raise ValueError(f"{name}={_short(size)}: give 1 to {_MOST['image_size']} pixels")
    return sizes[0]
