"""Loss spikes: the run goes back to a checkpoint from before one and leaves its batches out.

As in PaLM (Chowdhery et al. 2022, section 5.1), where a restart from before a spike without the
batches around it was enough each time, and the same batches did no harm elsewhere. Off unless
config.faults.spike_deviations is set.

Where batches (config.batch_sizes) or images (config.image_sizes) grow, the losses before say
nothing of those that follow, as a contrastive loss is higher in a larger batch: the detector begins
anew.

Which batches are left out is kept in `spikes.json`, with what the detector knew at each checkpoint:
so a run that is killed and resumed sees and does the same as one that is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from coca_jax.data import stages
from coca_jax.files import sealed_json, storage
from coca_jax.training.gradients import Metrics
from coca_jax.training.left_out import Ranges, leave_out, number_of
from coca_jax.training.setup import Run
from coca_jax.training.skipping import Diverged

FILE = "spikes.json"
WARM = 100  # steps before the first spike can be seen
IN_A_ROW = 3  # steps with a high loss that are a spike; fewer are a batch that is hard
DECAY = 0.98  # of the running mean and variance, over about 50 steps
MOST = 10  # spikes of a run; the next one ends it
KEPT = 50  # checkpoints whose detector is kept, more than a run keeps


class WentUp(Exception):
    """The loss has spiked. step: the last one of the spike, counted from 1."""

    def __init__(self, step: int, loss: float, usual: float):
        super().__init__(f"the loss is {loss:.4g} at step {step} and was {usual:.4g} before")
        self.step = step


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
            return False  # such a step changes nothing, see skipping.py
        away = loss - self.mean
        if self.count >= WARM and away > deviations * math.sqrt(self.variance):
            self.high += 1
            return self.high >= IN_A_ROW
        self.high, self.count = 0, self.count + 1
        share = max(1 - DECAY, 1 / self.count)
        self.mean += share * away
        self.variance = (1 - share) * (self.variance + share * away * away)
        return False


class Spikes:
    """`spikes(step, metrics)` after each step raises WentUp, one step late; see `settle`.

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
        found = sealed_json.read(self._path) if self._path.exists() else {}
        self.left_out: Ranges = tuple((a, b) for a, b in found.get("left_out", ()))
        self.back: int | None = found.get("back")
        self._times = found.get("times", 0)
        self._known: dict[str, list[float]] = found.get("detector", {})
        self._first_save: int | None = found.get("first_save")

    @classmethod
    def of(cls, run: Run) -> Spikes:
        """The detector of a run, with what its workdir knows."""
        config = run.config
        image_shares = [share for share, _ in config.image_sizes]
        return cls(
            run.workdir,
            config.faults,
            write=run.main_process,
            batches_grow=[stage.first for stage in run.mixture.stages],
            images_grow=stages.starts(image_shares, config.stage_steps or run.steps),
        )

    def begin(self, step: int) -> None:
        """The run goes on from `step`: what was known then is known again."""
        self._pending = None
        if step and self._first_save is None:
            self._first_save = 1  # of steps that nobody watched: there may have been saves at any
        mean, variance, count, high = self._known.get(str(step), (0.0, 0.0, 0, 0))
        self._detector = Detector(mean, variance, int(count), int(high))

    def __call__(self, step: int, values: Metrics) -> None:
        """Looks at the step before: the device stays busy."""
        if self._deviations:
            before, self._pending = self._pending, (step, values)
            self._look(before)

    def settle(self, step: int) -> None:
        """Before `step` is saved: looks at it too, and notes what is known then, at the next save
        where the disk is full."""
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
            raise WentUp(step, loss, usual)

    def _begins_a_stage(self, step: int) -> bool:
        """Whether `step`, from 1, has another size of batches or of images than the one before."""
        if step == 1:
            return False
        before, now = (number_of(n, self.left_out) for n in (step - 2, step - 1))
        return step - 1 in self._images_grow or any(
            before < first <= now for first in self._batches_grow
        )

    def plan(self, spike: WentUp, saved: Sequence[int]) -> int:
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
            sealed_json.write(self._path, data | {"detector": self._known})
