"""Short captions do not pay for long ones: batches cut to their captions, the longest apart.

With `config.text_lengths` a batch's captions are cut to the smallest of these lengths that holds
them. In a large batch some caption is always long; with `config.text_parts=4` the longest quarter
of the rows stands in every fourth place and runs apart, so that the others are cut further. Losses
and gradients stay what they are: padding counts nowhere. Each pair of lengths is one compiled
graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax import text_ends
from coca_jax.config import Config

Lengths = tuple[int, int]  # of the most rows, and of the longest ones


def arrange(batch: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Reorders the rows of a process: the longest captions to the places that `long_rows` names.

    The rows of a step stay the same; the others keep their order.
    """
    if config.text_parts == 1:
        return batch
    long = long_rows(len(batch["text_valid"]), config)
    ranks = np.argsort(text_ends.lengths(batch["text_valid"]), kind="stable")
    rows = np.empty(len(long), np.int64)
    rows[~long] = np.sort(ranks[: (~long).sum()])
    rows[long] = np.sort(ranks[(~long).sum() :])
    return {name: values[rows] for name, values in batch.items()}


def long_rows(rows: int, config: Config) -> np.ndarray:
    """bool [rows]: where the longest captions are, in every micro-batch and on every device."""
    place = np.arange(rows) // config.accumulate_steps  # micro-batches take rows in turn
    return place % config.text_parts == config.text_parts - 1


def longest(text_valid: jax.Array, config: Config) -> jax.Array:
    """text_valid bool [B, L] of an arranged batch -> int32 [2]: the longest caption but for the
    long rows, and of all. Replicated, so that all processes agree."""
    count = text_ends.lengths(text_valid)
    rest = jnp.where(jnp.asarray(long_rows(len(count), config)), 0, count)
    if config.text_parts == 1:
        rest = count
    found = jnp.stack([rest.max(), count.max()])
    return jax.lax.with_sharding_constraint(found, jax.sharding.PartitionSpec())


def choose(config: Config, found: Sequence[int]) -> Lengths:
    """The smallest of config.text_lengths and max_len that hold what `longest` found."""
    whole = config.model.text.max_len
    # The mask of open_clip's released models looks one place past the text.
    beyond = 0 if config.model.text.cls_mask == "exact" else 1
    short, long = (
        min((n for n in config.text_lengths if count + beyond <= n < whole), default=whole)
        for count in found
    )
    return short, long


def trim(batch: dict[str, jax.Array], length: int) -> dict[str, jax.Array]:
    """The batch with captions cut to [B, length], where nothing but padding lies beyond."""
    return batch | {name: batch[name][:, :length] for name in ("tokens", "text_valid")}
