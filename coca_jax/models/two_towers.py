"""Towers without a decoder: CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023), Perception
Encoder core (Bolya et al. 2025), OpenVision (Li et al. 2025).

The same encoder and blocks as CoCa's, with other heads. `model.family` says which:

- 'clip' (CLIP, MetaCLIP, MetaCLIP 2): the image is its class token, behind a norm of its own; the
  text is causal, and its end symbol's state is its embedding.
- 'siglip' (SigLIP, SigLIP 2): the image is pooled by attention with one learned query and an MLP;
  the text sees all of itself, padding too, and its last place is its embedding.
- 'pe': images as SigLIP's, with a projection behind the pooler; texts as CLIP's.
- 'openvision' (CLIPA too): the image is the mean of its patches, behind a norm; texts as SigLIP's.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from coca_jax import ops as operations
from coca_jax.config import Model, heads, read, shapes
from coca_jax.config.heads import CLASS, QUERY, TowerKind
from coca_jax.models import block, layers
from coca_jax.models.coca import normalise
from coca_jax.models.image_encoder import ImageEncoder
from coca_jax.ops.reference import wide
from coca_jax.parallel.sharding import constrain


class TextTower(nn.Module):
    """tokens int [B, L], valid bool [B, L] -> the state that is the text's, [B, D].

    causal: pooled at the last valid token; else all places see each other, and the last of max_len
    is taken: the tokens must be padded to it.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    vocab_size: int
    max_len: int
    causal: bool
    options: layers.BlockOptions = layers.BlockOptions()

    def setup(self) -> None:
        self.token_embedding = layers.Table((self.vocab_size, self.width), axes=("vocab", "embed"))
        self.positions = layers.Table((self.max_len, self.width), axes=("position", "embed"))
        self.unimodal = block.Stack(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            causal=self.causal,
            options=self.options,
        )
        self.unimodal_norm = layers.Norm(self.options)

    def __call__(self, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        if length > self.max_len or (not self.causal and length != self.max_len):
            raise ValueError(
                f"texts have {length} tokens, and the model takes "
                f"{'up to ' if self.causal else ''}{self.max_len}"
            )
        dtype = self.options.ops.stream_dtype(self.options.dtype)
        x = self.token_embedding().astype(dtype)[tokens] + self.positions()[:length].astype(dtype)
        x = self.unimodal(constrain(x, "batch", "length", "act_embed"), None)
        if self.causal:
            last = jnp.maximum(shapes.lengths(valid) - 1, 0)
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        else:
            x = x[:, -1]
        return self.unimodal_norm(x)


class AttentionPooler(nn.Module):
    """tokens [B, N, D] -> [B, D]: one query attends to all, and an MLP beside it."""

    num_heads: int
    mlp_dim: int
    options: layers.BlockOptions = layers.BlockOptions()

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        width = tokens.shape[-1]
        query = layers.Table((1, width), axes=("position", "embed"), name="query")()
        query = jnp.broadcast_to(query.astype(tokens.dtype), (tokens.shape[0], 1, width))
        attention = layers.Attention(width, self.num_heads, options=self.options, name="attention")
        x = attention(query, tokens)
        normal = layers.Norm(self.options, name="norm")(x)
        return (x + layers.Mlp(self.mlp_dim, options=self.options, name="mlp")(normal))[:, 0]


class TwoTowers(nn.Module):
    """See the module's docstring and `build`. The names of its parameters are those of CoCa."""

    encoder: ImageEncoder
    tower: TextTower
    kind: TowerKind
    pooler_heads: int
    pooler_mlp: int
    embed_dim: int
    temperature: float = 0.07
    sigmoid: bool = False
    task_head: None = None
    options: layers.BlockOptions = layers.BlockOptions()

    @property
    def dtype(self) -> Any:
        """Of products."""
        return self.options.dtype

    def setup(self) -> None:
        self.image_encoder = self.encoder.copy(name="image_encoder")
        self.text_decoder = self.tower.copy(name="text_decoder")
        projection: dict[str, Any] = dict(
            axes=("embed", "joint"), dtype=wide(self.dtype), ops=self.options.ops, exact=True
        )
        kind, joint = self.kind, (self.embed_dim,)
        if kind.pool == QUERY:
            self.contrastive_pooler = AttentionPooler(
                self.pooler_heads, self.pooler_mlp, options=self.options
            )
        else:
            self.pooled_norm = layers.Norm(self.options)
        if kind.projection:
            self.image_to_joint = layers.Projection(joint, use_bias=kind.image_bias, **projection)
        self.text_to_joint = layers.Projection(joint, use_bias=kind.text_bias, **projection)
        self.log_scale = layers.Scalar(-math.log(self.temperature))
        if self.sigmoid:
            self.logit_bias = layers.Scalar(-10.0)

    def encode_pixels(self, pixels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """[B, S, S, 3] -> tokens [B, N, W], of clips [B, T, S, S, 3] -> [B, T, N, W]."""
        if pixels.ndim == 5:
            flat = self.image_encoder(pixels.reshape((-1, *pixels.shape[2:])))
            return flat.reshape((*pixels.shape[:2], *flat.shape[1:]))
        return self.image_encoder(pixels)

    def encode_image(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, S, S, 3] -> (embedding float32 [B, E], L2-normalised; the encoder's tokens). Clips
        have the mean of their frames' embeddings."""
        encoded = self.encode_pixels(pixels)
        if encoded.ndim == 4:
            each = self._pool(encoded.reshape((-1, *encoded.shape[2:])))
            return normalise(each.reshape((*encoded.shape[:2], -1)).mean(1)), encoded
        return self._pool(encoded), encoded

    def _pool(self, tokens: jax.Array) -> jax.Array:
        if self.kind.pool == QUERY:
            pooled = self.contrastive_pooler(tokens)
        elif self.kind.pool == CLASS:
            pooled = self.pooled_norm(tokens[:, 0])
        else:
            pooled = self.pooled_norm(tokens[:, int(self.encoder.class_token) :].mean(1))
        if self.kind.projection:
            pooled = self.image_to_joint(pooled.astype(wide(self.dtype)))
        return normalise(pooled)

    def encode_text(self, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        """tokens int [B, L], valid bool [B, L] -> float32 [B, E], L2-normalised."""
        state = self.text_decoder(tokens, valid)
        return normalise(self.text_to_joint(state.astype(wide(self.dtype))))

    def __call__(
        self, pixels: jax.Array, tokens: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """(image embeddings, text embeddings, inverse temperature, bias of the sigmoid or None)."""
        bias = self.logit_bias() if self.sigmoid else None
        embeddings = self.encode_image(pixels)[0], self.encode_text(tokens, valid)
        return *embeddings, jnp.exp(self.log_scale()), bias


def build(model: Model, *, sigmoid: bool = False, platform: str | None = None) -> TwoTowers:
    """Makes the towers that `config.model` describes. Raises ValueError for sizes that cannot be,
    or towers that this family does not have."""
    model = read(Model, model, "model")
    kind = heads.tower_kind(model.family)
    if not kind.projection and model.embed_dim != model.image.width:
        raise ValueError(
            f"model.embed_dim={model.embed_dim}: {kind.about} has no projection behind its pooler, "
            f"whose width is model.image.width={model.image.width}"
        )
    if kind.pool == CLASS and not model.image.class_token:
        raise ValueError(
            f"model.image.class_token=False: of {kind.about} it is the image; set True"
        )
    ops = operations.choose(platform or jax.default_backend(), model.implementation)
    options = layers.BlockOptions.from_config(model, ops)
    text, image = model.text, model.image.to_dict()
    of_image = layers.BlockOptions.from_config(model, ops, image.pop("block"))
    of_text = layers.BlockOptions.from_config(model, ops, text.block)
    return TwoTowers(
        encoder=ImageEncoder(
            image_size=model.image_size,
            patch_size=model.patch_size,
            **image,
            options=of_image,
        ),
        tower=TextTower(
            width=text.width,
            depth=text.unimodal_depth,
            mlp_dim=text.mlp_dim,
            num_heads=text.num_heads,
            vocab_size=text.vocab_size,
            max_len=text.max_len,
            causal=kind.causal,
            options=of_text,
        ),
        kind=kind,
        pooler_heads=model.pooler.num_heads,
        pooler_mlp=model.pooler.mlp_dim or model.image.mlp_dim,
        embed_dim=model.embed_dim,
        temperature=model.temperature,
        sigmoid=sigmoid,
        options=options,
    )


def init(module: TwoTowers, rng: jax.Array) -> dict:
    """Fresh parameters, boxed with their logical axis names."""
    size, length = shapes.pair(module.encoder.image_size), module.tower.max_len
    pixels, tokens = jnp.zeros((1, *size, 3)), jnp.zeros((1, length), jnp.int32)
    return module.init(rng, pixels, tokens, jnp.ones(tokens.shape, bool))["params"]
