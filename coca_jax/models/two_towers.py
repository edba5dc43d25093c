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

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from coca_jax import ops as operations
from coca_jax.config import Model, heads, read, shapes
from coca_jax.config.heads import CLASS, QUERY, TowerKind
from coca_jax.models import block, image_encoder, initializers, layers
from coca_jax.models.coca import Outputs, check_dtype, normalise
from coca_jax.models.image_encoder import ImageEncoder
from coca_jax.models.onnx_encoder import OnnxEncoder
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
    remat: str = "none"
    options: layers.BlockOptions = layers.BlockOptions()

    def setup(self) -> None:
        self.token_embedding = layers.Table((self.vocab_size, self.width), axes=("vocab", "embed"))
        self.positions = layers.Table((self.max_len, self.width), axes=("position", "embed"))
        self.unimodal = block.Stack(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            causal=self.causal,
            remat=self.remat,
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

    encoder: ImageEncoder | OnnxEncoder
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

    @property
    def kernel_dtype(self) -> Any:
        """Of stacked kernels in a step, see ops.reference.Reference.kernel_dtype."""
        return self.options.ops.kernel_dtype(self.dtype)

    def encode_pixels(self, pixels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """[B, S, S, 3] -> tokens [B, N, W], of clips [B, T, S, S, 3] -> [B, T, N, W]."""
        if pixels.ndim == 5:
            frames = pixels.reshape((-1, *pixels.shape[2:]))
            flat = self.image_encoder(frames, deterministic=deterministic)
            return flat.reshape((*pixels.shape[:2], *flat.shape[1:]))
        return self.image_encoder(pixels, deterministic=deterministic)

    def encode_image(
        self, pixels: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """[B, S, S, 3] -> (embedding float32 [B, E], L2-normalised; the encoder's tokens). Clips
        have the mean of their frames' embeddings."""
        encoded = self.encode_pixels(pixels, deterministic=deterministic)
        if encoded.ndim == 4:
            each = self._pool(encoded.reshape((-1, *encoded.shape[2:])))
            return normalise(each.reshape((*encoded.shape[:2], -1)).mean(1)), encoded
        return self._pool(encoded), encoded

    def locked_features(self, pixels: jax.Array) -> jax.Array:
        """What a locked image side gives the rest of the model: the embedding, float32 [B, E]."""
        return self.encode_image(pixels)[0]

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

    def similarity(self) -> tuple[jax.Array, jax.Array | None]:
        """(inverse temperature, bias of the sigmoid loss or None), float32."""
        return jnp.exp(self.log_scale()), self.logit_bias() if self.sigmoid else None

    def __call__(
        self,
        pixels: jax.Array | None,
        tokens: jax.Array,
        valid: jax.Array,
        prompt_len: jax.Array | None = None,
        *,
        encoded: jax.Array | None = None,
        deterministic: bool = True,
    ) -> Outputs:
        """Both embeddings, as `CoCa.__call__` gives them; there is nothing of a decoder.

        prompt_len: of questions, which a model without a decoder does not answer. encoded: in place
        of pixels, the embeddings that `locked_features` gave.
        """
        del prompt_len
        image = encoded
        if image is None:
            image = self.encode_image(pixels, deterministic=deterministic)[0]
        scale, bias = self.similarity()
        text = self.encode_text(tokens, valid)
        return Outputs(image_embedding=image, text_embedding=text, scale=scale, logit_bias=bias)


def build(
    model: Model, *, remat: str = "none", sigmoid: bool = False, platform: str | None = None
) -> TwoTowers:
    """Makes the towers that `config.model` describes; arguments as of `coca.build`. Raises
    ValueError for sizes that cannot be, or towers that this family does not have."""
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
    platform = platform or jax.default_backend()
    check_dtype(model, platform)
    ops = operations.choose(platform, model.implementation)
    remat = ops.remat if remat == "auto" else remat
    options = layers.BlockOptions.from_config(model, ops)
    text, image = model.text, model.image.to_dict()
    of_image = layers.BlockOptions.from_config(model, ops, image.pop("block"))
    of_text = layers.BlockOptions.from_config(model, ops, text.block)
    return TwoTowers(
        encoder=image_encoder.build(model, {**image, "remat": remat}, of_image),
        tower=TextTower(
            width=text.width,
            depth=text.unimodal_depth,
            mlp_dim=text.mlp_dim,
            num_heads=text.num_heads,
            vocab_size=text.vocab_size,
            max_len=text.max_len,
            causal=kind.causal,
            remat=remat,
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
    return _draw(module)(rng)


@functools.lru_cache(maxsize=4)  # a start asks twice, of shapes and of numbers
def _draw(module: TwoTowers) -> Callable[[jax.Array], dict]:
    size, length = shapes.pair(module.encoder.image_size), module.tower.max_len

    def alone(rng: jax.Array) -> dict:
        pixels, tokens = jnp.zeros((1, *size, 3)), jnp.zeros((1, length), jnp.int32)
        return module.init(rng, pixels, tokens, jnp.ones(tokens.shape, bool))["params"]

    return initializers.together(alone)
