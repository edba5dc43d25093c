"""How many operations the model of a config takes, by formula."""

from __future__ import annotations

import math

from coca_jax import image_shape
from coca_jax.config import ImageModel, Model
from coca_jax.models import pooler_kinds


def model_flops(model: Model, num_frames: int = 0) -> int:
    """Floating-point operations of one forward pass over one pair, a multiply-add being two; of a
    clip of so many frames in place of an image.

    Matrix products only, attention over all keys, as CoCa's arithmetic is usually given: 708.9
    GFLOP for the 2.1B model at 288 pixels and 64 tokens. A training step is three times that.
    """
    frames = max(num_frames, 1)
    image, text, pooler = model.image, model.text, model.pooler
    num_patches = image_shape.patches(model.image_size, model.patch_size)
    tokens = num_patches + int(image.class_token)
    inside = tokens + image.registers
    length, queries = text.max_len, pooler.num_queries

    def attention(
        n: int, m: int, width: int, source: int | None = None, heads: int | None = None
    ) -> int:
        source = width if source is None else source
        kv_width = width * text.kv_heads // heads if heads and text.kv_heads else width
        return 2 * (2 * n * width**2 + 2 * m * source * kv_width + 2 * n * m * width)

    def mlp(n: int, width: int, dim: int) -> int:
        return (6 if model.gated_mlp else 4) * n * width * dim

    blocks = image.depth * (
        attention(inside, inside, image.width) + mlp(inside, image.width, image.mlp_dim)
    )
    encoder = frames * (_before_blocks(model, num_patches) + blocks)
    kind = pooler_kinds.of(pooler.kind)
    pooled = attention(queries, frames * tokens, text.width, image.width) if kind.pools else 0
    if kind.in_cascade:
        pooled += attention(1, queries, text.width)
    elif kind.second_pooler:
        pooled += attention(1, frames * tokens, text.width, image.width)
    with_cls = length + 1
    unimodal = text.unimodal_depth * (
        attention(with_cls, with_cls, text.width, heads=text.num_heads)
        + mlp(with_cls, text.width, text.mlp_dim)
    )
    seen = kind.num_seen(queries) if kind.pools else frames * num_patches
    multimodal_dim = text.multimodal_mlp_dim or text.mlp_dim
    upper = text.multimodal_heads or text.num_heads
    mlps = 2 if text.cross == "open_clip" else 1
    multimodal = text.multimodal_depth * (
        attention(length, length, text.width, heads=upper)
        + attention(length, seen, text.width, heads=upper)
        + mlps * mlp(length, text.width, multimodal_dim)
    )
    softmax = 2 * length * text.width * text.vocab_size
    joint = 2 * 2 * text.width * model.embed_dim
    return encoder + pooled + unimodal + multimodal + softmax + joint


def _before_blocks(model: Model, num_patches: int) -> int:
    """Of an image's convolutional stem, where it has one, and the projection of its patches."""
    image: ImageModel = model.image
    channels, values = 3, 3 * math.prod(image_shape.pair(model.image_size))
    stem = 0
    for width, depth in zip(image.conv_widths, image.conv_depths):
        places = values // channels // 4
        stem += 2 * 9 * places * width * (channels + 2 * depth * width)
        channels, values = width, places * width
    return stem + 2 * values * image.width
