"""Weights & Biases. WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline and so on work as ever."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import wandb

from coca_jax.runtime import storage
from coca_jax.training import trackers


class WeightsAndBiases:
    """A run of W&B, the same one when the run goes on. W&B takes a step once: of steps that are
    done again after a kill it keeps the first values, which are the same."""

    def __init__(self, workdir: str | os.PathLike[str], config: dict[str, Any]):
        name = trackers.run_name(workdir, "wandb")
        local = None if storage.is_remote(workdir) else str(workdir)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "coca_jax"),
            name=name,
            id=name,
            resume="allow",
            dir=local,
            config=config,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A step's metrics."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """W&B sends from a process of its own, which cannot be waited for before the end."""

    def close(self) -> None:
        """Waits until all is sent, or written where WANDB_MODE=offline."""
        self._run.finish()


def open_run(
    workdir: str | os.PathLike[str], start_step: int, config: dict[str, Any]
) -> WeightsAndBiases:
    """A run of W&B with the run's config."""
    return WeightsAndBiases(workdir, config)
