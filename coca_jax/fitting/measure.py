"""How long a step takes: real steps on real batches, before a run is begun."""

from __future__ import annotations

import dataclasses
import time

import jax
from ml_collections import ConfigDict

from coca_jax import metrics, partitioning, train_step
from coca_jax.data.batches import open_stream
from coca_jax.data.mixture import Mixture
from coca_jax.data.vocabulary import load
from coca_jax.training import setup, stopping
from coca_jax.training.feed import Feed
from coca_jax.training.programs import Programs


@dataclasses.dataclass(frozen=True)
class Speed:
    """Attributes:
    step: seconds of a step, waiting for data included.
    compile: seconds of compiling all programs that the steps needed.
    start: seconds from nothing to the first batch.
    """

    step: float
    compile: float
    start: float


def measure(config: ConfigDict, *, least_seconds: float = 4.0, most_steps: int = 30) -> Speed:
    """Takes steps by `config` until `least_seconds` have passed, 4 at least; nothing is kept.

    Steps that compile do not count. The state is dropped: the run begins anew.
    """
    buckets = metrics.TimeBuckets()
    begun = time.perf_counter()
    mesh = partitioning.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        run = setup.Run(
            config=config,
            workdir="",
            mesh=mesh,
            mixture=Mixture(config),
            vocabulary=load(config.data.vocabulary),
            class_names=(),
            steps=10 * (config.optimizer.warmup_steps + most_steps),  # longer than any warm-up
            model=setup.build_model(config, mesh),
            buckets=buckets,
            stop=stopping.current(),
        )
        run.begin("making the model, to see how long a step takes")
        state = train_step.init_state(run.model, config, mesh)
        batches = open_stream(config, run.vocabulary, run.mixture)
        feed = Feed(batches, config, mesh, buckets)
        step_fn = Programs(run)
        times: list[float] = []
        compiled = 0.0
        try:
            first = next(feed)
            start = time.perf_counter() - begun
            for step in range(1, most_steps + 1):
                batch = first if step == 1 else None
                tick = time.perf_counter()
                state, values = step_fn(step, state, batch or next(feed))
                jax.block_until_ready(values)
                taken = time.perf_counter() - tick
                now = buckets.total()["compile_seconds"]
                if now > compiled:
                    compiled = now
                else:
                    times.append(taken)
                if len(times) >= 4 and sum(times) >= least_seconds:
                    break
        finally:
            feed.close()
            batches.close()
    return Speed(sum(times) / len(times), compiled, start)
