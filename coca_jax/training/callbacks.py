"""What happens next to the steps of a run: logging, saving, stopping, evaluation, profiling.

`Trainer` says in which order callbacks are called. Others are in bad_steps.py (steps that change
nothing, loss spikes) and replicas.py (silent data corruption).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import typing
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from coca_jax.checkpoints.manager import SaveFailed
from coca_jax.evaluation import history
from coca_jax.evaluation.evaluators import base
from coca_jax.models import param_groups
from coca_jax.runtime import goodput, storage
from coca_jax.runtime.metric_log import MetricWriter, Progress
from coca_jax.runtime.signals import Preempted
from coca_jax.training import guard, trackers
from coca_jax.training.losses import OBJECTIVES
from coca_jax.training.train_step import Metrics

if typing.TYPE_CHECKING:
    from coca_jax import inference
    from coca_jax.training.trainer import Trainer


class LossSpike(Exception):
    """The loss has spiked. step: the last one of the spike, counted from 1."""

    def __init__(self, step: int, loss: float, usual: float):
        super().__init__(f"the loss is {loss:.4g} at step {step} and was {usual:.4g} before")
        self.step = step


# What ends or rewinds a run in an orderly way, at the same step on all processes.
EXPECTED = (Preempted, LossSpike, guard.LostTooMuch)


class Callback:
    """Something that happens next to the steps; see `Trainer` for when each method is called.

    All processes of a run call the same methods at the same steps, with the same metrics.
    """

    def before_step(self, step: int) -> None:
        """Called before `step`, counted from 1."""

    def after_step(self, step: int, metrics: Metrics) -> None:
        """Called once `step` is under way: reading its metrics or `trainer.state` waits for it."""

    def before_save(self, step: int) -> None:
        """Called before the state after `step` is saved. An exception keeps it from being saved."""

    def at_end(self, error: BaseException | None) -> None:
        """Called when the loop ends: after the last step, or by `error`."""


SHOWN = ("loss", *(name for loss in OBJECTIVES for name in loss.shown), "learning_rate")


class Log(Callback):
    """Shows and writes the metrics of a step, one step late: the device has work while we wait.

    Only process 0 shows and writes; the others read the same values.
    """

    def __init__(self, trainer: Trainer):
        self._trainer, self._buckets = trainer, trainer.buckets
        self._writer = _open_writer(trainer) if trainer.main_process else None
        self._progress = Progress(
            trainer.steps,
            start_step=trainer.step,
            pairs=trainer.mixture.pairs,
            enabled=trainer.main_process,
        )
        self._every = trainer.config.log.every_steps
        self._pending: tuple[int, Metrics] | None = None
        self._previous: jax.Array | None = None
        self._compiling = self._buckets.seconds("compile")
        self._late = False  # whether the last call has shown the step before its own

    def after_step(self, step: int, metrics: Metrics) -> None:
        """Keeps the metrics of `step`, which may still run, and shows those kept before."""
        with self._buckets("step"):
            before, self._compiling = self._compiling, self._buckets.seconds("compile")
            if self._compiling > before:
                self._progress.compiled(step, self._compiling - before)
            self._late = self._pending is not None
            self._show()
            if step % self._every == 0 or step == self._trainer.steps:
                self._pending = (step, metrics)
            if self._previous is not None:
                jax.block_until_ready(self._previous)  # one step ahead: batches do not pile up
            self._previous = metrics["loss"]
            self._trainer.goodput.first_step()

    def flush(self) -> None:
        """Shows and writes what is kept: afterwards the files hold all rows so far."""
        self._show(at_once=self._late)
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:  # nothing is lost: the next flush writes all of it
                self._trainer.say(
                    f"warning: metrics are not written ({error}); they are tried again"
                )

    def _show(self, at_once: bool = False) -> None:
        if self._pending is None:
            return
        step, values = self._pending
        self._pending = None
        numbers = {k: float(v) for k, v in jax.device_get(values).items()}
        shown = {k: numbers[k] for k in SHOWN if k in numbers}
        waited = self._trainer.feed.take_waited()
        rate = self._progress.update(step, shown, waited, at_once=at_once)
        numbers |= {"pairs_per_second": rate, "data_wait_seconds": waited}
        numbers["processor_time"] = self._buckets.take_processor()
        numbers |= self._trainer.batches.progress(step)
        if self._writer is not None:
            times = {k: v for k, v in self._buckets.take().items() if k != "data_wait_seconds"}
            self._writer.write(step, {**numbers, **times, **self._trainer.goodput.shares()})
            self._trainer.goodput.note(step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what trains nothing: the steps before it have ended, the files hold their rows,
        and the time inside is none of theirs."""
        self.flush()
        with self._buckets("step"):
            if self._previous is not None:
                jax.block_until_ready(self._previous)
        with self._progress.paused():
            yield

    def at_end(self, error: BaseException | None) -> None:
        """Shows what is kept and closes the files."""
        if not (error is None or isinstance(error, Exception)):
            return  # Ctrl-C in a program, say: nothing that takes time
        self.flush()
        self._progress.close()
        if self._writer is not None:
            self._writer.close()
            self._trainer.goodput.close()


def _open_writer(trainer: Trainer) -> MetricWriter:
    """metrics.jsonl and the trackers that the config names, from the state's step on."""
    config, workdir, start = trainer.config, trainer.workdir, trainer.step
    opened = trackers.open_all(config.log.trackers, workdir, start, config.to_dict())
    return MetricWriter(workdir, start_step=start, trackers=opened)


# When a run saves, and what it does when a save fails.


RETRY = (30.0, 60.0, 120.0, 300.0)  # seconds before another try, in the loop; the last one repeats
LAST_RETRY = (2.0, 10.0, 30.0)  # seconds before another try, when the run is about to end
FIRST = 20  # steps before the first save of checkpoint.every='auto', which measures


class Interval:
    """The steps between two saves, config.checkpoint.every_steps or by what a save takes here."""

    def __init__(self, trainer: Trainer):
        given = trainer.config.checkpoint
        self._trainer, self._auto, self._start = trainer, given.every == "auto", trainer.step
        self._between = 3600 * given.mean_hours_between_failures
        self._steps = FIRST if self._auto else given.every_steps
        self._logged = 0
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
            if not self._logged / 2 < self._steps < self._logged * 2:
                self._logged = self._steps
                self._trainer.say(
                    f"a checkpoint every {self._steps} steps: a save takes {seconds:.2f} s, a step "
                    f"{one:.3g} s, and the run fails every {self._between / 3600:g} h"
                )
        self.begin(step)

    def begin(self, step: int) -> None:
        """The interval is counted from `step` on."""
        self._start, self._since = step, None


class Save(Callback):
    """Saves the state as often as `Interval` says, at the end, before an evaluation, and when the run
    is asked to stop, which then ends it. Scores so belong to a state that is kept, and an evaluation
    that is cut short is done by the next start.

    A save that fails is said and tried again; the run goes on with its earlier checkpoints. A state
    that learned nothing since the last save (all steps skipped) takes no checkpoint's place.
    """

    def __init__(self, trainer: Trainer):
        self._trainer, self._checkpoints = trainer, trainer.checkpoints
        # (step, skipped steps) of the last completed save and of the last started save.
        self._saved = self._begun = (trainer.step, int(trainer.state.skipped))
        self._interval = Interval(trainer)
        self._failures, self._retry_at, self._why = 0, float("inf"), ""

    def after_step(self, step: int, metrics: Metrics) -> None:
        """Saves where it is due. Raises Preempted after the save when the run is asked to stop."""
        trainer = self._trainer
        stopping = trainer.stop.reached(step)  # on all processes at the same step
        if stopping or self.due(step):
            for callback in trainer.callbacks:
                callback.before_save(step)
            with trainer.log.paused():
                saved = self.save(step, last=stopping or step == trainer.steps)
            if stopping:
                raise Preempted(saved)

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be kept."""
        due = self._interval.due(step)
        if due or step == self._trainer.steps or evaluation_due(self._trainer, step):
            return True
        return self._trainer.stop.alone and self._try_again()

    def _try_again(self) -> bool:
        """Whether an earlier save has failed and it is time to try again."""
        if self._begun != self._saved and not self._checkpoints.busy():
            self._settle()
        return time.monotonic() >= self._retry_at

    def _settle(self) -> None:
        """Waits for the save under way and notes how it ended."""
        try:
            self._checkpoints.wait()
            self._saved = self._begun
        except SaveFailed as error:
            self._note(error)

    def save(self, step: int, *, last: bool = False) -> int:
        """Starts the save, which goes on behind the next steps; `last` waits for it.

        Returns the step that a run which goes on would begin from. Raises SaveFailed when the last
        save has failed several times.
        """
        begin = time.perf_counter()
        with self._trainer.buckets("save"):
            self._settle()
            skipped = int(self._trainer.state.skipped)
            before, skipped_before = self._saved
            if skipped - skipped_before == step - before > 0:
                self._trainer.say(
                    f"step {step} is not saved: every step since {before} was skipped"
                )
                self._interval.begin(step)  # else every later step would be due
                return before
            rows = self._trainer.shared_quarantine()
            self._quarantine = [dataclasses.astuple(row) for row in rows]
            waits = iter(LAST_RETRY if last else ())
            while not self._try((step, skipped), wait=last):
                pause = next(waits, None)
                if pause is None:
                    break
                time.sleep(pause)
        if last and self._saved[0] != step:
            newest = f"step {before} is the newest" if before else "no step is kept"
            raise SaveFailed(
                f"step {step} could not be saved in {self._trainer.workdir} ({self._why}); {newest}; "
                "once that is mended, the same command goes on"
            )
        self._interval.saved(step, time.perf_counter() - begin)
        return step

    def _try(self, this: tuple[int, int], wait: bool) -> bool:
        """Whether the save has begun, or with `wait` has succeeded. this: (step, skipped)."""
        try:
            self._checkpoints.save(this[0], self._trainer.state, self._quarantine)
            self._begun = this
            if wait:
                self._checkpoints.wait_for(this[0])
                self._saved = this
            self._retry_at = float("inf")
            return True
        except SaveFailed as error:
            self._note(error)
            return False

    def _note(self, error: SaveFailed) -> None:
        self._begun, self._why = self._saved, error.why
        pause = RETRY[min(self._failures, len(RETRY) - 1)]
        self._failures += 1
        self._retry_at = time.monotonic() + pause
        saved = self._saved[0]  # 0: the beginning, of which there is no checkpoint
        newest = f"step {saved} stays the newest" if saved else "no step is kept yet"
        self._trainer.say(f"warning: {error}; {newest}; it is tried again")

    def at_end(self, error: BaseException | None) -> None:
        """Waits for the save under way, else it would be lost with the process.

        Not where the run goes back and still needs the checkpoints, and not after an error of one
        process of several, where the others may not come to it.
        """
        if isinstance(error, LossSpike):
            return
        expected = error is None or isinstance(error, EXPECTED)
        if not expected and not (isinstance(error, Exception) and self._trainer.stop.alone):
            return
        with self._trainer.buckets("save"):
            self._checkpoints.close()


# Evaluation inside a run, with the guard and the best checkpoint that follow from it.


class Evaluate(Callback):
    """Scores of config.eval.tasks each config.eval.every_steps steps, and when it is asked.

    The state that it is given is saved, or its save is under way, or no step has changed it.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._model: inference.CoCaModel | None = None  # of all evaluations: compiled once

    def after_step(self, step: int, metrics: Metrics) -> None:
        """Evaluates where it is due. Raises as `evaluate`."""
        if evaluation_due(self._trainer, step):
            with self._trainer.log.paused():
                self.evaluate(step)

    def catch_up(self) -> None:
        """Runs the evaluation that the previous start did not finish, and, with a guard, the one
        before the first step.

        Raises guard.LostTooMuch if the guard has already ended this run, and ValueError for tasks
        that this model cannot do.
        """
        trainer, step = self._trainer, self._trainer.step
        config, workdir = trainer.config.eval, trainer.workdir
        self._check()
        if config.guard and not step and not history.has(workdir, 0):
            self.evaluate(0)
        if config.guard and step and not history.has(workdir, 0):
            trainer.say(
                "warning: eval.guard is silent: this run has no scores from before the first step"
            )
        if config.guard == "stop" and step:
            for row in history.read(workdir):
                if row["step"] == step and (line := guard.judge(workdir, config, **row)):
                    raise guard.LostTooMuch(line, workdir)
        if step and evaluation_due(trainer, step) and not history.has(workdir, step):
            self.evaluate(step)

    def forget_after(self, step: int) -> None:
        """The run goes back to `step`: the scores of later ones are of weights that it gives up."""
        if self._trainer.main_process:
            history.drop_after(self._trainer.workdir, step)
        if self._trainer.best is not None:
            self._trainer.best.forget_after(step)

    def _check(self) -> None:
        if not self._trainer.config.eval.tasks:
            return
        from coca_jax.evaluation import runner

        model = self._load_model()
        runner.check(model, self._trainer.config.eval.tasks)
        model.set_params({})

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores by name of the trainer's state, which is the one after `step`; also written to
        workdir/eval.json.

        An evaluation inside the run that cannot be written, on a full disk, does not end it.
        Raises guard.LostTooMuch.
        """
        trainer = self._trainer
        if not trainer.config.eval.tasks:
            return {}
        try:
            scores = self._evaluate(step)
        except OSError as error:
            # With several processes, only a failed write of process 0 is known to all of them.
            if step == trainer.steps or not (
                trainer.stop.alone or isinstance(error, base.NotWritten)
            ):
                raise
            trainer.say(f"warning: step {step} is not evaluated ({error}); training continues")
            return {}
        if self._trainer.best is not None:
            self._trainer.best.note(step, scores)
        line = guard.judge(trainer.workdir, trainer.config.eval, step, scores)
        if line and trainer.config.eval.guard == "stop":
            raise guard.LostTooMuch(line, trainer.workdir)
        if line:
            trainer.say(f"warning: {line}")
        return scores

    def _evaluate(self, step: int) -> dict[str, float]:
        trainer = self._trainer

        def keep_scores() -> None:
            if step:  # what no step has changed is not saved: the next start makes it again
                trainer.checkpoints.wait_for(step)

        trainer.say(f"evaluating step {step} ...")
        with trainer.buckets("eval"), trainer.stop.saved("evaluating", keep_scores):
            from coca_jax.evaluation import runner

            model = self._load_model()
            try:
                return runner.run_tasks(
                    model, trainer.config.eval.tasks, trainer.workdir, step=step
                )
            finally:
                model.set_params({})  # the next steps have the memory

    def _load_model(self) -> inference.CoCaModel:
        from coca_jax.inference.model import model_class

        trainer, state = self._trainer, self._trainer.state
        params = state.params
        if state.ema is not None:
            params = param_groups.merge(params, state.ema)
        if self._model is None:
            self._model = model_class(trainer.config.model.family)(
                trainer.config,
                params,
                trainer.vocabulary,
                batch_size=max(64, 16 * jax.device_count()),
                class_names=trainer.class_names,
            )
        else:
            self._model.set_params(params)
        return self._model


def evaluation_due(trainer: Trainer, step: int) -> bool:
    """Whether there is something to evaluate after `step`, inside the loop."""
    every = trainer.config.eval.every_steps if trainer.config.eval.tasks else 0
    return bool(every) and step % every == 0 and step < trainer.steps


class Profile(Callback):
    """Traces the steps [first, last] of config.log.profile_steps into workdir/profile. A resumed run
    traces those that are still to come, and says so when none is and none was traced before."""

    def __init__(self, trainer: Trainer):
        start = trainer.step
        first, last = trainer.config.log.profile_steps or (0, 0)
        self._first, self._last = max(int(first), start + 1) if last else 0, int(last)
        self._main, self._folder = trainer.main_process, storage.place(trainer.workdir) / "profile"
        self._open = contextlib.ExitStack()
        behind = 0 < self._last <= start < trainer.steps
        if behind and self._main and not self._folder.exists():  # else they were traced
            trainer.say(
                f"warning: log.profile_steps={trainer.config.log.profile_steps} is behind step {start},"
                " from which the run goes on, and traces nothing; name steps to come"
            )

    def before_step(self, step: int) -> None:
        """Begins or ends the trace where it is to."""
        if step == self._first <= self._last and self._main:
            jax.profiler.start_trace(self._open.enter_context(storage.local_folder(self._folder)))
            self._open.callback(jax.profiler.stop_trace)  # before what is there goes to a bucket
        elif step == self._last + 1:
            self._open.close()

    def at_end(self, error: BaseException | None) -> None:
        """Ends a trace under way."""
        self._open.close()
