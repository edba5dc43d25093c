"""Attentional poolers: learned queries over the encoder's tokens (paper Section 3.2)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from coca_jax.config import Head, Model, heads
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


# Task heads: a new attentional pooler and a linear classifier (paper Section 3.3 and 4.2).


REFERENCE = Reference()


class TaskHead(nn.Module):
    """Pools tokens with `num_queries` learned queries and projects what they found to classes.

    kind: what it pools. Where an example has several images, their tokens are adjacent rows.
    The classifier starts at zero, so every class is equally likely at first.
    """

    kind: heads.HeadKind
    num_classes: int
    num_queries: int
    width: int
    num_heads: int
    options: layers.BlockOptions = layers.BlockOptions()

    @nn.compact
    def __call__(self, tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """tokens [R, N, W], valid bool [R, N] -> logits float32 [B, C]; R is B x kind.images."""
        mask = None if valid is None else valid[:, None, None, :]
        pooled = AttentionalPooler(
            self.num_queries,
            width=self.width,
            num_heads=self.num_heads,
            options=self.options,
            name="pooler",
        )(tokens, mask)
        parts = self.num_queries * self.kind.images
        logits = layers.Projection(
            (self.num_classes,),
            axes=("embed", "joint"),
            init_scale=0.0,
            ops=self.options.ops,
            exact=True,
            name="classifier",
        )(pooled.reshape((-1, parts * self.width)).astype(jnp.float32))
        return logits.astype(jnp.float32)


def build(head: Head, model: Model, num_classes: int, ops: Reference = REFERENCE) -> TaskHead:
    """The module that `config.head` describes, for a model of `config.model`.

    Raises ValueError for heads that do not divide the pooler's width, or fewer than two classes.
    """
    width, num_heads = head.sizes(model)
    kind = heads.head_kind(head.kind)
    assert kind is not None, "called for a run without a head"
    if num_classes < 2:
        raise ValueError(
            f"head.kind={head.kind!r} has {num_classes} classes; name two or more in head.classes "
            "or give data with labels"
        )
    return TaskHead(
        kind=kind,
        num_classes=num_classes,
        num_queries=head.num_queries,
        width=width,
        num_heads=num_heads,
        options=layers.BlockOptions.from_config(model, ops, model.pooler.block),
    )
