"""When a run saves, and what it does when a save fails."""

from __future__ import annotations

import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from coca_jax.checkpoints.checkpointing import Checkpoints, SaveFailed
from coca_jax.estimate import goodput
from coca_jax.training import hooks
from coca_jax.training.setup import Run
from coca_jax.training.state import TrainState

RETRY = (30.0, 60.0, 120.0, 300.0)  # seconds before another try, in the loop; the last one repeats
LAST_RETRY = (2.0, 10.0, 30.0)  # seconds before another try, when the run is about to end
FIRST = 20  # steps before the first save of checkpoint.every='auto', which measures


class Interval:
    """The steps between two saves, config.checkpoint.every_steps or by what a save takes here."""

    def __init__(self, run: Run, start: int):
        given = run.config.checkpoint
        self._run, self._auto, self._start = run, given.every == "auto", start
        self._between = 3600 * given.mean_hours_between_failures
        self._steps = FIRST if self._auto else given.every_steps
        self._said = 0
        self._since: tuple[int, float] | None = None  # a step, and when it was seen

    def due(self, step: int) -> bool:
        """Whether `step` is to be saved."""
        if not self._auto:
            return step % self._steps == 0
        if self._since is None and step > self._start + 1:  # the first step was compiled
            self._since = (step, time.perf_counter())
        return step - self._start >= self._steps

    def saved(self, step: int, seconds: float) -> None:
        """A save of `step` has held the steps up for so long. All processes call it."""
        if not self._auto:
            return
        if self._since is not None and step > self._since[0]:
            passed = time.perf_counter() - seconds - self._since[1]
            one = max(passed / (step - self._since[0]), 1e-6)
            best = goodput.best_interval(max(seconds, 1e-3), self._between)
            steps = np.int32(min(max(1, round(best / one)), 1_000_000_000))
            if jax.process_count() > 1:  # each has other times
                steps = multihost_utils.broadcast_one_to_all(steps)
            self._steps = int(steps)
            if not self._said / 2 < self._steps < self._said * 2:
                self._said = self._steps
                self._run.say(
                    f"a checkpoint every {self._steps} steps: a save takes {seconds:.2f} s, a step "
                    f"{one:.3g} s, and the run fails every {self._between / 3600:g} h"
                )
        self.begin(step)

    def begin(self, step: int) -> None:
        """The interval is counted from `step` on."""
        self._start, self._since = step, None


class Save:
    """Saves the state as often as `Interval` says, at the end, and before an
    evaluation: so scores belong to a state that is kept, and the evaluation may be left.

    A save that fails is said and tried again; the run goes on with its earlier checkpoints. A state
    that learned nothing since the last save (all steps skipped) takes no checkpoint's place.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints, state: TrainState, start: int):
        self._run, self._checkpoints = run, checkpoints
        self._kept = self._begun = (start, int(state.skipped))  # of whole saves, of the last one
        self._interval = Interval(run, start)
        self._failures, self._retry_at, self._why = 0, float("inf"), ""

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be kept."""
        due = self._interval.due(step)
        if due or step == self._run.steps or hooks.evaluation_due(self._run, step):
            return True
        return self._run.stop.alone and self._try_again()

    def _try_again(self) -> bool:
        """Whether an earlier save has failed and it is time to try again."""
        if self._begun != self._kept and not self._checkpoints.busy():
            self._settle()
        return time.monotonic() >= self._retry_at

    def _settle(self) -> None:
        """Waits for the save under way and notes how it ended."""
        try:
            self._checkpoints.wait()
            self._kept = self._begun
        except SaveFailed as error:
            self._note(error)

    def __call__(self, step: int, state: TrainState, *, last: bool = False) -> int:
        """Starts the save, which goes on behind the next steps; `last` waits for it.

        Returns the step that a run which goes on would begin from. Raises SaveFailed when the last
        save has failed several times.
        """
        begin = time.perf_counter()
        with self._run.buckets("save"):
            self._settle()
            skipped = int(state.skipped)
            before, skipped_before = self._kept
            if skipped - skipped_before == step - before > 0:
                self._run.say(f"step {step} is not saved: every step since {before} was skipped")
                self._interval.begin(step)  # else every later step would be due
                return before
            waits = iter(LAST_RETRY if last else ())
            while not self._try((step, skipped), state, wait=last):
                pause = next(waits, None)
                if pause is None:
                    break
                time.sleep(pause)
        if last and self._kept[0] != step:
            newest = f"step {before} is the newest" if before else "no step is kept"
            raise SaveFailed(
                f"step {step} could not be saved in {self._run.workdir} ({self._why}); {newest}; "
                "once that is mended, the same command goes on"
            )
        self._interval.saved(step, time.perf_counter() - begin)
        return step

    def _try(self, this: tuple[int, int], state: TrainState, wait: bool) -> bool:
        """Whether the save has begun, or with `wait` has succeeded. this: (step, skipped)."""
        try:
            self._checkpoints.save(this[0], state)
            self._begun = this
            if wait:
                self._checkpoints.wait_for(this[0])
                self._kept = this
            self._retry_at = float("inf")
            return True
        except SaveFailed as error:
            self._note(error)
            return False

    def _note(self, error: SaveFailed) -> None:
        self._begun, self._why = self._kept, error.why
        pause = RETRY[min(self._failures, len(RETRY) - 1)]
        self._failures += 1
        self._retry_at = time.monotonic() + pause
        kept = self._kept[0]  # 0: the beginning, of which there is no checkpoint
        newest = f"step {kept} stays the newest" if kept else "no step is kept yet"
        self._run.say(f"warning: {error}; {newest}; it is tried again")

    def close(self) -> None:
        """Waits for the save under way."""
        with self._run.buckets("save"):
            self._checkpoints.close()
