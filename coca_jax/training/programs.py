"""The compiled train steps of a run, one for each shape that a batch may take."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from coca_jax import text_lengths, train_step
from coca_jax.metrics import TimeBuckets
from coca_jax.models import coca
from coca_jax.training.feed import Measured

Shape = tuple[int, text_lengths.Lengths]  # image size, lengths of captions


class Programs:
    """`programs(step, state, measured batch)` -> (state, metrics), through the step's program.

    Which program: by the image size of the step (config.image_sizes) and by the batch's lengths.
    The state is donated. A program's first run is awaited and counted as 'compile'.
    """

    def __init__(
        self, model: coca.CoCa, config: ConfigDict, mesh: Mesh, steps: int, buckets: TimeBuckets
    ):
        self._config, self._steps, self._buckets = config, steps, buckets
        _, shardings = train_step.state_shardings(model, config, mesh)

        @functools.cache
        def program(size: int, lengths: text_lengths.Lengths) -> Any:
            step = train_step.make_train_step(model, config, steps, size, lengths)
            return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

        self._program = program
        self._compiled: set[Shape] = set()

    def __call__(
        self, step: int, state: train_step.TrainState, batch: Measured
    ) -> tuple[train_step.TrainState, train_step.Metrics]:
        arrays, lengths = batch
        shape = (train_step.size_at(self._config, step - 1, self._steps), lengths)
        first = shape not in self._compiled
        self._compiled.add(shape)
        with self._buckets("compile" if first else "step"):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = self._program(*shape)(state, arrays)
            if first:
                jax.block_until_ready(values)
        return state, values
