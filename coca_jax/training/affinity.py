"""What a student learns of a teacher's embeddings, which the data hold: the similarities that it
sees in a batch, and where it puts each image and text."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.config import Config
from coca_jax.ops.contrastive import HIGHEST
from coca_jax.ops.reference import Reference
from coca_jax.training.objective import EMBEDDINGS, Configured, Inputs, Means

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
