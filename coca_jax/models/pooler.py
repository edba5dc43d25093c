"""Attentional poolers: learned queries over the encoder's tokens (paper Section 3.2)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from coca_jax.models import layers
from coca_jax.ops.reference import Reference


class AttentionalPooler(nn.Module):
    """tokens [B, N, W] -> [B, Q, D]: one multi-head attention layer with Q learned queries.

    Queries and tokens are normalised first; no residual and no MLP, as in the paper's counts.
    """

    num_queries: int
    width: int
    num_heads: int
    query_std: float = 0.02
    options: layers.BlockOptions = layers.BlockOptions()

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """mask: bool, broadcastable to [B, H, Q, N]; True where a query may look."""
        query = layers.Table(
            (self.num_queries, self.width),
            axes=("position", "embed"),
            init_std=self.query_std,
            name="query",
        )()
        plain = dataclasses.replace(self.options, ops=Reference())  # of a table: a few rows
        query = layers.Norm(plain, name="query_norm")(query)
        query = jnp.broadcast_to(query, (tokens.shape[0],) + query.shape)
        tokens = layers.Norm(self.options, name="token_norm")(tokens)
        attention = layers.Attention(
            self.width, self.num_heads, options=self.options, name="attention"
        )
        return attention(query, tokens, mask)
