"""The compiled train steps of a run, one for each shape that a batch may take."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from coca_jax import image_shape, partitioning
from coca_jax import ops as operations
from coca_jax.image_shape import Size
from coca_jax.models.coca import CoCa
from coca_jax.training import replicas, text_lengths
from coca_jax.training.feed import Measured
from coca_jax.training.gradients import Metrics
from coca_jax.training.optimizer import make_schedule
from coca_jax.training.setup import Run
from coca_jax.training.state import Alike, TrainState, state_shardings
from coca_jax.training.step import of_step, shared_train_step, size_at

# Image size, lengths of captions, rows, whether all is computed twice.
Shape = tuple[Size, text_lengths.Lengths, int, bool]


@functools.lru_cache(maxsize=8)
def program(
    model: CoCa,
    alike: Alike,
    mesh: Mesh,
    size: Size,
    lengths: text_lengths.Lengths,
    twice: bool,
) -> Any:
    """The jitted train step, the same one for all runs of a process whose steps are alike, so that
    the next run neither traces nor compiles it. alike: by `of_step`. The state is donated."""
    device = mesh.devices.flat[0]
    _, shardings = state_shardings(model, alike.config, mesh)
    again = replicas.computed_twice(device) if twice else {}
    return jax.jit(
        shared_train_step(model, alike, size, lengths),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=operations.compiler_options(device.platform, mesh.size) | again,
    )


class Programs:
    """`programs(step, state, measured batch)` -> (state, metrics), through the step's program.

    Which program: by the image size of the step (config.image_sizes), by the batch's lengths and
    by its rows (config.batch_sizes). The state is donated.
    A program's first run is awaited and counted as 'compile'.
    """

    def __init__(self, run: Run):
        self._run = run
        self._config, self._steps, self._buckets = run.config, run.steps, run.buckets
        self._recheck = run.config.faults.recheck_every_steps
        # Kept here too, for a run may have more of them than are kept beside it.
        self._program = functools.cache(
            functools.partial(program, run.model, of_step(run.config), run.mesh)
        )
        schedule = make_schedule(run.config.optimizer, run.steps)
        self._schedule = partitioning.replicate(run.mesh, schedule)
        self._compiled: set[Shape] = set()

    def __call__(self, step: int, state: TrainState, batch: Measured) -> tuple[TrainState, Metrics]:
        arrays, lengths = batch
        size, rows = size_at(self._config, step - 1, self._steps), len(arrays["tokens"])
        twice = bool(self._recheck) and step % self._recheck == 0
        shape = size, lengths, rows, twice
        first = shape not in self._compiled
        if first:
            self._say(shape)
            self._compiled.add(shape)
        with self._buckets("compile" if first else "step"):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = self._program(size, lengths, twice)(state, arrays, self._schedule)
            if first:
                jax.block_until_ready(values)
        return state, values

    def _say(self, shape: Shape) -> None:
        if not self._compiled:
            self._run.begin("compiling the train step")
            return
        size, lengths, rows, twice = shape
        of = f"batches of {rows}, " if self._config.batch_sizes else ""
        again = "that computes all twice " if twice else ""
        pixels = f"{of}{image_shape.words(size)} px"
        self._run.say(
            f"compiling the step for {pixels} and captions of {lengths} tokens {again}..."
        )
