"""The model of a configuration: a captioner, a dual encoder or an image encoder alone.

Captioners and dual encoders take the same inputs, return `coca.Outputs` and name their parameters
alike, so training, checkpoints and evaluation need only this module.
"""

from __future__ import annotations

from typing import Any

import jax

from coca_jax.config import Head, Loss, Model
from coca_jax.models import coca, two_towers, vision
from coca_jax.models.coca import CoCa
from coca_jax.models.two_towers import TwoTowers

Network = CoCa | TwoTowers


def build(
    model: Model,
    *,
    remat: str = "none",
    sigmoid: bool = False,
    loss: Loss | None = None,
    platform: str | None = None,
    head: Head | None = None,
    num_classes: int = 0,
) -> Any:
    """Builds the Flax module for `model.family`; see `coca.build` for the arguments.

    Families without a decoder support only the contrastive loss and no task head; `Config.check`
    refuses other runs.
    """
    if model.family == "coca":
        return coca.build(
            model,
            remat=remat,
            sigmoid=sigmoid,
            loss=loss,
            platform=platform,
            head=head,
            num_classes=num_classes,
        )
    if model.family == "vision":
        return vision.build(model, platform=platform)
    sigmoid = sigmoid or (loss is not None and loss.contrastive == "sigmoid")
    return two_towers.build(model, remat=remat, sigmoid=sigmoid, platform=platform)


def init(module: Any, rng: jax.Array) -> dict:
    """Fresh parameters, boxed with their logical axis names (see sharding.unbox)."""
    if isinstance(module, CoCa):
        return coca.init(module, rng)
    if isinstance(module, TwoTowers):
        return two_towers.init(module, rng)
    return vision.init(module, rng)
