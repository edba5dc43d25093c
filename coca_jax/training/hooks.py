"""What happens beside the steps of the loop: logging, evaluation, a profiler's trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax

from coca_jax import trackers
from coca_jax.checkpoints.checkpointing import Checkpoints
from coca_jax.evaluators import history, writing
from coca_jax.files import storage
from coca_jax.metrics import MetricWriter, Progress
from coca_jax.training import guard
from coca_jax.training.best import Best
from coca_jax.training.feed import Feed
from coca_jax.training.goodput import Goodput
from coca_jax.training.gradients import Metrics
from coca_jax.training.objectives import OBJECTIVES
from coca_jax.training.setup import Run
from coca_jax.training.state import TrainState, merge

if TYPE_CHECKING:
    from coca_jax import inference  # heavy: imported where there is something to evaluate

SHOWN = ("loss", *(name for loss in OBJECTIVES for name in loss.shown), "learning_rate")


class Log:
    """Shows and writes the metrics of a step, one step late: the device has work while we wait.

    Only process 0 shows and writes; the others read the same values.
    """

    def __init__(self, run: Run, start: int, feed: Feed, batches: Any, good: Goodput):
        config, self._say = run.config, run.say
        self._writer = open_writer(run, start) if run.main_process else None
        self._progress = Progress(
            run.steps,
            start_step=start,
            pairs=run.mixture.pairs,
            enabled=run.main_process,
        )
        self._every, self._steps, self._buckets = config.log.every_steps, run.steps, run.buckets
        self._feed, self._batches, self._good = feed, batches, good
        self._pending: tuple[int, Metrics] | None = None
        self._previous: jax.Array | None = None
        self._compiling = run.buckets.seconds("compile")
        self._late = False  # whether the last call has shown the step before its own

    def __call__(self, step: int, values: Metrics) -> None:
        """Keeps the metrics of `step`, which may still run, and shows those kept before."""
        with self._buckets("step"):
            before, self._compiling = self._compiling, self._buckets.seconds("compile")
            if self._compiling > before:
                self._progress.compiled(step, self._compiling - before)
            self._late = self._pending is not None
            self._show()
            if step % self._every == 0 or step == self._steps:
                self._pending = (step, values)
            if self._previous is not None:
                jax.block_until_ready(self._previous)  # one step ahead: batches do not pile up
            self._previous = values["loss"]
            self._good.first_step()

    def flush(self) -> None:
        """Shows and writes what is kept: afterwards the files hold all rows so far."""
        self._show(at_once=self._late)
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:  # nothing is lost: the next flush writes all of it
                self._say(f"warning: metrics are not written ({error}); they are tried again")

    def _show(self, at_once: bool = False) -> None:
        if self._pending is None:
            return
        step, values = self._pending
        self._pending = None
        numbers = {k: float(v) for k, v in jax.device_get(values).items()}
        shown = {k: numbers[k] for k in SHOWN if k in numbers}
        waited = self._feed.take_waited()
        rate = self._progress.update(step, shown, waited, at_once=at_once)
        numbers |= {"pairs_per_second": rate, "data_wait_seconds": waited}
        numbers["processor_time"] = self._buckets.take_processor()
        numbers |= self._batches.progress(step)
        if self._writer is not None:
            times = {k: v for k, v in self._buckets.take().items() if k != "data_wait_seconds"}
            self._writer.write(step, {**numbers, **times, **self._good.shares()})
            self._good.note(step)

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

    def close(self) -> None:
        """Shows what is kept and closes the files."""
        self.flush()
        self._progress.close()
        if self._writer is not None:
            self._writer.close()
            self._good.close()


def open_writer(run: Run, start: int) -> MetricWriter:
    """metrics.jsonl and the trackers that the config names, from step `start` on."""
    told = trackers.open_all(run.config.log.trackers, run.workdir, start, run.config.to_dict())
    return MetricWriter(run.workdir, start_step=start, trackers=told)


class Evaluation:
    """Scores of config.eval.tasks each config.eval.every_steps steps, and when it is asked.

    The state that it is given is saved, or its save is under way, or no step has changed it.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints, best: Best | None = None):
        self._run, self._checkpoints, self._best = run, checkpoints, best
        self._model: inference.CoCaModel | None = None  # of all evaluations: compiled once

    def catch_up(self, step: int, state: TrainState) -> None:
        """Evaluates after `step`, from which a run goes on, where it was left before or in that;
        with a guard before the first step as well. Raises guard.LostTooMuch for a run that ended
        so, and ValueError for tasks that this model cannot do."""
        config, workdir = self._run.config.eval, self._run.workdir
        self._check(state)
        if config.guard and not step and not history.has(workdir, 0):
            self(0, state)
        if config.guard and step and not history.has(workdir, 0):
            self._run.say(
                "warning: eval.guard is silent: this run has no scores from before the first step"
            )
        if config.guard == "stop" and step:
            for row in history.read(workdir):
                if row["step"] == step and (line := guard.judge(workdir, config, **row)):
                    raise guard.LostTooMuch(line, workdir)
        if step and self.due(step) and not history.has(self._run.workdir, step):
            self(step, state)

    def forget_after(self, step: int) -> None:
        """The run goes back to `step`: the scores of later ones are of weights that it gives up."""
        if self._run.main_process:
            history.drop_after(self._run.workdir, step)
        if self._best is not None:
            self._best.forget_after(step)

    def _check(self, state: TrainState) -> None:
        if not self._run.config.eval.tasks:
            return
        from coca_jax.evaluators import tasks

        model = self._model_of(state)
        tasks.check(model, self._run.config.eval.tasks)
        model.set_params({})

    def due(self, step: int) -> bool:
        """Whether the loop evaluates after `step`. The last evaluation comes after the loop."""
        return evaluation_due(self._run, step)

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """Scores by name, also written to workdir/eval.json.

        An evaluation inside the run that cannot be written, on a full disk, does not end it.
        Raises guard.LostTooMuch.
        """
        run = self._run
        if not run.config.eval.tasks:
            return {}
        try:
            scores = self._evaluate(step, state)
        except OSError as error:
            # Of several processes all hear of what process 0 could not write, of nothing else.
            if step == run.steps or not (run.stop.alone or isinstance(error, writing.NotWritten)):
                raise
            run.say(f"warning: step {step} is not evaluated ({error}); the run goes on")
            return {}
        if self._best is not None:
            self._best.note(step, scores)
        line = guard.judge(run.workdir, run.config.eval, step, scores)
        if line and run.config.eval.guard == "stop":
            raise guard.LostTooMuch(line, run.workdir)
        if line:
            run.say(f"warning: {line}")
        return scores

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        run = self._run

        def kept() -> None:
            if step:  # what no step has changed is not saved: the next start makes it again
                self._checkpoints.wait_for(step)

        run.say(f"evaluating step {step} ...")
        with run.buckets("eval"), run.stop.saved("evaluating", kept):
            from coca_jax.evaluators import tasks

            model = self._model_of(state)
            try:
                return tasks.run_tasks(model, run.config.eval.tasks, run.workdir, step=step)
            finally:
                model.set_params({})  # the next steps have the memory

    def _model_of(self, state: TrainState) -> inference.CoCaModel:
        from coca_jax import inference

        params, run = state.params, self._run
        if state.ema is not None:
            params = merge(params, state.ema)
        if self._model is None:
            self._model = inference.CoCaModel(
                run.config,
                params,
                run.vocabulary,
                batch_size=max(64, 16 * jax.device_count()),
                class_names=run.class_names,
            )
        else:
            self._model.set_params(params)
        return self._model


def evaluation_due(run: Run, step: int) -> bool:
    """Whether there is something to evaluate after `step`, inside the loop."""
    every = run.config.eval.every_steps if run.config.eval.tasks else 0
    return bool(every) and step % every == 0 and step < run.steps


class Trace:
    """Traces the steps [first, last] of config.log.profile_steps into workdir/profile; of a run
    that goes on from `start` those that are to come. Where none is, and none was traced before, it
    says so."""

    def __init__(self, run: Run, start: int):
        first, last = run.config.log.profile_steps or (0, 0)
        self._first, self._last = max(int(first), start + 1) if last else 0, int(last)
        self._main, self._folder = run.main_process, storage.place(run.workdir) / "profile"
        self._open = contextlib.ExitStack()
        behind = 0 < self._last <= start < run.steps
        if behind and self._main and not self._folder.exists():  # else they were traced
            run.say(
                f"warning: log.profile_steps={run.config.log.profile_steps} is behind step {start},"
                " from which the run goes on, and traces nothing; name steps to come"
            )

    def __call__(self, step: int) -> None:
        """To be called before each step."""
        if step == self._first <= self._last and self._main:
            jax.profiler.start_trace(self._open.enter_context(storage.local_folder(self._folder)))
            self._open.callback(jax.profiler.stop_trace)  # before what is there goes to a bucket
        elif step == self._last + 1:
            self.close()

    def close(self) -> None:
        """Ends a trace under way."""
        self._open.close()
