"""The parts of a batch, over which losses and gradients add up.

A batch is cut twice. Into micro-batches, one after another, for their memory; and each of these
into the rows with the longest captions and the others, which are cut to their own length. Row i
goes to micro-batch i % n, and the longest captions stand in every m-th place of a micro-batch (see
`text_lengths.arrange`), so that every part spans all devices and no row moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from coca_jax import partitioning
from coca_jax.config import Config
from coca_jax.training.text_lengths import Lengths, trim

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Parts:
    """How a batch is cut.

    micro_batches: how many. long_every: of so many rows one has a long caption; 1: captions are
    not told apart. short: the length to which the captions of the other rows are cut.
    """

    micro_batches: int = 1
    long_every: int = 1
    short: int = 0

    @classmethod
    def of(cls, config: Config, lengths: Lengths | None = None) -> Parts:
        """By config.accumulate_steps, config.text_parts and the lengths of a batch, as
        `text_lengths.choose` gives them; None: all captions have the model's length."""
        short, long = lengths or (0, 0)
        return cls(config.accumulate_steps, 1 if short == long else config.text_parts, short)

    @property
    def count(self) -> int:
        """How many parts there are in all."""
        return self.micro_batches * (1 if self.long_every == 1 else 2)

    def micro(self, batch: Batch) -> Batch:
        """The micro-batches of a batch: fields [B, ...] become [n, B / n, ...]."""
        return jax.tree.map(lambda x: split_rows(x, self.micro_batches), batch)

    def by_length(self, batch: Batch) -> list[Batch]:
        """The parts of one micro-batch: the rows with short captions and those with long ones."""
        if self.long_every == 1:
            return [batch]
        cut = {name: split_long(x, self.long_every) for name, x in batch.items()}
        others, long = ({name: pair[i] for name, pair in cut.items()} for i in (0, 1))
        return [trim(others, self.short), long]

    def join(self, rows: Sequence[jax.Array]) -> jax.Array:
        """What was made of the parts of `by_length`, [b, ...] each -> [B, ...], in place again."""
        return rows[0] if len(rows) == 1 else join_long(*rows)


def split_rows(x: jax.Array, num: int) -> jax.Array:
    """[B, ...] -> [num, B / num, ...], row i to micro-batch i % num, so that each micro-batch
    spans all devices and no row moves."""
    x = jnp.moveaxis(x.reshape((x.shape[0] // num, num) + x.shape[1:]), 1, 0)
    return partitioning.constrain(x, None, "batch", *(None,) * (x.ndim - 2))


def merge_rows(x: jax.Array) -> jax.Array:
    """The inverse of `split_rows`."""
    x = jnp.moveaxis(x, 0, 1).reshape((x.shape[0] * x.shape[1],) + x.shape[2:])
    return partitioning.constrain(x, "batch", *(None,) * (x.ndim - 1))


def split_long(x: jax.Array, every: int) -> tuple[jax.Array, jax.Array]:
    """Rows [B, ...] -> the others [B - B / every, ...] and the long ones [B / every, ...].

    Both span all devices and no row moves.
    """
    groups = x.reshape((x.shape[0] // every, every) + x.shape[1:])

    def rows(part: jax.Array) -> jax.Array:
        part = part.reshape((-1,) + x.shape[1:])
        return partitioning.constrain(part, "batch", *(None,) * (x.ndim - 1))

    return rows(groups[:, :-1]), rows(groups[:, -1:])


def join_long(others: jax.Array, long: jax.Array) -> jax.Array:
    """The inverse of `split_long`."""
    rows = long.shape[0]
    groups = [x.reshape((rows, -1) + x.shape[1:]) for x in (others, long)]
    x = jnp.concatenate(groups, 1).reshape((-1,) + long.shape[1:])
    return partitioning.constrain(x, "batch", *(None,) * (x.ndim - 1))
