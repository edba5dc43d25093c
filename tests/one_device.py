"""Runs on one device of the eight, which compile faster."""

import jax

from coca_jax import partitioning, run_config
from coca_jax.metrics import TimeBuckets
from coca_jax.training.run import train_on


def train_alone(config, workdir):
    """`train` on one device, which compiles faster."""
    mesh = partitioning.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    run_config.check(config)
    with jax.set_mesh(mesh):
        return train_on(mesh, config, str(workdir), TimeBuckets())
