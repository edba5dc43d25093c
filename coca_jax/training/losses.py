"""What a loss is: its weight, what it reads, its value over some rows, its metrics."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from coca_jax.config import Config, heads
from coca_jax.ops import captioning_loss, contrastive_loss
from coca_jax.ops.contrastive_loss import HIGHEST
from coca_jax.ops.reference import Reference, wide

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


# Losses that train the image encoder without comparing rows: beside the contrastive one they make
# up for small batches.


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


# What a student learns of a teacher's embeddings, which the data hold: the similarities that it
# sees in a batch, and where it puts each image and text.


NEVER = -1e30  # logit of what is left out


@dataclasses.dataclass(frozen=True)
class Affinity(Configured):
    """Distillation of a teacher's similarities of the images and texts of a batch (MobileCLIP and
    DataCompDR, Vasu et al. 2024, Eq. 2): the KL divergence of the student's softmax over texts,
    and over images, from the teacher's. Rows without a teacher's embedding are left out."""

    weight: float
    scale: float

    name = "affinity_loss"
    shown = ("affinity_loss",)
    outputs = ("image_embedding", "text_embedding", "scale")
    fields = ("teacher_image", "teacher_text")
    couples = True
    serves = EMBEDDINGS

    @classmethod
    def of(cls, config: Config, ops: Reference) -> Affinity:
        return cls(config.loss.affinity_weight, config.loss.teacher_scale)

    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        image, text = inputs["teacher_image"], inputs["teacher_text"]
        known = is_known(inputs)
        teacher = self.scale * jnp.dot(image, text.T, precision=HIGHEST)
        own = [inputs[f"{one}_embedding"].astype(jnp.float32) for one in ("image", "text")]
        student = inputs["scale"] * jnp.dot(own[0], own[1].T, precision=HIGHEST)
        rows = affinity(teacher, student, known) + affinity(teacher.T, student.T, known)
        rows = jnp.where(known, 0.5 * rows, 0.0)
        count = known.sum().astype(jnp.float32)
        loss = rows.sum() / jnp.maximum(count, 1)
        return loss, {"affinity_rows": (count, jnp.float32(known.size))}


@dataclasses.dataclass(frozen=True)
class Imitation(Configured):
    """Distillation of a teacher's embeddings: how far the student's image and text are from the
    teacher's, 1 - cosine each, their sum over the rows that have both (feature distillation of
    CLIP-KD, Yang et al. 2024, which takes the squared distance: twice that). What the towers are to
    give is known from the first step, and is the same at each."""

    weight: float

    name = "imitation_loss"
    shown = ("imitation_loss",)
    outputs = ("image_embedding", "text_embedding")
    fields = ("teacher_image", "teacher_text")
    serves = EMBEDDINGS

    @classmethod
    def of(cls, config: Config, ops: Reference) -> Imitation:
        return cls(config.loss.imitation_weight)

    def totals(self, batch: Inputs) -> jax.Array:
        """Rows with a teacher's embeddings, float32, at least 1."""
        return jnp.maximum(is_known(batch).sum(), 1).astype(jnp.float32)

    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        known = is_known(inputs)
        cosines = {
            side: (inputs[f"{side}_embedding"].astype(jnp.float32) * inputs[f"teacher_{side}"]).sum(
                1
            )
            for side in ("image", "text")
        }
        loss = jnp.where(known, 2 - cosines["image"] - cosines["text"], 0.0).sum() / totals
        count = known.sum().astype(jnp.float32)
        return loss, {
            f"{side}_imitation": (jnp.where(known, cosine, 0.0).sum(), count)
            for side, cosine in cosines.items()
        }


def is_known(inputs: Inputs) -> jax.Array:
    """Which rows have a teacher's embeddings, bool [B]; those without have zeros."""
    return (jnp.abs(inputs["teacher_image"]).sum(1) > 0) & (
        jnp.abs(inputs["teacher_text"]).sum(1) > 0
    )


def affinity(teacher: jax.Array, student: jax.Array, known: jax.Array) -> jax.Array:
    """KL(softmax(teacher) || softmax(student)) of each row over the columns `known`: logits float32
    [B, B], bool [B] -> [B]."""
    log_target = jax.nn.log_softmax(jnp.where(known, teacher, NEVER), axis=1)
    log_own = jax.nn.log_softmax(jnp.where(known, student, NEVER), axis=1)
    target = jnp.exp(log_target)
    return jnp.where(known, target * (log_target - log_own), 0.0).sum(1)


# What training minimises: a class a loss, whose values add up over the parts of a batch.
#
# A loss says its weight, what it reads, its value over some rows and its metrics. `gradients` runs
# the model over the parts of a batch (see `parts`) and adds; a loss knows nothing of them, but for
# the counts of the whole batch that it divides by (`totals`). One that compares rows with each other
# says so (`couples`) and is always given all of them.
#
# To add a loss: a class here, its name in OBJECTIVES, its weight and options in `loss` of the config.


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
        head, kind = config.head, heads.head_kind(config.head.kind)
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
        loss, rows = contrastive_loss.contrastive_loss(
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
    chunk: int
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
            loss.contrastive_chunk,
            loss.reduction,
        )

    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        loss, rows, new = contrastive_loss.global_contrastive_loss(
            inputs["image_embedding"],
            inputs["text_embedding"],
            inputs["scale"],
            contrastive_loss.Estimates(*(inputs[ESTIMATE.format(s)] for s in ESTIMATES)),
            num_examples=self.num_examples,
            rate=self.rate,
            text_id=None if self.duplicates == "negatives" else inputs["text_id"],
            chunk=self.chunk,
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
        targets, mask = captioning_loss.caption_targets(inputs["tokens"], inputs["text_valid"])
        return targets, mask if self.labels else mask & ~inputs["is_label"][:, None]

    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        targets, mask = self._targets(inputs)
        loss, nll = captioning_loss.weighted_captioning_loss(
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
