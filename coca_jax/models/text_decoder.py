"""The causal text decoder, split in two halves (paper Section 3.2, Fig. 2)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from coca_jax import text_ends
from coca_jax.models import block, layers, rotary
from coca_jax.models.part import BOTTOM, STACK, Part
from coca_jax.partitioning import constrain

# See roles.Role. The halves are one tower: the upper one's layers stand on the lower one's.
PARTS = dict(
    token_embedding=Part("text", "text", BOTTOM),
    positions=Part("text", "text", BOTTOM, positions="text"),
    cls=Part("contrastive", "text", BOTTOM),
    unimodal=Part("text", "text", STACK),
    unimodal_norm=Part("contrastive", "text"),
    multimodal=Part("decoding", "text", STACK),
    multimodal_norm=Part("decoding", "text"),
    head=Part("captioning", "text"),
)


class TextDecoder(nn.Module):
    """Unimodal half: text alone, with [CLS] appended; multimodal half: cross-attends to the image.

    cls_mask: 'exact' ([CLS] sees every valid token and itself) or 'shifted' (open_clip's released
    models: the validity mask stands one place too far right).
    cross: the layout of the multimodal half's blocks, see block.Block.
    multimodal_heads, multimodal_mlp_dim: of the multimodal half; None: as in the unimodal one.
    kv_heads: of both halves' attention, see layers.Attention. rope_theta: see rotary.of_places.
    multimodal_options: of the multimodal half's blocks; None: `options`, as of the unimodal one.
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
    kv_heads: int = 0
    rope_theta: float = 10_000.0
    remat: str = "none"
    options: layers.BlockOptions = layers.BlockOptions()
    multimodal_options: layers.BlockOptions | None = None

    @property
    def upper(self) -> layers.BlockOptions:
        """Of the multimodal half's blocks."""
        return self.multimodal_options or self.options

    def setup(self) -> None:
        stack: dict[str, Any] = dict(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            kv_heads=self.kv_heads,
            causal=True,
            remat=self.remat,
            options=self.options,
        )
        self.token_embedding = layers.Table((self.vocab_size, self.width), axes=("vocab", "embed"))
        if self.options.learned:
            shape = (self.max_len + 1, self.width)
            self.positions = layers.Table(shape, axes=("position", "embed"))
        self.cls = layers.Table((self.width,), axes=("norm",))
        self.unimodal = block.Stack(depth=self.unimodal_depth, **stack)
        self.unimodal_norm = layers.Norm(self.options)
        stack["num_heads"] = self.multimodal_heads or self.num_heads
        stack["options"] = self.upper
        stack["mlp_dim"] = self.multimodal_mlp_dim or self.mlp_dim
        self.multimodal = block.Stack(depth=self.multimodal_depth, cross=self.cross, **stack)
        self.multimodal_norm = layers.Norm(self.upper)
        if not self.tie_embeddings:
            self.head = Head(self.vocab_size, self.width, self.head_bias)

    def encode(self, tokens: jax.Array, text_valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """tokens int [B, L], text_valid bool [B, L] -> (text states [B, L, D], [CLS] [B, D]).

        L may be anything up to max_len; [CLS] always has the last row of the position table, and
        turns as if it stood directly behind the text, so a caption's embedding does not depend on
        how far it is padded.
        """
        batch, length = tokens.shape
        if length > self.max_len:
            raise ValueError(
                f"captions have {length} tokens, more than model.text.max_len={self.max_len}; "
                "truncate them"
            )
        dtype = self.options.ops.stream_dtype(self.options.dtype)
        x, cls = self.token_embedding().astype(dtype)[tokens], self.cls()
        if self.options.learned:
            positions = self.positions()
            x = x + positions[:length].astype(dtype)
            cls = cls + positions[self.max_len]
        x = constrain(x, "batch", "length", "act_embed")
        cls = cls.astype(dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(cls, (batch, 1, self.width))], axis=1)
        x = constrain(x, "batch", "length", "act_embed")
        always = jnp.ones((batch, 1), bool)
        order = (text_valid, always) if self.cls_mask == "exact" else (always, text_valid)
        keys = jnp.concatenate(order, axis=1)
        x = self.unimodal(x, keys[:, None, None, :], None, self._rotation(length, text_valid))
        states = constrain(x[:, :-1], "batch", "length", "act_embed")
        return states, self.unimodal_norm(constrain(x[:, -1], "batch", "act_embed"))

    def fuse(self, text_states: jax.Array, image_tokens: jax.Array) -> jax.Array:
        """(text states [B, L, D], image tokens [B, Q, D]) -> states before the softmax [B, L, D].

        Captions are padded on the right, so the causal mask already hides padding from tokens.
        """
        dtype = self.options.ops.stream_dtype(self.options.dtype)
        rotation = None
        if self.upper.rotary:
            heads = self.multimodal_heads or self.num_heads
            rotation = self._turned(jnp.arange(text_states.shape[1])[None], heads)
        x = self.multimodal(text_states, None, image_tokens.astype(dtype), rotation)
        return self.multimodal_norm(x).astype(self.options.dtype)

    def _rotation(self, length: int, text_valid: jax.Array) -> jax.Array | None:
        """Of `length` tokens and a [CLS] behind each text in the unimodal half, [B, L + 1, K]."""
        if not self.options.rotary:
            return None
        places = jnp.broadcast_to(jnp.arange(length)[None], text_valid.shape)
        places = jnp.concatenate([places, text_ends.lengths(text_valid)[:, None]], axis=1)
        return self._turned(places, self.num_heads)

    def _turned(self, places: jax.Array, heads: int) -> jax.Array:
        return rotary.of_places(places[..., None], self.width // heads, self.rope_theta)

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
