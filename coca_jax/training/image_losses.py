"""Losses that train the image encoder without comparing rows: beside the contrastive one they make
up for small batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.config import Config
from coca_jax.ops.reference import Reference, wide
from coca_jax.training.objective import Configured, Inputs, Means, by_source


@dataclasses.dataclass(frozen=True)
class BagOfTokens(Configured):
    """Which tokens an image's text has, in any order, from the mean of the encoder's tokens: the
    cross-entropy of the softmax over the vocabulary with the text's tokens as its target, each as
    likely as it is rare (SuperClass, Huang et al. 2024; SuperCLIP, Zhao et al. 2025). It compares
    no rows, so it does not need large batches.

    Rare: log(texts / texts with the token) over the batch, so that what all texts have, as the
    begin and end symbols, counts for nothing.
    """

    weight: float
    vocab_size: int

    name = "bag_loss"
    shown = ("bag_loss",)
    outputs = ("pooled", "bag_kernel")
    fields = ("tokens", "text_valid", "is_label")
    serves = frozenset({"image", "words"})

    @classmethod
    def of(cls, config: Config, ops: Reference) -> BagOfTokens:
        return cls(config.loss.bag_weight, config.model.text.vocab_size)

    def totals(self, batch: Inputs) -> tuple[jax.Array, jax.Array]:
        """(the weight of each token, float32 [V]; rows that have a token of some weight)."""
        tokens = batch["tokens"]
        first = first_places(tokens, batch["text_valid"]).astype(jnp.float32)
        texts = jnp.zeros(self.vocab_size, jnp.float32).at[tokens].add(first)
        rarity = jnp.log(jnp.maximum(batch["text_valid"].any(1).sum(), 1) / jnp.maximum(texts, 1))
        rows = ((first * rarity[tokens]).sum(1) > 0).sum()
        return rarity, jnp.maximum(rows, 1).astype(jnp.float32)

    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        rarity, count = totals
        tokens, pooled = inputs["tokens"], inputs["pooled"]
        parts = first_places(tokens, inputs["text_valid"]) * rarity[tokens]
        whole = parts.sum(1, keepdims=True)
        kernel = inputs["bag_kernel"].astype(pooled.dtype)
        logits = jnp.dot(pooled, kernel, preferred_element_type=wide(pooled.dtype))
        true = (parts * jnp.take_along_axis(logits, tokens, 1)).sum(1) / jnp.maximum(
            whole[:, 0], 1e-6
        )
        known = whole[:, 0] > 0
        rows = jnp.where(known, jax.nn.logsumexp(logits, axis=1) - true, 0.0)
        return rows.sum() / count, by_source(self.name, rows, known, inputs["is_label"])


@dataclasses.dataclass(frozen=True)
class HiddenPatches(Configured):
    """The tokens of hidden patches, as the averaged model makes them of the whole image: the mean
    squared error of a prediction, the targets having mean 0 and variance 1 each (data2vec, Baevski
    et al. 2022; beside image-text losses: SigLIP 2, Tschannen et al. 2025)."""

    weight: float

    name = "hidden_loss"
    shown = ("hidden_loss",)
    outputs = ("predicted_tokens", "hidden")
    fields = ("teacher_tokens", "is_label")
    serves = frozenset({"image", "tokens"})

    @classmethod
    def of(cls, config: Config, ops: Reference) -> HiddenPatches:
        return cls(config.loss.hidden_weight)

    def totals(self, batch: Inputs) -> int:
        """Rows of the whole batch."""
        return batch["is_label"].shape[0]

    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        hidden = inputs["hidden"]
        error = inputs["predicted_tokens"].astype(jnp.float32) - inputs["teacher_tokens"]
        each = jnp.where(hidden, jnp.square(error).mean(-1), 0.0)
        rows = each.sum(1) / jnp.maximum(hidden.sum(1), 1)
        return rows.sum() / totals, by_source(
            self.name, rows, jnp.ones_like(rows), inputs["is_label"]
        )


def first_places(tokens: jax.Array, valid: jax.Array) -> jax.Array:
    """bool [B, L]: where a token of a text [B, L] stands that does not stand before."""
    same = (tokens[:, :, None] == tokens[:, None]) & valid[:, None]
    before = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    return valid & ~(same & before).any(2)
