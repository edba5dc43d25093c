"""Short captions do not pay for long ones: batches cut to their captions, the longest apart.

With `config.text_lengths` a batch's captions are cut to the smallest of these lengths that holds
them. In a large batch some caption is always long; with `config.text_parts=4` the longest quarter
of the rows stands in every fourth place and runs apart, so that the others are cut further. Losses
and gradients stay what they are: padding counts nowhere. Each pair of lengths is one compiled
graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from coca_jax import partitioning
from coca_jax.models.coca import CoCa, Outputs

Lengths = tuple[int, int]  # of the most rows, and of the longest ones


def arrange(batch: dict[str, np.ndarray], config: ConfigDict) -> dict[str, np.ndarray]:
    """Reorders the rows of a process: the longest captions to the places that `long_rows` names.

    The rows of a step stay the same; the others keep their order.
    """
    if config.text_parts == 1:
        return batch
    long = long_rows(len(batch["text_valid"]), config)
    ranks = np.argsort(batch["text_valid"].sum(1), kind="stable")
    rows = np.empty(len(long), np.int64)
    rows[~long] = np.sort(ranks[: (~long).sum()])
    rows[long] = np.sort(ranks[(~long).sum() :])
    return {name: values[rows] for name, values in batch.items()}


def long_rows(rows: int, config: ConfigDict) -> np.ndarray:
    """bool [rows]: where the longest captions are, in every micro-batch and on every device."""
    place = np.arange(rows) // config.accumulate_steps  # micro-batches take rows in turn
    return place % config.text_parts == config.text_parts - 1


def longest(text_valid: jax.Array, config: ConfigDict) -> jax.Array:
    """text_valid bool [B, L] of an arranged batch -> int32 [2]: the longest caption but for the
    long rows, and of all. Replicated, so that all processes agree."""
    count = text_valid.sum(1)
    rest = jnp.where(jnp.asarray(long_rows(len(count), config)), 0, count)
    if config.text_parts == 1:
        rest = count
    found = jnp.stack([rest.max(), count.max()])
    return jax.lax.with_sharding_constraint(found, jax.sharding.PartitionSpec())


def choose(config: ConfigDict, found: Sequence[int]) -> Lengths:
    """The smallest of config.text_lengths and max_len that hold what `longest` found."""
    whole = config.model.text.max_len
    # The mask of open_clip's released models looks one place past the text.
    beyond = 0 if config.model.text.get("cls_mask", "exact") == "exact" else 1
    short, long = (
        min((n for n in config.text_lengths if count + beyond <= n < whole), default=whole)
        for count in found
    )
    return short, long


def trim(batch: dict[str, jax.Array], length: int) -> dict[str, jax.Array]:
    """The batch with captions cut to [B, length], where nothing but padding lies beyond."""
    return batch | {name: batch[name][:, :length] for name in ("tokens", "text_valid")}


class Split:
    """A model whose pass over arranged rows is two: the long rows, and the others cut to `short`.

    The outputs are those of the whole, but `states` is a pair: [B - B / parts, short, D] and
    [B / parts, L, D].
    """

    def __init__(self, model: CoCa, parts: int, short: int):
        self._model, self._parts, self._short = model, parts, short

    def apply(self, variables: Any, *args: Any, method: Any = None, **options: Any) -> Any:
        """As the model's own, for `__call__`(pixels, tokens, text_valid, ...) in two passes."""
        if method is not None:
            return self._model.apply(variables, *args, method=method, **options)
        found: list[Any] = []
        rngs = options.pop("rngs", {})
        for number, part in enumerate(zip(*(split(x, self._parts) for x in args))):
            pixels, tokens, valid, *rest = part
            if number == 0:
                tokens, valid = tokens[:, : self._short], valid[:, : self._short]
            keys = {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
            found.append(
                self._model.apply(variables, pixels, tokens, valid, *rest, rngs=keys, **options)
            )
        merged: dict[str, Any] = {}
        for name in Outputs.__dataclass_fields__:
            ours, theirs = (getattr(outputs, name) for outputs in found)
            if name == "states":
                merged[name] = (ours, theirs)
            elif name not in ("kernel", "bias", "scale", "logit_bias") and ours is not None:
                merged[name] = join(ours, theirs)
            else:
                merged[name] = theirs
        return Outputs(**merged)


def split(x: jax.Array | None, parts: int) -> tuple[Any, Any]:
    """Rows [B, ...] -> the others [B - B / parts, ...] and the long ones [B / parts, ...].

    Both span all devices and no row moves.
    """
    if x is None:
        return None, None
    groups = x.reshape((x.shape[0] // parts, parts) + x.shape[1:])

    def rows(part: jax.Array) -> jax.Array:
        part = part.reshape((-1,) + x.shape[1:])
        return partitioning.constrain(part, "batch", *(None,) * (x.ndim - 1))

    return rows(groups[:, :-1]), rows(groups[:, -1:])


def join(others: jax.Array, long: jax.Array) -> jax.Array:
    """The inverse of `split`."""
    rows = long.shape[0]
    groups = [x.reshape((rows, -1) + x.shape[1:]) for x in (others, long)]
    x = jnp.concatenate(groups, 1).reshape((-1,) + long.shape[1:])
    return partitioning.constrain(x, "batch", *(None,) * (x.ndim - 1))
