"""What training minimises: a class a loss, whose values add up over the parts of a batch.

A loss says its weight, what it reads, its value over some rows and its metrics. `gradients` runs
the model over the parts of a batch (see `parts`) and adds; a loss knows nothing of them, but for
the counts of the whole batch that it divides by (`totals`). One that compares rows with each other
says so (`couples`) and is always given all of them.

To add a loss: a class here, its name in OBJECTIVES, its weight and options in `loss` of the config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.config import Config
from coca_jax.models import head_kinds
from coca_jax.ops import captioning, contrastive, global_contrastive
from coca_jax.ops.reference import Reference
from coca_jax.training.affinity import Affinity, Imitation
from coca_jax.training.image_losses import BagOfTokens, HiddenPatches
from coca_jax.training.objective import (
    EMBEDDINGS,
    STATES,
    Configured,
    Inputs,
    Means,
    Objective,
    by_source,
)

REFERENCE = Reference()


@dataclasses.dataclass(frozen=True)
class Head(Configured):
    """Cross-entropy of the task head over the rows that have a class (paper, Section 3.3)."""

    weight: float
    label_smoothing: float
    reads_text: bool

    name = "head_loss"
    shown = ("head_loss", "head_accuracy")
    outputs = ("class_logits",)
    fields = ("class_id",)

    @classmethod
    def of(cls, config: Config, ops: Reference) -> Head:
        head, kind = config.head, head_kinds.of(config.head.kind)
        return cls(
            head.weight if kind else 0.0, head.label_smoothing, bool(kind and kind.reads_text)
        )

    @property
    def serves(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"head", "image"} | (STATES if self.reads_text else set()))

    def totals(self, batch: Inputs) -> jax.Array:
        """Rows that have a class, float32, at least 1."""
        return jnp.maximum((batch["class_id"] >= 0).sum(), 1).astype(jnp.float32)

    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        class_id = inputs["class_id"]
        loss, right = head_loss(inputs["class_logits"], class_id, self.label_smoothing, totals)
        return loss, {"head_accuracy": (right, (class_id >= 0).sum())}


@dataclasses.dataclass(frozen=True)
class Contrastive(Configured):
    """Images with their texts against all other pairs of the batch (paper, Eq. 2, or SigLIP)."""

    weight: float
    kind: str
    duplicates: str
    chunk: int
    reduction: str

    name = "contrastive_loss"
    shown = ("contrastive_loss",)
    outputs = ("image_embedding", "text_embedding", "scale", "logit_bias")
    fields = ("text_id", "is_label")
    couples = True
    serves = EMBEDDINGS

    @classmethod
    def of(cls, config: Config, ops: Reference) -> Contrastive:
        loss = config.loss
        return cls(
            0.0 if loss.contrastive == "global" else loss.contrastive_weight,
            loss.contrastive,
            loss.duplicate_texts,
            loss.contrastive_chunk,
            loss.reduction,
        )

    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        loss, rows = contrastive.contrastive_loss(
            inputs["image_embedding"],
            inputs["text_embedding"],
            inputs["scale"],
            logit_bias=inputs["logit_bias"],
            text_id=inputs["text_id"],
            kind=self.kind,
            duplicates=self.duplicates,
            chunk=self.chunk,
            reduction=self.reduction,
        )
        return loss, by_source(self.name, rows, jnp.ones_like(rows), inputs["is_label"])


ESTIMATES = ("image", "text")  # see global_contrastive.Estimates
ESTIMATE = "estimate/{}"  # a field of the batch: what is kept of its rows; and of the metrics: new


@dataclasses.dataclass(frozen=True)
class GlobalContrastive(Configured):
    """Images with their texts against all other pairs of the data, by means that the state keeps of
    each example (`TrainState.estimates`). Among the metrics are the new means of the rows, which
    `step` puts into the state."""

    weight: float
    num_examples: int
    rate: float
    duplicates: str
    reduction: str

    name = "contrastive_loss"
    shown = ()
    outputs = ("image_embedding", "text_embedding", "scale")
    fields = ("text_id", "is_label", *(ESTIMATE.format(side) for side in ESTIMATES))
    couples = True
    serves = EMBEDDINGS

    @classmethod
    def of(cls, config: Config, ops: Reference) -> GlobalContrastive:
        loss = config.loss
        return cls(
            loss.contrastive_weight if loss.contrastive == "global" else 0.0,
            loss.global_examples,
            loss.global_rate,
            loss.duplicate_texts,
            loss.reduction,
        )

    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        loss, rows, new = global_contrastive.global_contrastive_loss(
            inputs["image_embedding"],
            inputs["text_embedding"],
            inputs["scale"],
            global_contrastive.Estimates(*(inputs[ESTIMATE.format(s)] for s in ESTIMATES)),
            num_examples=self.num_examples,
            rate=self.rate,
            text_id=None if self.duplicates == "negatives" else inputs["text_id"],
            reduction=self.reduction,
        )
        ones = jnp.ones_like(rows)
        means = by_source(self.name, rows, ones, inputs["is_label"])
        return loss, means | {ESTIMATE.format(s): (x, ones) for s, x in zip(ESTIMATES, new)}


@dataclasses.dataclass(frozen=True)
class Captioning(Configured):
    """The mean of the cross-entropy over all target tokens of the batch (paper, Eq. 3).

    labels: whether rows of label sources have targets.
    """

    weight: float
    labels: bool
    chunk: int
    z_loss: float
    label_smoothing: float
    ops: Reference

    name = "captioning_loss"
    shown = ("captioning_loss",)
    outputs = ("states", "kernel", "bias")
    fields = ("tokens", "text_valid", "is_label")
    serves = STATES | {"captioning"}

    @classmethod
    def of(cls, config: Config, ops: Reference) -> Captioning:
        loss = config.loss
        return cls(
            loss.captioning_weight,
            loss.caption_labels,
            loss.caption_chunk,
            loss.z_loss,
            loss.label_smoothing,
            ops,
        )

    def totals(self, batch: Inputs) -> jax.Array:
        """Target tokens in the batch, float32, at least 1."""
        return jnp.maximum(self._targets(batch)[1].sum(), 1).astype(jnp.float32)

    def _targets(self, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """(targets int [B, L], mask bool [B, L]), without those of label rows if not `labels`."""
        targets, mask = captioning.caption_targets(inputs["tokens"], inputs["text_valid"])
        return targets, mask if self.labels else mask & ~inputs["is_label"][:, None]

    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        targets, mask = self._targets(inputs)
        loss, nll = captioning.weighted_captioning_loss(
            inputs["states"],
            inputs["kernel"],
            inputs["bias"],
            targets,
            mask.astype(jnp.float32) / totals,
            chunk=self.chunk,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            ops=self.ops,
        )
        tokens = mask.sum(1).astype(jnp.float32)
        return loss, by_source(self.name, nll.sum(1), tokens, inputs["is_label"])


# In the order in which they are added.
OBJECTIVES: tuple[type[Configured], ...] = (
    *(Head, Contrastive, GlobalContrastive, Captioning, BagOfTokens, HiddenPatches),
    *(Affinity, Imitation),
)


def of(config: Config, ops: Reference = REFERENCE) -> tuple[Objective, ...]:
    """The losses of a run: those that have a weight. ops: how the model's operations run."""
    found = (objective.of(config, ops) for objective in OBJECTIVES)
    return tuple(objective for objective in found if objective.weight)


def head_alone(losses: tuple[Objective, ...]) -> bool:
    """Whether the head's loss is the only one, so that no more than the head needs is run."""
    return all(objective.outputs == Head.outputs for objective in losses)


@dataclasses.dataclass(frozen=True)
class Tangent(Objective):
    """A loss that couples rows, as its first-order form in its inputs, which adds up over parts:
    the sum of each input times the gradient of the loss by it. Its gradient by the parameters is
    that of the loss, in the memory of one part (GradCache, Gao et al. 2021).

    objective: the loss. shared: its gradients by what all rows share, over the number of parts.
    Those by rows are fields of the batch, named by `field`.
    """

    objective: Objective
    shared: Mapping[str, jax.Array]
    rows: tuple[str, ...]

    weight = 1.0
    serves = frozenset()

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.objective.name}/tangent"

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.rows, *self.shared)

    @property
    def fields(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(map(self.field, self.rows))

    def field(self, output: str) -> str:
        """The name of the gradient by a field of the outputs."""
        return f"{self.name}/{output}"

    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        total = jnp.zeros((), jnp.float32)
        for name in self.rows:
            total += (inputs[name] * inputs[self.field(name)]).sum()
        for name, gradient in self.shared.items():
            total += (inputs[name] * gradient).sum()
        return total, {}


def head_loss(
    logits: jax.Array, class_id: jax.Array, label_smoothing: float, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of logits [B, C] with classes int [B], over `count` rows; -1 is no class.

    Label smoothing e gives the true class 1 - e + e / C and each other e / C (Szegedy et al.
    2016). Returns (loss, number of rows whose class has the highest logit).
    """
    known = class_id >= 0
    logs = jax.nn.log_softmax(logits)
    true = jnp.take_along_axis(logs, jnp.maximum(class_id, 0)[:, None], axis=1)[:, 0]
    rows = -(1 - label_smoothing) * true - label_smoothing * logs.mean(1)
    right = known & (logits.argmax(1) == class_id)
    return jnp.where(known, rows, 0.0).sum() / count, right.sum()
