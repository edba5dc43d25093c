"""What happens beside the steps of the loop: logging, evaluation, a profiler's trace."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
from ml_collections import ConfigDict

from coca_jax import train_step
from coca_jax.checkpointing import Checkpoints
from coca_jax.metrics import MetricWriter, Progress
from coca_jax.training.feed import Feed
from coca_jax.training.setup import Run

SHOWN = (
    *("loss", "contrastive_loss", "captioning_loss"),
    *("head_loss", "head_accuracy", "learning_rate"),
)


class Log:
    """Shows and writes the metrics of a step, one step late: the device has work while we wait.

    Only process 0 shows and writes; the others read the same values.
    """

    def __init__(self, run: Run, start: int, feed: Feed, batches: Any):
        config = run.config
        self._writer = MetricWriter(run.workdir, start_step=start) if run.main_process else None
        self._progress = Progress(
            run.steps,
            start_step=start,
            pairs_per_step=config.batch_size,
            enabled=run.main_process,
        )
        self._every, self._steps, self._buckets = config.log.every_steps, run.steps, run.buckets
        self._feed, self._batches = feed, batches
        self._pending: tuple[int, train_step.Metrics] | None = None
        self._previous: jax.Array | None = None

    def __call__(self, step: int, values: train_step.Metrics) -> None:
        """Keeps the metrics of `step`, which may still run, and shows those kept before."""
        with self._buckets("step"):
            self.flush()
            if step % self._every == 0 or step == self._steps:
                self._pending = (step, values)
            if self._previous is not None:
                jax.block_until_ready(self._previous)  # one step ahead: batches do not pile up
            self._previous = values["loss"]

    def flush(self) -> None:
        """Shows and writes what is kept."""
        if self._pending is None:
            return
        step, values = self._pending
        self._pending = None
        numbers = {k: float(v) for k, v in jax.device_get(values).items()}
        shown = {k: numbers[k] for k in SHOWN if k in numbers}
        waited = self._feed.take_waited()
        rate = self._progress.update(step, shown, waited)
        numbers |= {"pairs_per_second": rate, "data_wait_seconds": waited}
        numbers |= self._batches.progress(step)
        if self._writer is not None:
            times = {k: v for k, v in self._buckets.take().items() if k != "data_wait_seconds"}
            self._writer.write(step, {**numbers, **times})

    def pause(self) -> None:
        """Restarts the clock of the rate, after something that trained nothing."""
        self._progress.pause()

    def close(self) -> None:
        """Shows what is kept and closes the files."""
        self.flush()
        self._progress.close()
        if self._writer is not None:
            self._writer.close()


class Evaluation:
    """Scores of config.eval.tasks each config.eval.every_steps steps, and when it is asked.

    The state that it is given is saved, or its save is under way.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints):
        self._run, self._checkpoints = run, checkpoints

    def due(self, step: int) -> bool:
        """Whether the loop evaluates after `step`. The last evaluation comes after the loop."""
        return evaluation_due(self._run, step)

    def __call__(self, step: int, state: train_step.TrainState) -> dict[str, float]:
        """Scores by name, also written to workdir/eval.json."""
        run = self._run
        if not run.config.eval.tasks:
            return {}
        kept = functools.partial(self._checkpoints.wait_for, step)
        run.say(f"evaluating step {step} ...")
        with run.buckets("eval"), run.stop.saved("evaluating", kept):
            from coca_jax import inference
            from coca_jax.evaluators import tasks

            params = state.params
            if state.ema is not None:
                params = train_step.merge(params, state.ema)
            model = inference.CoCaModel(
                run.config,
                params,
                run.vocabulary,
                batch_size=max(64, 16 * jax.device_count()),
                class_names=run.class_names,
            )
            return tasks.run_tasks(model, run.config.eval.tasks, run.workdir, step=step)


def evaluation_due(run: Run, step: int) -> bool:
    """Whether there is something to evaluate after `step`, inside the loop."""
    every = run.config.eval.every_steps if run.config.eval.tasks else 0
    return bool(every) and step % every == 0 and step < run.steps


def trace(config: ConfigDict, step: int, workdir: str) -> None:
    """Traces the steps [first, last] of config.log.profile_steps into workdir/profile."""
    if not config.log.profile_steps or jax.process_index():
        return
    first, last = config.log.profile_steps
    if step == first:
        jax.profiler.start_trace(os.path.join(workdir, "profile"))
    elif step == last + 1:
        jax.profiler.stop_trace()
