"""Checkpoints and fault tolerance: `config.checkpoint` and `config.faults`."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic.dataclasses import dataclass

from coca_jax.config.base import STRICT, EverySteps, Section, Steps, option

Count = Annotated[int, Interval(ge=1, le=1_000_000)]


@dataclass(frozen=True, config=STRICT)
class Checkpoint(Section):
    """When the run saves."""

    every: Literal["steps", "auto"] = option(
        "steps",
        "'steps': every every_steps. 'auto': as often as the time of a save and "
        "mean_hours_between_failures suggest (Daly 2006).",
    )
    every_steps: EverySteps = option(1000, "Steps between checkpoints, for every='steps'.")
    mean_hours_between_failures: Annotated[float, Interval(gt=0, le=1e6)] = option(
        24.0, "Mean time between failures of the whole run, for every='auto'."
    )
    keep: Count = option(3, "Number of most recent checkpoints to retain.")
    best: str = option(
        "",
        "Also retain the checkpoint with the best value of this score, such as "
        "retrieval/NAME/mean_recall.",
    )
    max_skipped: Steps = option(
        50, "End the run after so many consecutive steps without finite gradients; 0: no limit."
    )


@dataclass(frozen=True, config=STRICT)
class Faults(Section):
    """What a run does about hangs, loss spikes and faulty devices."""

    hang_minutes: Annotated[float, Interval(ge=0, le=1e6)] = option(
        20.0, "End the process to restart it after so long without a step; 0: never."
    )
    spike_deviations: Annotated[float, Interval(ge=0, le=1000)] = option(
        0.0,
        "Roll back when the loss exceeds its running mean by so many standard deviations in three "
        "consecutive steps; 0: off.",
    )
    spike_batches: Count = option(64, "Number of batches before a spike to skip after a rollback.")
    compare_every_steps: Steps = option(
        0,
        "Compare checksums of replicated parameters every so many steps and before each save; 0: "
        "never.",
    )
