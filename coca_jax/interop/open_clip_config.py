"""open_clip's JSON model configurations to `config.model` and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from coca_jax.config import BLOCK, Model
from coca_jax.image_shape import Size
from coca_jax.interop import open_clip_preprocess
from coca_jax.interop.open_clip_keys import (
    check_keys,
    check_numbers,
    section_of,
    short,
    sides,
    text_cleaning,
)
from coca_jax.models import pooler_kinds

# Files of a model as open_clip and the hub have it; of weights the first that is there is taken.
CONFIG_FILE = "open_clip_config.json"
BARE_CONFIG_FILE = "config.json"  # of Apple's captioners: what others have under model_cfg
WEIGHTS_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "mobileclip2_coca.pt",
)
EPSILON = 1e-5  # of its norms where nothing else is said


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


def to_model(config: dict[str, Any], preprocess: dict[str, Any] | None = None) -> dict[str, Any]:
    """An open_clip CoCa configuration (`model_cfg`) as `config.model`; it computes in float32.

    preprocess: its `preprocess_cfg`, where there is one; its mean and std are used.

    Raises:
        ValueError: naming the first key that is unknown, or whose value has no counterpart here.
    """
    if not isinstance(config, dict):
        raise ValueError(f"the configuration is a {type(config).__name__}, not a JSON object")
    for part in ("", "vision_cfg", "text_cfg", "multimodal_cfg"):
        section = config if part == "" else section_of(config, part)
        check_keys(section, part)
        check_numbers(section, part)
    _check_together(config)
    text_cleaning(config["text_cfg"], ("lower",))
    numbers = open_clip_preprocess.read(preprocess)
    image, fusion = config["vision_cfg"], config["multimodal_cfg"]
    width, kind = _width(config), pooler_kinds.of(_POOLERS[image.get("attentional_pool", False)])
    text = _text(config["text_cfg"], fusion, width)
    return dict(
        image_size=sides(image.get("image_size", 224), "vision_cfg.image_size"),
        patch_size=sides(image.get("patch_size", 16), "vision_cfg.patch_size"),
        embed_dim=config["embed_dim"],
        dtype="float32",
        image_mean=tuple(numbers["mean"]),
        image_std=tuple(numbers["std"]),
        temperature=0.07,
        activation="quick_gelu" if config.get("quick_gelu", False) else "gelu_exact",
        image=_image(image, not kind.by_query) | _own_block(image),
        text=text | _own_block(config["text_cfg"]) | _own_block(fusion, "multimodal_block"),
        pooler=dict(
            kind=kind.name,
            num_queries=image.get("attn_pooler_queries", 256),
            num_heads=image.get("attn_pooler_heads", 8) if kind.pools else fusion.get("heads", 8),
            query_std=1.0,
            project=not kind.second_pooler,
        ),
    )


def _own_block(section: dict[str, Any], name: str = "block") -> dict[str, Any]:
    """What the blocks of a section have otherwise than open_clip's usual ones: {name: keys of
    config.model} or {}. The decoder reads ls_init_value alone."""
    found: dict[str, Any] = {}
    if section.get("ls_init_value") is not None:
        found["layer_scale"] = float(section["ls_init_value"])
    if name == "block":
        if section.get("qk_norm"):
            found |= dict(qk_norm=True, qk_norm_kind="layer")
        if (section.get("act_kwargs") or {}).get("approximate") == "tanh":
            found["activation"] = "gelu"
        eps = (section.get("norm_kwargs") or {}).get("eps", EPSILON)
        if eps != EPSILON:
            found["norm_eps"] = eps
    return {name: found} if found else {}


_POOLERS: dict[Any, str] = {
    True: "open_clip",
    False: "none",
    "cascade": "cascade",
    "parallel": "parallel",
}


def _width(config: dict[str, Any]) -> int:
    """Of texts, and of what the decoder sees of images: without a pooler what the encoder gives,
    else embed_dim."""
    image = config["vision_cfg"]
    pooled = image.get("attentional_pool", False) is not False
    return config["embed_dim"] if pooled else image.get("width", 768)


def _check_together(config: dict[str, Any]) -> None:
    """Raises ValueError for sections that do not fit together."""
    image, text, fusion = (config[k] for k in ("vision_cfg", "text_cfg", "multimodal_cfg"))
    for name, section in (("vision_cfg", image), ("text_cfg", text)):
        if config.get("quick_gelu") and section.get("act_kwargs"):
            raise ValueError(
                f"{name}.act_kwargs={short(section['act_kwargs'])} beside quick_gelu=true: "
                "open_clip builds no such model"
            )
    kind = image.get("attentional_pool", False)
    if not isinstance(kind, (bool, str)) or kind not in _POOLERS:
        raise ValueError(
            f"vision_cfg.attentional_pool={short(kind)}; only true, false, 'cascade' and "
            "'parallel' are supported"
        )
    if kind is False and image.get("final_ln_after_pool", False):
        raise ValueError(
            "vision_cfg.final_ln_after_pool=True without attentional_pool is not supported; only "
            "False"
        )
    wanted, of = _width(config), "embed_dim" if kind else "vision_cfg.width"
    for name, width in (("text_cfg.width", text), ("multimodal_cfg.width", fusion)):
        if width.get("width", 512) != wanted:
            raise ValueError(f"{name}={width.get('width', 512)} differs from {of}={wanted}")
    if fusion.get("context_length", 77) < text.get("context_length", 77):
        raise ValueError(
            f"multimodal_cfg.context_length={fusion.get('context_length', 77)} is shorter than "
            f"text_cfg.context_length={text.get('context_length', 77)}"
        )
    for name, wide, heads in (
        ("vision_cfg.head_width", image.get("width", 768), image.get("head_width", 64)),
        ("text_cfg.heads", wanted, text.get("heads", 8)),
        ("multimodal_cfg.heads", wanted, fusion.get("heads", 8)),
        ("vision_cfg.attn_pooler_heads", wanted, image.get("attn_pooler_heads", 8) if kind else 1),
    ):
        if wide % heads:
            raise ValueError(f"{name}={heads} does not divide the width {wide}")


def _image(image: dict[str, Any], final_norm: bool) -> dict[str, Any]:
    """`vision_cfg` as config.model.image; final_norm: whether a norm ends the encoder."""
    width = image.get("width", 768)
    return dict(
        width=width,
        depth=image.get("layers", 12),
        mlp_dim=int(width * image.get("mlp_ratio", 4.0)),
        num_heads=width // image.get("head_width", 64),
        class_token=True,
        pre_norm=not image.get("no_ln_pre", False),
        final_norm=final_norm,
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
    kind = next(given for given, name in _POOLERS.items() if name == pooler.kind)
    depths = dict(context_length=text.max_len, vocab_size=text.vocab_size, width=text.width)
    result: dict[str, Any] = dict(
        embed_dim=model.embed_dim,
        vision_cfg=dict(
            image_size=_written(model.image_size),
            layers=image.depth,
            width=image.width,
            head_width=image.width // image.num_heads,
            mlp_ratio=image.mlp_dim / image.width,
            patch_size=_written(model.patch_size),
            attentional_pool=kind,
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
    if image.patch_dropout:
        result["vision_cfg"]["patch_dropout"] = image.patch_dropout
    if text.cls_mask == "exact":
        result["text_cfg"]["correct_cls_mask"] = True
    towers = block_options(model)
    if towers["image"]["activation"] == "quick_gelu":
        result["quick_gelu"] = True
    for name, part in _SECTIONS.items():
        own = towers[part]
        if own["layer_scale"]:
            result[name]["ls_init_value"] = own["layer_scale"]
        if own["qk_norm"]:
            result[name]["qk_norm"] = True
        if own["activation"] == "gelu":
            result[name]["act_kwargs"] = {"approximate": "tanh"}
        if own["norm_eps"] != EPSILON:
            result[name]["norm_kwargs"] = {"eps": own["norm_eps"]}
    return result


def _written(size: Size) -> int | list[int]:
    """A size as JSON has it."""
    return size if isinstance(size, int) else list(size)


_SECTIONS = dict(vision_cfg="image", text_cfg="text", multimodal_cfg="multimodal")


def block_options(model: Model) -> dict[str, dict[str, Any]]:
    """{'image', 'text', 'multimodal', 'pooler': {key of BLOCK: its value}} of `config.model`."""
    shared = {name: getattr(model, name) for name in BLOCK}
    text = model.text
    own = dict(image=model.image.block, text=text.block, multimodal=text.multimodal_block)
    return {name: shared | dict(o) for name, o in (own | dict(pooler=model.pooler.block)).items()}


def _check_expressible(model: Model) -> None:
    """Raises ValueError naming the first option of `config.model` that open_clip does not have."""
    image, text, pooler = model.image, model.text, model.pooler
    kind = pooler_kinds.of(pooler.kind)
    fusion_mlp = text.multimodal_mlp_dim or text.mlp_dim
    only = "open_clip has only"
    for name, value, want in (
        ("family", model.family, "coca"),
        ("text.cross", text.cross, "open_clip"),
        ("text.tie_embeddings", text.tie_embeddings, False),
        ("text.head_bias", text.head_bias, False),
        ("text.width", text.width, model.embed_dim if kind.pools else image.width),
        ("text.multimodal_mlp_dim", fusion_mlp, 4 * text.width),
        ("image.conv_widths", tuple(image.conv_widths), ()),
        ("image.class_token", image.class_token, True),
        ("image.patch_bias", image.patch_bias, False),
        ("image.final_norm", image.final_norm, not kind.by_query),
        ("pooler.project", pooler.project, not kind.second_pooler),
        ("image.registers", image.registers, 0),
        ("text.kv_heads", text.kv_heads, 0),
    ):
        if value != want:
            raise ValueError(f"model.{name}={value!r}: {only} {want!r}; it cannot go back there")
    _check_blocks(block_options(model))
    for tower, width in ((image, image.width), (text, text.width)):
        if int(width * (tower.mlp_dim / width)) != tower.mlp_dim:
            raise ValueError(f"mlp_dim={tower.mlp_dim} is no multiple that open_clip can express")


def _check_blocks(towers: dict[str, dict[str, Any]]) -> None:
    """Raises ValueError naming the first option of a tower that open_clip does not have there."""
    usual = {f.name: f.default for f in dataclasses.fields(Model) if f.name in BLOCK}
    quick = {"quick_gelu"} == {
        own["activation"] for name, own in towers.items() if name != "pooler"
    }
    for tower, own in towers.items():
        free = {"activation", "qk_norm_kind"}
        if tower in ("image", "text"):
            free |= {"layer_scale", "norm_eps", "qk_norm"}
        if tower == "multimodal":
            free |= {"layer_scale"}
        if tower == "pooler":
            free |= {"layer_scale"}
        for name, value in own.items():
            if value != usual[name] and name not in free:
                raise ValueError(
                    f"model.{name}={value!r} ({tower}): open_clip's CoCa has no such option there"
                )
        if own["qk_norm"] and own["qk_norm_kind"] != "layer":
            raise ValueError(
                f"model.qk_norm_kind={own['qk_norm_kind']!r} ({tower}): open_clip has only 'layer'"
            )
        known = ("gelu_exact", "gelu") if tower in ("image", "text") else ("gelu_exact",)
        if tower != "pooler" and not quick and own["activation"] not in known:
            raise ValueError(
                f"model.activation={own['activation']!r} ({tower}): open_clip has only "
                f"{' and '.join(map(repr, known))} there, or 'quick_gelu' in all towers"
            )
