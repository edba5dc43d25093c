"""How long a step takes: real steps on real batches, before a run is begun."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from coca_jax import metrics, partitioning
from coca_jax.config import Config
from coca_jax.data import features
from coca_jax.data.loaders import open_stream
from coca_jax.data.mixture import Mixture, head_classes
from coca_jax.data.stages import rest
from coca_jax.data.vocabulary import load
from coca_jax.training import setup, stopping
from coca_jax.training.feed import Feed
from coca_jax.training.programs import Programs
from coca_jax.training.state import init_state


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


def seconds_for(minutes: float) -> float:
    """Seconds of steps that are timed before a run of so many minutes: a twentieth, at most 4."""
    return min(4.0, 60 * minutes / 20)


def measure(config: Config, *, least_seconds: float) -> Speed:
    """Takes steps by `config`, nothing of which is kept; the run begins anew.

    At each size of images that the run has, 4 steps at least and until `least_seconds` have passed.
    Steps that compile do not count.
    """
    buckets = metrics.TimeBuckets()
    begun = time.perf_counter()
    mesh = partitioning.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        mixture = Mixture(config)
        classes = head_classes(config, mixture)
        run = setup.Run(
            config=config,
            workdir="",
            mesh=mesh,
            mixture=mixture,
            vocabulary=load(config.data.vocabulary),
            class_names=classes,
            steps=100 * (config.optimizer.warmup_steps + 10),  # longer than any warm-up
            model=setup.build_model(config, mesh, len(classes)),
            buckets=buckets,
            stop=stopping.current(),
        )
        run.begin("making the model, to see how long a step takes")
        state = init_state(run.model, config, mesh)
        kept: Any = [Blank(config)] * len(mixture.sources) if config.data.features else ()
        batches = open_stream(config, run.vocabulary, mixture, class_names=classes, features=kept)
        feed = Feed(batches, config, mesh, buckets)
        step_fn = Programs(run)
        total = 0.0
        try:
            batch = next(feed)
            start = time.perf_counter() - begun
            for share, step in stages(config, run.steps):
                times: list[float] = []
                compiled = buckets.total()["compile_seconds"]
                while len(times) < 4 or sum(times) < least_seconds:
                    tick = time.perf_counter()
                    state, values = step_fn(step, state, batch)
                    jax.block_until_ready(values)
                    batch = next(feed)
                    taken = time.perf_counter() - tick
                    now = buckets.total()["compile_seconds"]
                    if now > compiled:
                        compiled = now
                    else:
                        times.append(taken)
                total += share * sum(times) / len(times)
        finally:
            feed.close()
            batches.close()
    return Speed(total, compiled, start)


class Blank:
    """Stands for what `data.features` keeps of a source, which the run computes of the weights that
    it starts from: a step on zeros takes as long."""

    def __init__(self, config: Config):
        self._tokens = np.zeros(features.shape(config), config.model.dtype)

    def read(self, row: int, record: Any) -> np.ndarray:
        """See `Features.read`."""
        del row, record
        return self._tokens


def stages(config: Config, steps: int) -> list[tuple[float, int]]:
    """(share of the run, a step in it) of each size of images that the run goes through."""
    shares = [share for share, _ in config.image_sizes]
    begins = [sum(shares[:i]) for i in range(len(shares) + 1)]
    return [
        (share, round(begin * steps) + 1) for share, begin in zip([*shares, rest(shares)], begins)
    ]
