"""The causal text decoder, split in two halves (paper Section 3.2, Fig. 2)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from coca_jax.models import block, layers
from coca_jax.models.part import BOTTOM, STACK, Part
from coca_jax.partitioning import constrain

# See roles.Role. The halves are one tower: the upper one's layers stand on the lower one's.
PARTS = dict(
    token_embedding=Part("decoding", "text", BOTTOM),
    positions=Part("decoding", "text", BOTTOM, positions="text"),
    cls=Part("contrastive", "text", BOTTOM),
    unimodal=Part("decoding", "text", STACK),
    unimodal_norm=Part("contrastive", "text"),
    multimodal=Part("decoding", "text", STACK),
    multimodal_norm=Part("decoding", "text"),
    head=Part("captioning", "text"),
)


class TextDecoder(nn.Module):
    """Lower half: text alone, with [CLS] appended; upper half: cross-attends to the image.

    cls_mask: 'exact' ([CLS] sees every valid token and itself) or 'shifted' (open_clip's released
    models: the validity mask stands one place too far right).
    cross: the layout of the upper half's blocks, see block.Block.
    multimodal_heads, multimodal_mlp_dim: of the upper half; None: as in the lower half.
    """

    width: int
    unimodal_depth: int
    multimodal_depth: int
    mlp_dim: int
    num_heads: int
    vocab_size: int
    max_len: int
    tie_embeddings: bool = False
    head_bias: bool = True
    cls_mask: str = "exact"
    cross: str = "paper"
    multimodal_heads: int | None = None
    multimodal_mlp_dim: int | None = None
    remat: str = "none"
    options: layers.BlockOptions = layers.BlockOptions()

    def setup(self) -> None:
        stack: dict[str, Any] = dict(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            causal=True,
            remat=self.remat,
            options=self.options,
        )
        self.token_embedding = layers.Table((self.vocab_size, self.width), axes=("vocab", "embed"))
        self.positions = layers.Table((self.max_len + 1, self.width), axes=("position", "embed"))
        self.cls = layers.Table((self.width,), axes=("norm",))
        self.unimodal = block.Stack(depth=self.unimodal_depth, **stack)
        self.unimodal_norm = layers.LayerNorm(self.options.dtype, self.options.ops)
        stack["num_heads"] = self.multimodal_heads or self.num_heads
        stack["mlp_dim"] = self.multimodal_mlp_dim or self.mlp_dim
        self.multimodal = block.Stack(depth=self.multimodal_depth, cross=self.cross, **stack)
        self.multimodal_norm = layers.LayerNorm(self.options.dtype, self.options.ops)
        if not self.tie_embeddings:
            self.head = Head(self.vocab_size, self.width, self.head_bias)

    def encode(self, tokens: jax.Array, text_valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """tokens int [B, L], text_valid bool [B, L] -> (text states [B, L, D], [CLS] [B, D]).

        L may be anything up to max_len; [CLS] always has the last row of the position table, so a
        caption's embedding does not depend on how far it is padded.
        """
        batch, length = tokens.shape
        if length > self.max_len:
            raise ValueError(
                f"captions have {length} tokens, more than model.text.max_len={self.max_len}; "
                "truncate them"
            )
        embedding, positions = self.token_embedding(), self.positions()
        dtype = self.options.ops.stream_dtype(self.options.dtype)
        x = embedding.astype(dtype)[tokens] + positions[:length].astype(dtype)
        x = constrain(x, "batch", "length", "act_embed")
        cls = (self.cls() + positions[self.max_len]).astype(dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(cls, (batch, 1, self.width))], axis=1)
        x = constrain(x, "batch", "length", "act_embed")
        always = jnp.ones((batch, 1), bool)
        order = (text_valid, always) if self.cls_mask == "exact" else (always, text_valid)
        keys = jnp.concatenate(order, axis=1)
        x = self.unimodal(x, keys[:, None, None, :])
        states = constrain(x[:, :-1], "batch", "length", "act_embed")
        return states, self.unimodal_norm(constrain(x[:, -1], "batch", "act_embed"))

    def fuse(self, text_states: jax.Array, image_tokens: jax.Array) -> jax.Array:
        """(text states [B, L, D], image tokens [B, Q, D]) -> states before the softmax [B, L, D].

        Captions are padded on the right, so the causal mask already hides padding from tokens.
        """
        dtype = self.options.ops.stream_dtype(self.options.dtype)
        x = self.multimodal(text_states, None, image_tokens.astype(dtype))
        return self.multimodal_norm(x).astype(self.options.dtype)

    def output_layer(self) -> tuple[jax.Array, jax.Array | None]:
        """The softmax layer: kernel [D, V] and bias [V] (None when tied or without bias)."""
        if self.tie_embeddings:
            return self.token_embedding().T, None
        return self.head()

    def __call__(
        self, tokens: jax.Array, text_valid: jax.Array, image_tokens: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Both halves -> ([CLS] [B, D], states before the softmax [B, L, D])."""
        text_states, cls = self.encode(tokens, text_valid)
        states = self.fuse(text_states, image_tokens)
        self.output_layer()  # so that initialisation makes its parameters
        return cls, states


class Head(nn.Module):
    """The softmax layer's parameters; losses and decoding multiply, in chunks where they want."""

    vocab_size: int
    width: int
    use_bias: bool = True

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        kernel = layers.Table(
            (self.width, self.vocab_size), axes=("embed", "vocab"), name="kernel"
        )()
        if not self.use_bias:
            return kernel, None
        return kernel, layers.Table((self.vocab_size,), ("vocab",), init_std=0.0, name="bias")()
