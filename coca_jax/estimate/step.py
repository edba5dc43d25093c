"""The train step of a config as abstract arrays, for compiling without data or devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from coca_jax import partitioning
from coca_jax.config import Config
from coca_jax.data import batches
from coca_jax.data.mixture import head_classes
from coca_jax.training.optimizer import make_schedule
from coca_jax.training.state import build_model, state_shardings
from coca_jax.training.step import of_step, shared_train_step


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
