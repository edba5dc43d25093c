"""The compiled train steps of a run, one for each shape that a batch may take."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from coca_jax import ops as operations
from coca_jax.config import Config, shapes
from coca_jax.config.shapes import Size
from coca_jax.data import batches
from coca_jax.data.mixture import head_classes
from coca_jax.models.network import Network
from coca_jax.parallel import sharding
from coca_jax.parallel import sharding as partitioning
from coca_jax.runtime.metric_log import TimeBuckets
from coca_jax.runtime.signals import Stop
from coca_jax.training import feed, setup
from coca_jax.training.feed import Measured
from coca_jax.training.optimizer import make_schedule
from coca_jax.training.state import Alike, TrainState, build_model, state_shardings
from coca_jax.training.train_step import Metrics, of_step, shared_train_step, size_at

Shape = tuple[Size, feed.Lengths, int]  # image size, lengths of captions, rows


@functools.lru_cache(maxsize=8)
def program(model: Network, alike: Alike, mesh: Mesh, size: Size, lengths: feed.Lengths) -> Any:
    """The jitted train step, the same one for all runs of a process whose steps are alike, so that
    the next run neither traces nor compiles it. alike: by `of_step`. The state is donated."""
    _, shardings = state_shardings(model, alike.config, mesh)
    return jax.jit(
        shared_train_step(model, alike, size, lengths),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=operations.compiler_options(mesh.devices.flat[0].platform, mesh.size),
    )


class Programs:
    """`programs(step, state, measured batch)` -> (state, metrics), through the step's program.

    Which program: by the image size of the step (config.image_sizes), by the batch's lengths and
    by its rows (config.batch_sizes). The state is donated.
    A program's first run is awaited and counted as 'compile'.
    """

    def __init__(
        self,
        config: Config,
        model: Network,
        mesh: Mesh,
        steps: int,
        buckets: TimeBuckets,
        stop: Stop,
    ):
        self._config, self._steps, self._buckets, self._stop = config, steps, buckets, stop
        # Kept here too, for a run may have more of them than are kept beside it.
        self._program = functools.cache(functools.partial(program, model, of_step(config), mesh))
        schedule = make_schedule(config.optimizer, steps)
        self._schedule = sharding.replicate(mesh, schedule)
        self._compiled: set[Shape] = set()

    def __call__(self, step: int, state: TrainState, batch: Measured) -> tuple[TrainState, Metrics]:
        arrays, lengths = batch
        size, rows = size_at(self._config, step - 1, self._steps), len(arrays["tokens"])
        shape = size, lengths, rows
        first = shape not in self._compiled
        if first:
            self._say(shape)
            self._compiled.add(shape)
        with self._buckets("compile" if first else "step"):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = self._program(size, lengths)(state, arrays, self._schedule)
            if first:
                jax.block_until_ready(values)
        return state, values

    def _say(self, shape: Shape) -> None:
        if not self._compiled:
            setup.begin(self._stop, "compiling the train step")
            return
        size, lengths, rows = shape
        of = f"batches of {rows}, " if self._config.batch_sizes else ""
        pixels = f"{of}{shapes.words(size)} px"
        setup.say(f"compiling the step for {pixels} and captions of {lengths} tokens ...")


# The train step of a config as abstract arrays, for compiling without data or devices.


def build_step(config: Config, mesh: Mesh) -> tuple[Any, tuple[Any, Any, Any]]:
    """(jitted train step, its abstract arguments (state, batch, schedule)) exactly as `train` makes
    them."""
    model = build_model(config, mesh, len(head_classes(config)))
    abstract, shardings = state_shardings(model, config, mesh)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    step = shared_train_step(model, of_step(config))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    whole = NamedSharding(mesh, jax.sharding.PartitionSpec())
    schedule = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((), x.dtype, sharding=whole),
        make_schedule(config.optimizer, config.optimizer.warmup_steps + 1),  # of any length
    )
    return jitted, (state, abstract_batch(config, mesh), schedule)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one global batch, split over data x fsdp."""
    sharding = NamedSharding(mesh, partitioning.spec("batch"))
    return {
        name: jax.ShapeDtypeStruct(
            (config.batch_size, *field.shape), np.dtype(field.dtype), sharding=sharding
        )
        for name, field in batches.fields(config).items()
        if field.trains
    }
