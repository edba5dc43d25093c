"""How many operations the model of a config takes, by formula."""

from __future__ import annotations

import math

from coca_jax.config import Config, ImageModel, Model, heads, shapes
from coca_jax.data import navit
from coca_jax.models.image_encoder import num_remaining
from coca_jax.training import losses


def step_flops(config: Config) -> int:
    """Floating-point operations of a train step over one pair: three times the forward pass of what
    a loss reads, of what is frozen the forward pass alone, and nothing of an encoder whose tokens
    are kept. Patches and image tokens that training leaves out are not counted. Nothing is taken
    off for adapters, nor added for the classes of a task head."""
    model, head = config.model, heads.head_kind(config.head.kind)
    frames, patches = max(config.data.num_frames, 1), navit.budget(model, config.data)
    parts = forward_flops(model, frames, patches, training=True)
    if head:
        num_patches = num_remaining(patches, model.image.patch_dropout)
        places, source = frames * (num_patches + int(model.image.class_token)), model.image.width
        if head.reads_text:
            places, source = model.text.max_len, model.text.width
        width = config.head.sizes(model)[0]
        parts["head"] = _attention(config.head.num_queries, places, width, source)
    if config.loss.hidden_weight:
        # Each sees all patches, some of them hidden, beside the pass that the other losses read.
        every = forward_flops(model, frames, patches)["encoder"]
        parts |= dict(hidden=every + 2 * patches * model.image.width**2, teacher=every)
    outputs = {output for objective in losses.of(config) for output in objective.outputs}
    read = set[str]().union(*(reads(config, output) for output in outputs))
    if config.data.features:
        read -= {"encoder"}
    frozen = _frozen(config, set(parts)) | {"teacher"}
    images = head.images if head else 1
    return images * sum((1 if part in frozen else 3) * parts[part] for part in read)


def _frozen(config: Config, parts: set[str]) -> set[str]:
    """Those of the parts through which no gradient goes, see `training.state.trainable`."""
    optimizer = config.optimizer
    if optimizer.lora_rank:
        return set()
    if config.head.kind and optimizer.encoder_learning_rate == 0:
        return parts - {"head"}
    if optimizer.keep_embeddings:
        return reads(config, "image_embedding") | reads(config, "text_embedding")
    return {"encoder"} if config.frozen_encoder else set()


def reads(config: Config, output: str) -> set[str]:
    """The parts, named as in `forward_flops`, that a field of coca.Outputs depends on.

    Raises ValueError for a field that is not told here."""
    kind, head = heads.pooler_kind(config.model.pooler.kind), heads.head_kind(config.head.kind)
    pooled = {"encoder", "contrastive_pooler", "image_joint"}
    if kind.in_cascade or not kind.second_pooler:
        pooled |= {"generative_pooler"}
    states = {"encoder", "generative_pooler", "unimodal", "multimodal"}
    found: dict[str, set[str]] = {
        "image_embedding": pooled,
        "image_tokens": {"encoder", "generative_pooler"},
        "text_embedding": {"unimodal", "text_joint"},
        "states": states,
        "kernel": {"softmax"},
        "class_logits": {"head"} | (states if head and head.reads_text else {"encoder"}),
        "pooled": {"encoder"},
        "predicted_tokens": {"hidden", "teacher"},
        **dict.fromkeys(("scale", "logit_bias", "bias", "bag_kernel", "hidden"), set()),
    }
    if output not in found:
        raise ValueError(
            f"nothing says which parts of the model the output {output!r} depends on; add it to "
            "`reads` of estimate/flops.py"
        )
    return found[output]


def model_flops(model: Model, num_frames: int = 0) -> int:
    """Floating-point operations of one forward pass over one pair, a multiply-add being two; of a
    clip of so many frames in place of an image.

    Matrix products only, attention over all keys, as CoCa's arithmetic is usually given: 708.9
    GFLOP for the 2.1B model at 288 pixels and 64 tokens.
    """
    return sum(forward_flops(model, num_frames).values())


def forward_flops(
    model: Model, num_frames: int = 0, patches: int = 0, *, training: bool = False
) -> dict[str, int]:
    """What `model_flops` adds up, by part of the model; patches: of an image, 0 for those of a
    square one; training: without the patches and image tokens that training leaves out."""
    frames = max(num_frames, 1)
    image, text, pooler = model.image, model.text, model.pooler
    patches = patches or shapes.patches(model.image_size, model.patch_size)
    num_patches = num_remaining(patches, image.patch_dropout) if training else patches
    tokens = num_patches + int(image.class_token)
    inside = tokens + image.registers
    length, queries = text.max_len, pooler.num_queries

    def kv_width(heads: int) -> int | None:
        return text.width * text.kv_heads // heads if text.kv_heads else None

    def mlp(n: int, width: int, dim: int) -> int:
        return (6 if model.gated_mlp else 4) * n * width * dim

    blocks = image.depth * (
        _attention(inside, inside, image.width) + mlp(inside, image.width, image.mlp_dim)
    )
    encoder = frames * (_before_blocks(model, patches) + blocks)
    kind = heads.pooler_kind(pooler.kind)
    generative = _attention(queries, frames * tokens, text.width, image.width) if kind.pools else 0
    contrastive = 0
    if kind.in_cascade:
        contrastive = _attention(1, queries, text.width)
    elif kind.second_pooler:
        contrastive = _attention(1, frames * tokens, text.width, image.width)
    with_cls = length + 1
    unimodal = text.unimodal_depth * (
        _attention(with_cls, with_cls, text.width, kv_width=kv_width(text.num_heads))
        + mlp(with_cls, text.width, text.mlp_dim)
    )
    seen = kind.num_seen(queries) if kind.pools else frames * num_patches
    seen = num_remaining(seen, pooler.token_dropout) if training else seen
    multimodal_dim = text.multimodal_mlp_dim or text.mlp_dim
    upper = text.multimodal_heads or text.num_heads
    mlps = 2 if text.cross == "open_clip" else 1
    multimodal = text.multimodal_depth * (
        _attention(length, length, text.width, kv_width=kv_width(upper))
        + _attention(length, seen, text.width, kv_width=kv_width(upper))
        + mlps * mlp(length, text.width, multimodal_dim)
    )
    joint = 2 * text.width * model.embed_dim
    return dict(
        encoder=encoder,
        generative_pooler=generative,
        contrastive_pooler=contrastive,
        unimodal=unimodal,
        multimodal=multimodal,
        softmax=2 * length * text.width * text.vocab_size,
        image_joint=joint,
        text_joint=joint,
    )


def _attention(
    n: int, m: int, width: int, source: int | None = None, kv_width: int | None = None
) -> int:
    """Of n queries over m places of width `source`; kv_width: of keys and values."""
    source, kv_width = source or width, kv_width or width
    return 2 * (2 * n * width**2 + 2 * m * source * kv_width + 2 * n * m * width)


def _before_blocks(model: Model, num_patches: int) -> int:
    """Of an image's convolutional stem, where it has one, and the projection of its patches."""
    image: ImageModel = model.image
    channels, values = 3, 3 * num_patches * math.prod(shapes.pair(model.patch_size))
    stem = 0
    for width, depth in zip(image.conv_widths, image.conv_depths):
        places = values // channels // 4
        stem += 2 * 9 * places * width * (channels + 2 * depth * width)
        channels, values = width, places * width
    return stem + 2 * values * image.width
