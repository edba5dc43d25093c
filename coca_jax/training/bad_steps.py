"""Steps that do harm or nothing: a run stops when its gradients are not finite step after step, and
goes back to an earlier checkpoint when its loss spikes; the batches of a spike are left out."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from coca_jax.data import batch_schedule
from coca_jax.runtime import json_files, storage
from coca_jax.training.callbacks import Callback, LossSpike
from coca_jax.training.skipped_batches import Ranges, leave_out, number_of
from coca_jax.training.train_step import Metrics

if typing.TYPE_CHECKING:
    from coca_jax.training.trainer import Trainer


class Diverged(ValueError):
    """Too many steps in a row had gradients that are not finite."""


def summary(skipped: int, steps: int) -> str:
    """What is said of a run of so many steps at its end, of which `skipped` had gradients that are
    not finite; '' for none."""
    if not skipped:
        return ""
    return f"{skipped:,} of {steps:,} steps changed nothing, as their gradients are not finite"


class NonFiniteSteps(Callback):
    """Raises Diverged, one step late, after config.checkpoint.max_skipped steps in a row whose
    gradients are not finite and which so changed nothing (0: never). All processes do at one step.
    """

    def __init__(self, trainer: Trainer):
        self._trainer, self._limit = trainer, trainer.config.checkpoint.max_skipped
        self._skipped, self._in_a_row = int(trainer.state.skipped), 0
        self._previous: tuple[int, Metrics] | None = None

    def after_step(self, step: int, metrics: Metrics) -> None:
        """Looks at the step before: the device stays busy."""
        previous, self._previous = self._previous, (step, metrics)
        if previous is None or not self._limit:
            return
        step, metrics = previous
        skipped = int(np.asarray(metrics["skipped_steps"]))
        self._in_a_row = self._in_a_row + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if self._in_a_row >= self._limit:
            raise Diverged(self._explain(step, float(np.asarray(metrics["loss"]))))

    def _explain(self, step: int, loss: float) -> str:
        first = step - self._in_a_row + 1
        text = (
            f"the gradients of {self._in_a_row} steps in a row ({first} to {step}) are not finite"
        )
        if self._trainer.main_process:
            number = number_of(first - 1, self._trainer.spikes.left_out)
            rows = self._trainer.mixture.step_examples(number)
            file = storage.place(self._trainer.workdir) / f"skipped_step_{first}.json"
            names = ", ".join(f"{row['source']} {row['key']}" for row in rows[:3])
            where = f"all in {file}"
            try:
                storage.write_text(file, json.dumps(rows, indent=1, default=str) + "\n")
            except OSError as error:  # the run has diverged, whatever the disk is like
                where = f"{file} with all of them is not written: {error}"
            text += f"; step {first} was made of {names}, ... ({where})"
        rate = self._trainer.config.optimizer.learning_rate
        return (
            f"{text}; the loss is {loss:.4g}. The run stops and its last checkpoint stays: lower "
            f"optimizer.learning_rate={rate}, or look at these examples"
        )


# Loss spikes: the run goes back to a checkpoint from before one and leaves its batches out.
#
# As in PaLM (Chowdhery et al. 2022, section 5.1), where a restart from before a spike without the
# batches around it was enough each time, and the same batches did no harm elsewhere. Off unless
# config.faults.spike_deviations is set.
#
# Where batches (config.batch_sizes) or images (config.image_sizes) grow, the losses before say
# nothing of those that follow, as a contrastive loss is higher in a larger batch: the detector begins
# anew.
#
# Which batches are left out is kept in `spikes.json`, with what the detector knew at each checkpoint:
# so a run that is killed and resumed sees and does the same as one that is not.


FILE = "spikes.json"
WARM = 100  # steps before the first spike can be seen
IN_A_ROW = 3  # steps with a high loss that are a spike; fewer are a batch that is hard
DECAY = 0.98  # of the running mean and variance, over about 50 steps
MOST = 10  # spikes of a run; the next one ends it
KEPT = 50  # checkpoints whose detector is kept, more than a run keeps


@dataclasses.dataclass
class Detector:
    """The running mean and variance of the loss, without its highs."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0
    high: int = 0  # steps in a row

    def add(self, loss: float, deviations: float) -> bool:
        """Takes the loss of a step; whether it is the last one of a spike."""
        if not math.isfinite(loss):
            return False  # such a step changes nothing, see NonFiniteSteps
        away = loss - self.mean
        if self.count >= WARM and away > deviations * math.sqrt(self.variance):
            self.high += 1
            return self.high >= IN_A_ROW
        self.high, self.count = 0, self.count + 1
        share = max(1 - DECAY, 1 / self.count)
        self.mean += share * away
        self.variance = (1 - share) * (self.variance + share * away * away)
        return False


class LossSpikes(Callback):
    """Raises LossSpike, one step late, and before a save at that step; the run then goes back.

    Args:
        workdir: of the run.
        faults: its section of the config.
        write: whether this process keeps spikes.json.
        batches_grow, images_grow: the numbers of the batches, and the steps (from 0), with which
            a stage of their sizes begins.

    Attributes:
        left_out: which batches are.
        back: the step that the run was about to go back to when it was killed, else None.
    """

    def __init__(
        self,
        workdir: str,
        faults: Any,
        *,
        write: bool = True,
        batches_grow: Sequence[int] = (),
        images_grow: Sequence[int] = (),
    ):
        self._path = storage.place(workdir) / FILE
        self._deviations, self._batches = faults.spike_deviations, faults.spike_batches
        self._write, self._warned = write, False
        self._batches_grow, self._images_grow = batches_grow, images_grow
        self._pending: tuple[int, Metrics] | None = None
        self._detector = Detector()
        found = json_files.read_sealed(self._path) if self._path.exists() else {}
        self.left_out: Ranges = tuple((a, b) for a, b in found.get("left_out", ()))
        self.back: int | None = found.get("back")
        self._times = found.get("times", 0)
        self._known: dict[str, list[float]] = found.get("detector", {})
        self._first_save: int | None = found.get("first_save")

    @classmethod
    def of(cls, trainer: Trainer) -> LossSpikes:
        """The detector of a run, with what its workdir knows."""
        config = trainer.config
        image_shares = [share for share, _ in config.image_sizes]
        return cls(
            trainer.workdir,
            config.faults,
            write=trainer.main_process,
            batches_grow=[stage.first for stage in trainer.mixture.stages],
            images_grow=batch_schedule.starts(image_shares, config.stage_steps or trainer.steps),
        )

    def begin(self, step: int) -> None:
        """The run goes on from `step`: what was known then is known again."""
        self._pending = None
        if step and self._first_save is None:
            self._first_save = 1  # of steps that nobody watched: there may have been saves at any
        mean, variance, count, high = self._known.get(str(step), (0.0, 0.0, 0, 0))
        self._detector = Detector(mean, variance, int(count), int(high))

    def after_step(self, step: int, metrics: Metrics) -> None:
        """Looks at the step before: the device stays busy."""
        if self._deviations:
            before, self._pending = self._pending, (step, metrics)
            self._look(before)

    def before_save(self, step: int) -> None:
        """Looks at `step` too, and notes what is known then, at the next save where the disk is
        full."""
        if not self._deviations:
            return
        before, self._pending = self._pending, None
        self._look(before)
        if self._first_save is None:
            self._first_save = step
        self._known[str(step)] = list(dataclasses.astuple(self._detector))
        self._known = dict(sorted(self._known.items(), key=lambda x: int(x[0]))[-KEPT:])
        try:
            self._keep()
            self._warned = False
        except OSError as error:
            if not self._warned:
                logging.warning(
                    "%s is not written (%s); the next save tries again", self._path, error
                )
            self._warned = True

    def _look(self, found: tuple[int, Metrics] | None) -> None:
        if found is None:
            return
        step, values = found
        if self._begins_a_stage(step):
            self._detector = Detector()
        loss, usual = float(np.asarray(values["loss"])), self._detector.mean
        if self._detector.add(loss, self._deviations):
            raise LossSpike(step, loss, usual)

    def _begins_a_stage(self, step: int) -> bool:
        """Whether `step`, from 1, has another size of batches or of images than the one before."""
        if step == 1:
            return False
        before, now = (number_of(n, self.left_out) for n in (step - 2, step - 1))
        return step - 1 in self._images_grow or any(
            before < first <= now for first in self._batches_grow
        )

    def plan(self, spike: LossSpike, saved: Sequence[int]) -> int:
        """The step to go back to, 0 for the beginning; from there on the batches are left out.

        saved: the steps of the checkpoints. Raises Diverged after too many spikes, or where no
        checkpoint from before this one is left.
        """
        self._times += 1
        first = max(1, spike.step - self._batches + 1)
        before = [step for step in saved if step < first]
        if self._times > MOST:
            raise Diverged(f"{spike}: that is spike {self._times}; lower optimizer.learning_rate")
        if not before and self._first_save is not None and self._first_save < first:
            # There was one, or may have been, and it was rotated away.
            raise Diverged(
                f"{spike}, and no checkpoint from before step {first} is left; raise "
                "checkpoint.keep or lower faults.spike_batches"
            )
        self.back = max(before, default=0)
        if not self.back:
            self._first_save = None
        self.left_out = leave_out(first - 1, spike.step - 1, self.left_out)
        self._known = {k: v for k, v in self._known.items() if int(k) <= self.back}
        self._keep()
        return self.back

    def gone_back(self) -> None:
        """The checkpoints after `back` are gone."""
        self.back = None
        self._keep()

    def _keep(self) -> None:
        if self._write:
            data: dict[str, Any] = dict(left_out=self.left_out, times=self._times, back=self.back)
            data["first_save"] = self._first_save
            json_files.write_sealed(self._path, data | {"detector": self._known})
