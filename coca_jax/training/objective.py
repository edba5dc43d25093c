"""What a loss is: its weight, what it reads, its value over some rows, its metrics."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from coca_jax.config import Config
from coca_jax.ops.reference import Reference

Inputs = Mapping[str, Any]  # fields of coca.Outputs and of the batch, by name
Means = dict[str, tuple[jax.Array, jax.Array]]  # metrics as (sum, count): both add over parts

# What a loss serves that reads both embeddings, and one that reads the decoder's states.
EMBEDDINGS = frozenset({"image", "text", "contrastive"})
STATES = frozenset({"image", "text", "pooling", "decoding"})


class Objective(abc.ABC):
    """A loss of the run.

    Attributes:
        name: of its value among the metrics.
        shown: its metrics in the progress of a run; those of the files are all.
        outputs: the fields of coca.Outputs that it reads.
        fields: the fields of the batch that it reads.
        couples: whether its value compares rows with each other, so that it needs all of a batch.
        weight: of its value in the loss that is minimised.
        serves: what it trains: `serves` of the parts of the model on which it depends.
    """

    name: ClassVar[str]
    shown: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]
    fields: ClassVar[tuple[str, ...]]
    couples: ClassVar[bool] = False
    weight: float
    serves: frozenset[str]

    def totals(self, batch: Inputs) -> Any:
        """What `value` divides by: counts of the whole batch, of its `fields`."""
        del batch

    @abc.abstractmethod
    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        """(its value over some rows of the batch, metrics of these rows).

        inputs: `outputs` and `fields` of these rows. The values of all rows' parts add up to that
        of the batch, and a metric is its sum over its count; NaN where nothing counts.
        """


class Configured(Objective):
    """A loss that the configuration of a run gives a weight."""

    @classmethod
    @abc.abstractmethod
    def of(cls, config: Config, ops: Reference) -> Configured:
        """By the sections of the config that it takes; ops: how operations run."""


def by_source(name: str, total: jax.Array, count: jax.Array, is_label: jax.Array) -> Means:
    """Means over alt-text rows and over label rows: {name/caption, name/label}. All [B]."""
    label = is_label.astype(jnp.float32)
    return {
        f"{name}/{kind}": ((total * rows).sum(), (count * rows).sum())
        for kind, rows in (("caption", 1 - label), ("label", label))
    }
