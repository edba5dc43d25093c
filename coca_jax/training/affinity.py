"""What a student learns of the similarities that a teacher sees in a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.config import Config
from coca_jax.ops.reference import Reference
from coca_jax.training.objective import Configured, Inputs, Means

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
    serves = frozenset({"image", "decoding", "captioning", "contrastive"})

    @classmethod
    def of(cls, config: Config, ops: Reference) -> Affinity:
        return cls(config.loss.affinity_weight, config.loss.teacher_scale)

    def value(self, inputs: Inputs, totals: Any) -> tuple[jax.Array, Means]:
        image, text = inputs["teacher_image"], inputs["teacher_text"]
        known = (jnp.abs(image).sum(1) > 0) & (jnp.abs(text).sum(1) > 0)
        teacher = self.scale * image @ text.T
        own = inputs["image_embedding"], inputs["text_embedding"]
        student = inputs["scale"] * own[0].astype(jnp.float32) @ own[1].astype(jnp.float32).T
        rows = affinity(teacher, student, known) + affinity(teacher.T, student.T, known)
        rows = jnp.where(known, 0.5 * rows, 0.0)
        count = known.sum().astype(jnp.float32)
        loss = rows.sum() / jnp.maximum(count, 1)
        return loss, {"affinity_rows": (count, jnp.float32(known.size))}


def affinity(teacher: jax.Array, student: jax.Array, known: jax.Array) -> jax.Array:
    """KL(softmax(teacher) || softmax(student)) of each row over the columns `known`: logits float32
    [B, B], bool [B] -> [B]."""
    log_target = jax.nn.log_softmax(jnp.where(known, teacher, NEVER), axis=1)
    log_own = jax.nn.log_softmax(jnp.where(known, student, NEVER), axis=1)
    target = jnp.exp(log_target)
    return jnp.where(known, target * (log_target - log_own), 0.0).sum(1)
