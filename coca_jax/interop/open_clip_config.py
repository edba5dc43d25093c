"""open_clip's JSON model configurations to `config.model` and back."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from coca_jax.config import BLOCK, Model, heads, shapes
from coca_jax.config.shapes import Size

# The keys of open_clip's CoCa configurations: which are read, which must be as they are here, and
# what their values may be. The files are strangers', so nothing is taken for granted.


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


def sides(size: Any, name: str) -> shapes.Size:
    """A size given by one number or by (height, width). Raises ValueError for anything else."""
    given = list(size) if isinstance(size, (list, tuple)) else [size, size]
    most = _MOST["image_size"]
    if len(given) != 2 or not all(is_whole(one) and 1 <= one <= most for one in given):
        raise ValueError(f"{name}={short(size)}: give 1 to {most} pixels, or height and width")
    return shapes.shortest(given)


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


# open_clip's `preprocess_cfg`, how images come to a model's size and its mean and deviation, to
# `data.resize` and numbers and back.


MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_RESIZE = {"shortest": "crop", "squash": "squash"}  # resize_mode: data.resize
_INTERPOLATIONS = {  # resize_mode: what is read; the first is what data.resize does
    "shortest": ("bicubic",),
    "squash": ("bilinear", "bicubic", "random"),
}


def read(
    given: Any,
    mode: str = "shortest",
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> dict[str, Any]:
    """dict(resize, mean, std) of a `preprocess_cfg`, None being all defaults: mode, mean and std
    are those of what it leaves out. Images that are squashed may be resized in any way there; here
    it is bilinear.

    Raises:
        ValueError: naming the key whose value has no counterpart here.
    """
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"preprocess_cfg={short(given)}: not a JSON object")
    found: dict[str, Any] = dict(mean=mean, std=std) | (given or {})
    for key, least in (("mean", -math.inf), ("std", 0.0)):
        values = found[key]
        whole = isinstance(values, (list, tuple)) and len(values) == 3
        if not whole or not all(is_number(value) and value > least for value in values):
            above = "" if least else ", above 0"
            raise ValueError(
                f"preprocess_cfg.{key}={short(values)}: give three numbers{above}, of red, green "
                "and blue"
            )
    mode = found.get("resize_mode") or mode
    if mode not in tuple(_RESIZE):  # by equality: a file may say a list
        raise ValueError(f"preprocess_cfg.resize_mode={short(mode)}; 'squash' or 'shortest'")
    how, any_of = found.get("interpolation"), _INTERPOLATIONS[mode]
    if how not in (*any_of, None):
        raise ValueError(
            f"preprocess_cfg.interpolation={short(how)}; of resize_mode={mode!r} only "
            f"{' or '.join(map(repr, any_of))}"
        )
    return dict(resize=_RESIZE[mode], mean=list(found["mean"]), std=list(found["std"]))


def write(model: Model, resize: str) -> dict[str, Any]:
    """The `preprocess_cfg` of a model whose images are resized as data.resize says.

    Raises:
        ValueError: open_clip has no words for that.
    """
    modes = {ours: theirs for theirs, ours in _RESIZE.items()}
    if resize not in modes:
        raise ValueError(
            f"data.resize={resize!r}, for which open_clip has no words: it crops or squashes "
            "images to squares; train with 'crop' or 'squash'"
        )
    return dict(
        mean=list(model.image_mean),
        std=list(model.image_std),
        interpolation=_INTERPOLATIONS[modes[resize]][0],
        resize_mode=modes[resize],
    )


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
    numbers = read(preprocess)
    image, fusion = config["vision_cfg"], config["multimodal_cfg"]
    width, kind = _width(config), heads.pooler_kind(_POOLERS[image.get("attentional_pool", False)])
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
    for name, wide, count in (
        ("vision_cfg.head_width", image.get("width", 768), image.get("head_width", 64)),
        ("text_cfg.heads", wanted, text.get("heads", 8)),
        ("multimodal_cfg.heads", wanted, fusion.get("heads", 8)),
        ("vision_cfg.attn_pooler_heads", wanted, image.get("attn_pooler_heads", 8) if kind else 1),
    ):
        if wide % count:
            raise ValueError(f"{name}={count} does not divide the width {wide}")


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
    kind = heads.pooler_kind(pooler.kind)
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
        ("image.onnx", image.onnx, ""),
        ("image.table_size", image.table_size, 0),
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
