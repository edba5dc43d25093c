"""Where a model looks: the attention of its embedding and of each word over the picture.

Shape letters: B images, L text length, Q image tokens, H heads, N tokens of the encoder, M patches
of an image, of a clip those of all its frames.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.models import block, coca, layers
from coca_jax.ops.reference import Reference


def recording(model: coca.CoCa) -> coca.CoCa:
    """The same model by the reference form of the operations, which `maps` wants: the loops over
    layers of other forms do not record."""

    def plain(options: layers.BlockOptions) -> layers.BlockOptions:
        return dataclasses.replace(options, ops=Reference())

    decoder = model.decoder
    return model.clone(
        options=plain(model.options),
        pooler_options=plain(model.pooler_options),
        encoder=model.encoder.clone(options=plain(model.encoder.options)),
        decoder=decoder.clone(
            options=plain(decoder.options), multimodal_options=plain(decoder.upper)
        ),
    )


def maps(
    model: coca.CoCa, params: dict, pixels: jax.Array, tokens: jax.Array, valid: jax.Array
) -> tuple[coca.Outputs, jax.Array, jax.Array]:
    """One pass over images and their texts, and its attention.

    A word's attention over the image tokens, the mean of all layers and heads, is spread over the
    patches by the attention of the pooler that made those tokens: attention rollout (Abnar and
    Zuidema 2020) over the two attentions that stand between a word and the encoder. What the
    encoder mixed before is not followed back.

    pixels, tokens [B, L], valid [B, L]: as CoCa takes them. model: of `recording`.

    Returns:
        the pass's outputs; float32 [B, L, M], what the position saw that predicts the next token;
        float32 [B, M], what the embedding is made of. Each sums to 1, less the parts of the
        class token and of registers.
    """
    out, variables = model.apply(
        {"params": params}, pixels, tokens, valid, mutable=[layers.RECORDED]
    )
    seen = variables[layers.RECORDED]
    frames = pixels.shape[1] if pixels.ndim == 5 else 1
    cross = seen["text_decoder"]["multimodal"][block.STACKED]["cross_attention"]["weights"][0]
    words = cross.mean((0, 2))  # [B, L, Q]
    if not model.pooler_kind.pools:  # words see patches, and the class token's last look is taken
        own = seen["image_encoder"]["blocks"][block.STACKED]["attention"]["weights"][0]
        image = own[-1].mean(1)[:, 0].reshape(len(pixels), -1) / frames
        image = _patches(model, image, frames, model.encoder.registers)  # not yet taken away there
        return out, words.astype(jnp.float32), image
    pooled = [x.mean(1) for x in seen["generative_pooler"]["attention"]["weights"]]  # [B, Q, N]
    # Of clips the first call pooled each frame, for the embedding, the last all of them.
    of_each, of_all = pooled[0], pooled[-1]
    if model.pooler_kind.by_query:
        of_all, image = of_all[:, 1:], of_each[:, 0]
    else:
        image = seen["contrastive_pooler"]["attention"]["weights"][0].mean(1)[:, 0]
        if model.pooler_kind.in_cascade:
            image = jnp.einsum("bq,bqn->bn", image, of_each)
    words = jnp.einsum("blq,bqn->bln", words, of_all)
    image = image.reshape(len(pixels), -1) / frames
    return out, _patches(model, words, frames), _patches(model, image, frames)


def _patches(model: coca.CoCa, weights: jax.Array, frames: int, registers: int = 0) -> Any:
    """Weights [..., T N] without those of the frames' class tokens and the registers behind them,
    float32 [..., T M]."""
    shape = weights.shape[:-1]
    weights = weights.astype(jnp.float32).reshape((*shape, frames, -1))
    first = int(model.encoder.class_token) + registers
    return weights[..., first:].reshape((*shape, -1))
