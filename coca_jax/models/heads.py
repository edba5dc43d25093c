"""Task heads: a new attentional pooler and a linear classifier (paper Section 3.3 and 4.2)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from coca_jax.models import layers
from coca_jax.models.pooler import AttentionalPooler
from coca_jax.ops.reference import Reference

# What a head pools: the tokens of the image encoder, the decoder's outputs over a question about
# one image, or those over one text beside each of two images.
KINDS = ("classification", "answer", "pair")


REFERENCE = Reference()


class TaskHead(nn.Module):
    """Pools tokens with `num_queries` learned queries and projects what they found to classes.

    kind: one of KINDS. With 'pair' the tokens of the two images of an example are adjacent rows;
    each is pooled alone, and the classifier sees both side by side (paper: NLVR2).
    The classifier starts at zero, so every class is equally likely at first.
    """

    kind: str
    num_classes: int
    num_queries: int
    width: int
    num_heads: int
    options: layers.BlockOptions = layers.BlockOptions()

    @nn.compact
    def __call__(self, tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """tokens [R, N, W], valid bool [R, N] -> logits float32 [B, C]; R is B, or 2 B of pairs."""
        mask = None if valid is None else valid[:, None, None, :]
        pooled = AttentionalPooler(
            self.num_queries,
            width=self.width,
            num_heads=self.num_heads,
            options=self.options,
            name="pooler",
        )(tokens, mask)
        parts = self.num_queries * (2 if self.kind == "pair" else 1)
        logits = layers.Projection(
            (self.num_classes,),
            axes=("embed", "joint"),
            init_scale=0.0,
            ops=self.options.ops,
            name="classifier",
        )(pooled.reshape((-1, parts * self.width)).astype(jnp.float32))
        return logits.astype(jnp.float32)


def build(
    head: ConfigDict, model: ConfigDict, num_classes: int, ops: Reference = REFERENCE
) -> TaskHead:
    """The module that `config.head` describes, for a model of `config.model`.

    Raises ValueError for an unknown kind, no query, heads that do not divide the pooler's width, or
    fewer than two classes.
    """
    width = head.get("width", 0) or model.text.width
    num_heads = head.get("num_heads", 0) or model.pooler.num_heads
    if head.kind not in KINDS:
        raise ValueError(f"head.kind={head.kind!r}; choose from {', '.join(KINDS)}, or '' for none")
    if head.num_queries < 1:
        raise ValueError(f"head.num_queries={head.num_queries}; the pooler needs at least 1")
    if width < 1 or num_heads < 1 or width % num_heads:
        raise ValueError(
            f"head.num_heads={num_heads} does not divide head.width={width} (0 in the config takes "
            "the model's); choose a divisor"
        )
    if num_classes < 2:
        raise ValueError(
            f"head.kind={head.kind!r} has {num_classes} classes; name two or more in head.classes "
            "or give data with labels"
        )
    return TaskHead(
        kind=head.kind,
        num_classes=num_classes,
        num_queries=head.num_queries,
        width=width,
        num_heads=num_heads,
        options=layers.BlockOptions.from_config(model, ops),
    )
