"""What happens beside the steps of the loop: logging, saving, evaluation, a profiler's trace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from coca_jax import train_step
from coca_jax.checkpointing import Checkpoints
from coca_jax.metrics import MetricWriter, Progress, TimeBuckets
from coca_jax.training.feed import Feed

SHOWN = (
    *("loss", "contrastive_loss", "captioning_loss"),
    *("head_loss", "head_accuracy", "learning_rate"),
)


class Log:
    """Shows and writes the metrics of a step, one step late: the device has work while we wait.

    Only process 0 shows and writes; the others read the same values.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: str,
        steps: int,
        start: int,
        feed: Feed,
        batches: Any,
        buckets: TimeBuckets,
    ):
        main_process = jax.process_index() == 0
        self._writer = MetricWriter(workdir, start_step=start) if main_process else None
        self._progress = Progress(
            steps, start_step=start, pairs_per_step=config.batch_size, enabled=main_process
        )
        self._every, self._steps = config.log.every_steps, steps
        self._feed, self._batches, self._buckets = feed, batches, buckets
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


class Save:
    """Saves the state each config.checkpoint.every_steps steps and at the end."""

    def __init__(
        self, config: ConfigDict, checkpoints: Checkpoints, steps: int, buckets: TimeBuckets
    ):
        self._every, self._steps = config.checkpoint.every_steps, steps
        self._checkpoints, self._buckets = checkpoints, buckets

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be kept."""
        return step % self._every == 0 or step == self._steps

    def __call__(self, step: int, state: train_step.TrainState) -> None:
        """Starts the save; it goes on behind the next steps."""
        with self._buckets("save"):
            self._checkpoints.save(step, state)

    def close(self) -> None:
        """Waits for the save under way."""
        with self._buckets("save"):
            self._checkpoints.close()


class Evaluation:
    """Scores of config.eval.tasks each config.eval.every_steps steps, and when it is asked."""

    def __init__(
        self,
        config: ConfigDict,
        vocabulary: Any,
        class_names: Sequence[str],
        workdir: str,
        steps: int,
        buckets: TimeBuckets,
    ):
        self._config, self._vocabulary, self._class_names = config, vocabulary, class_names
        self._workdir, self._steps, self._buckets = workdir, steps, buckets

    def due(self, step: int) -> bool:
        """Whether the loop evaluates after `step`. The last evaluation comes after the loop."""
        every = self._config.eval.every_steps
        return bool(every) and step % every == 0 and step < self._steps

    def __call__(self, step: int, state: train_step.TrainState) -> dict[str, float]:
        """Scores by name, also written to workdir/eval.json."""
        if not self._config.eval.tasks:
            return {}
        with self._buckets("eval"):
            from coca_jax import inference
            from coca_jax.evaluators import tasks

            params = state.params
            if state.ema is not None:
                params = train_step.merge(params, state.ema)
            model = inference.CoCaModel(
                self._config,
                params,
                self._vocabulary,
                batch_size=max(64, 16 * jax.device_count()),
                class_names=self._class_names,
            )
            return tasks.run_tasks(model, self._config.eval.tasks, self._workdir, step=step)


def trace(config: ConfigDict, step: int, workdir: str) -> None:
    """Traces the steps [first, last] of config.log.profile_steps into workdir/profile."""
    if not config.log.profile_steps or jax.process_index():
        return
    first, last = config.log.profile_steps
    if step == first:
        jax.profiler.start_trace(os.path.join(workdir, "profile"))
    elif step == last + 1:
        jax.profiler.stop_trace()
