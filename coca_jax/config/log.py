"""Metrics and profiles of a run: `config.log`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from coca_jax.config.base import STRICT, EverySteps, Section, option

# To add a tracker: its name and package here, its extra in setup.py, a file in training/trackers/.
Tracker: TypeAlias = Literal["tensorboard", "wandb", "trackio"]
TRACKERS: dict[str, str] = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "trackio": "trackio",
}


def _first_and_last(value: tuple[int, ...]) -> tuple[int, ...]:
    if value and (len(value) != 2 or value[0] > value[1]):
        raise ValueError("give (first step, last step), or () for no profile")
    return value


@dataclass(frozen=True, config=STRICT)
class Log(Section):
    """What a run logs."""

    every_steps: EverySteps = option(10, "Steps between logged steps.")
    profile_steps: Annotated[tuple[EverySteps, ...], AfterValidator(_first_and_last)] = option(
        (), "First and last step of a profile; (): none."
    )
    trackers: tuple[Tracker, ...] = option(
        ("tensorboard",), "Trackers for the metrics, in addition to metrics.jsonl."
    )
