"""When a run saves, and what it does when a save fails."""

from __future__ import annotations

import time

from coca_jax.checkpointing import Checkpoints, SaveFailed
from coca_jax.train_step import TrainState
from coca_jax.training import hooks
from coca_jax.training.setup import Run

RETRY = (30.0, 60.0, 120.0, 300.0)  # seconds before another try, in the loop; the last one repeats
LAST_RETRY = (2.0, 10.0, 30.0)  # seconds before another try, when the run is about to end


class Save:
    """Saves the state each config.checkpoint.every_steps steps, at the end, and before an
    evaluation: so scores belong to a state that is kept, and the evaluation may be left.

    A save that fails is said and tried again; the run goes on with its earlier checkpoints. A state
    that learned nothing since the last save (all steps skipped) takes no checkpoint's place.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints, state: TrainState, start: int):
        self._run, self._checkpoints = run, checkpoints
        self._kept = self._begun = (start, int(state.skipped))  # of whole saves, of the last one
        self._failures, self._retry_at = 0, float("inf")

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be kept."""
        every, steps = self._run.config.checkpoint.every_steps, self._run.steps
        if step % every == 0 or step == steps or hooks.evaluation_due(self._run, step):
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
        with self._run.buckets("save"):
            self._settle()
            skipped = int(state.skipped)
            before, skipped_before = self._kept
            if skipped - skipped_before == step - before > 0:
                self._run.say(f"step {step} is not saved: every step since {before} was skipped")
                return before
            waits = iter(LAST_RETRY if last else ())
            while not self._try((step, skipped), state, wait=last):
                pause = next(waits, None)
                if pause is None:
                    break
                time.sleep(pause)
        if last and self._kept[0] != step:
            raise SaveFailed(f"step {step} could not be saved; step {before} is the newest")
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
        self._begun = self._kept
        pause = RETRY[min(self._failures, len(RETRY) - 1)]
        self._failures += 1
        self._retry_at = time.monotonic() + pause
        self._run.say(f"warning: {error}; step {self._kept[0]} stays the newest; it is tried again")

    def close(self) -> None:
        """Waits for the save under way."""
        with self._run.buckets("save"):
            self._checkpoints.close()
