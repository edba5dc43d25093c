"""The mesh of a run: explicit sizes of `config.mesh`, and a choice for those that are 0.

With fsdp=1, each device has a copy of the parameters and of the optimizer's state, which costs the
least communication that can delay a step. Where a copy takes a notable part of a device's memory,
parameters are sharded over as many devices as share fast links and divide the attention heads: then
every kernel is split along the rows of its product (docs/scaling.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from coca_jax.config import Config
from coca_jax.data import batch_schedule
from coca_jax.parallel import sharding
from coca_jax.runtime import device_memory, multihost
from coca_jax.training.state import build_model, state_shardings, trainable

COPY_SHARE = 0.05  # of a device's memory: a larger state is sharded
MOST_SHARE = 0.6  # a state beyond this, sharded within the links, is sharded over all devices
GIB = 2**30
Shape = tuple[int, int, int]  # data, fsdp, tensor


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mesh, and one line that says why where a size of it was chosen here."""

    mesh: Mesh
    reason: str = ""


def make(config: Config, devices: Sequence[Any] | None = None, memory: int = 0) -> Choice:
    """The mesh of a run on `devices`, by default on all that jax has.

    memory: bytes of one device; 0: what is free on this process's devices. All processes of a run
    use the number of process 0, since CPU hosts differ in free memory.

    Raises ValueError where explicit sizes do not fit the number of devices.
    """
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    given = () if devices is None else (devices,)
    found = jax.devices() if devices is None else devices
    plain = (sizes[0], sizes[1] or 1, sizes[2] or 1)
    fitting = _fitting(config, len(found))
    if 0 not in sizes or len(found) == 1 or not fitting:
        return Choice(sharding.make_mesh(*plain, *given))
    if not memory:
        memory = device_memory.available()
        if jax.process_count() > 1:
            memory = int(multihost.from_first("mesh", str(memory)))
    tensor = min(shape[2] for shape in fitting)
    fitting = sorted(shape for shape in fitting if shape[2] == tensor)
    copied = sharding.make_mesh(*fitting[-1], *given)  # sorted: most copies, least fsdp
    state = state_bytes(config, copied)
    chosen = _choose(config, fitting, _linked(found), memory / state)
    mesh = copied if chosen == fitting[-1] else sharding.make_mesh(*chosen, *given)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return Choice(
        mesh,
        f"mesh: {shape}, chosen for {len(found)} devices with {memory / GIB:.1f} GiB each and a "
        f"training state of {state / GIB:.2g} GiB (--config.mesh.fsdp and .tensor override it)",
    )


def _fitting(config: Config, count: int) -> list[Shape]:
    """The shapes (data, fsdp, tensor) of `count` devices that agree with the explicit sizes; among
    them, if there are any, those that split the batch and the attention heads evenly."""
    wanted = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    shapes = [(count // (f * t), f, t) for t in divisors for f in divisors if count % (f * t) == 0]
    shapes = [s for s in shapes if all(w < 1 or w == size for w, size in zip(wanted, s))]
    if wanted.count(-1) > 1:
        return []  # make_mesh refuses it
    rows = math.gcd(*batch_schedule.sizes(config))
    unit = config.accumulate_steps * config.text_parts
    even = [
        (d, f, t) for d, f, t in shapes if rows % (d * f * unit) == 0 and not _heads(config) % t
    ]
    return even or shapes


def _choose(config: Config, fitting: list[Shape], linked: int, copies: float) -> Shape:
    """One of the shapes. copies: of the training state, that one device's memory would hold."""
    if copies >= 1 / COPY_SHARE:
        return max(fitting)  # most copies
    even = [(d, f, t) for d, f, t in fitting if linked % (f * t) == 0 and _heads(config) % f == 0]
    data, fsdp, tensor = max(even or fitting, key=lambda shape: shape[1])
    if copies * fsdp * tensor < 1 / MOST_SHARE:
        return max(fitting, key=lambda shape: shape[1])
    return data, fsdp, tensor


def _heads(config: Config) -> int:
    """The number that divides the attention heads of all towers."""
    model = config.model
    text = (model.text.num_heads, model.text.multimodal_heads, model.text.kv_heads)
    return math.gcd(model.image.num_heads, model.pooler.num_heads, *text)


def _linked(devices: Sequence[Any]) -> int:
    """How many devices share fast links: the GPUs of a node, the chips of a TPU slice, all CPUs."""
    return min(Counter(getattr(device, "slice_index", 0) for device in devices).values())


def state_bytes(config: Config, mesh: Mesh) -> int:
    """Bytes of one copy of the parameters, the optimizer's state and the gradients, the gradients in
    the model's dtype where that is smaller."""
    state = state_shardings(build_model(config, mesh, 2 if config.head.kind else 0), config, mesh)[
        0
    ]
    width = np.dtype(config.model.dtype).itemsize
    gradients = jax.tree.leaves(trainable(state.params, config))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) + sum(
        x.size * min(width, x.dtype.itemsize) for x in gradients
    )
