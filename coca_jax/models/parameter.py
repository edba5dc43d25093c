"""A parameter of a module: its initialiser, its shape and the names of its axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from coca_jax.partitioning import with_axes


def parameter(
    module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...], *axes: str
) -> jax.Array:
    """The module's parameter, float32 [*shape], drawn by `init` (key, shape) where it is not there
    yet. axes: logical names of its dimensions (see partitioning.RULES).

    Of one that is there Flax would trace the initialiser again at each call, for its shape alone: a
    thirteenth of the time in which a step is traced. Raises ValueError for another shape.
    """
    if module.is_initializing() or not module.has_variable("params", name):
        value: jax.Array = module.param(name, with_axes(init, *axes), shape)
        return value
    value = nn.meta.unbox(module.get_variable("params", name))
    if value.shape != tuple(shape):
        path = "/".join((*module.path, name))
        raise ValueError(f"parameter {path} is {list(value.shape)}, and the model's {list(shape)}")
    return value
