"""A run whose steps change nothing is stopped: its gradients are not finite, step after step."""

from __future__ import annotations

import json

import numpy as np

from coca_jax.files import storage
from coca_jax.training.gradients import Metrics
from coca_jax.training.left_out import Ranges, number_of
from coca_jax.training.setup import Run
from coca_jax.training.state import TrainState


class Diverged(ValueError):
    """Too many steps in a row had gradients that are not finite."""


def told(skipped: int, steps: int) -> str:
    """What is said of a run of so many steps at its end, of which `skipped` had gradients that are
    not finite; '' for none."""
    if not skipped:
        return ""
    return f"{skipped:,} of {steps:,} steps changed nothing, as their gradients are not finite"


class Skipping:
    """`skipping(step, metrics)` after each step: raises Diverged, one step late, after
    config.checkpoint.max_skipped skipped steps in a row (0: never). All processes do at one step.
    """

    def __init__(self, run: Run, state: TrainState, left_out: Ranges = ()):
        self._left_out = left_out
        self._run, self._limit = run, run.config.checkpoint.max_skipped
        self._skipped, self._in_a_row = int(state.skipped), 0
        self._previous: tuple[int, Metrics] | None = None

    def __call__(self, step: int, values: Metrics) -> None:
        previous, self._previous = self._previous, (step, values)
        if previous is None or not self._limit:
            return
        step, values = previous
        skipped = int(np.asarray(values["skipped_steps"]))
        self._in_a_row = self._in_a_row + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if self._in_a_row >= self._limit:
            raise Diverged(self._explain(step, float(np.asarray(values["loss"]))))

    def _explain(self, step: int, loss: float) -> str:
        first = step - self._in_a_row + 1
        text = (
            f"the gradients of {self._in_a_row} steps in a row ({first} to {step}) are not finite"
        )
        if self._run.main_process:
            rows = self._run.mixture.step_examples(number_of(first - 1, self._left_out))
            file = storage.place(self._run.workdir) / f"skipped_step_{first}.json"
            names = ", ".join(f"{row['source']} {row['key']}" for row in rows[:3])
            where = f"all in {file}"
            try:
                storage.write_text(file, json.dumps(rows, indent=1, default=str) + "\n")
            except OSError as error:  # the run has diverged, whatever the disk is like
                where = f"{file} with all of them is not written: {error}"
            text += f"; step {first} was made of {names}, ... ({where})"
        rate = self._run.config.optimizer.learning_rate
        return (
            f"{text}; the loss is {loss:.4g}. The run stops and its last checkpoint stays: lower "
            f"optimizer.learning_rate={rate}, or look at these examples"
        )
