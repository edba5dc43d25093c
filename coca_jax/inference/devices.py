"""Where a model computes: its mesh, and how rows come there and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from coca_jax.parallel import sharding as partitioning
from coca_jax.runtime import activity

WHOLE = P()


class Devices:
    """The devices of a model as one: a mesh, or the only one, where `mesh` is None; platform: what
    they are, 'cpu', 'gpu' or 'tpu'."""

    def __init__(self, mesh: Mesh | None, platform: str) -> None:
        self.mesh, self.platform = mesh, platform
        self.several_processes = mesh is not None and mesh.is_multi_process
        self._parts = partitioning.batch_parts(mesh) if mesh else 1

    @property
    def in_host_memory(self) -> bool:
        """Whether NumPy reads what lies on them, whole, without a copy over a bus or a network."""
        return self.platform == "cpu" and not self.several_processes

    def context(self) -> Any:
        """In which programs are called."""
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def jit(self, run: Callable, out_spec: Any = WHOLE) -> Callable:
        """A program whose results are whole on every device, and so on every process, unless
        out_spec says otherwise."""
        if self.mesh is None:
            return jax.jit(run)
        return jax.jit(run, out_shardings=partitioning.shardings(self.mesh, out_spec))

    def put(self, array: np.ndarray, size: int) -> Any:
        """The array with rows of zeros to `size` rows, spread over the devices."""
        activity.alive()
        array = pad(array, size)
        if self.mesh is None:
            return array
        return _spread(array, NamedSharding(self.mesh, partitioning.spec("batch")))

    def own_rows(self, count: int) -> np.ndarray:
        """Which of `count` rows the devices of this process read: bool [bucket(count)]."""
        size = self.bucket(count)
        if not self.several_processes:
            return np.ones(size, bool)
        own = np.zeros(size, bool)
        sharding = NamedSharding(cast(Mesh, self.mesh), partitioning.spec("batch"))
        for (rows,) in sharding.addressable_devices_indices_map((size,)).values():
            own[rows] = True
        return own

    def bucket(self, count: int) -> int:
        """The power of two that holds `count`, as a multiple of the devices."""
        size = 1 << max(count - 1, 0).bit_length()
        return -(-size // self._parts) * self._parts


def check(devices: Any) -> None:
    """Raises ValueError for what is no list of devices, or an empty one; None is all of them."""
    of_jax = isinstance(devices, (Sequence, np.ndarray))
    of_jax = of_jax and all(isinstance(x, jax.Device) for x in devices)
    if devices is not None and not (of_jax and len(devices)):
        raise ValueError(f"devices={devices!r}: give a list of them, as jax.devices('cpu')[:1]")


def place(params: dict, devices: Sequence[jax.Device] | None = None) -> tuple[Devices, dict]:
    """The devices that params are on, and params there: those of their mesh, else replicated over
    `devices`, by default all of this process. Raises ValueError as `check`."""
    check(devices)
    leaf = next(iter(jax.tree.leaves(params)), None)  # an ONNX encoder alone has no parameters
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
        mesh = cast(Mesh, sharding.mesh)
        return Devices(mesh, mesh.devices.flat[0].platform), params
    devices = jax.local_devices() if devices is None else list(devices)
    platform = devices[0].platform
    if len(devices) == 1:
        return Devices(None, platform), jax.device_put(params, devices[0])
    mesh = partitioning.make_mesh(len(devices), 1, 1, devices)
    whole = NamedSharding(mesh, WHOLE)
    return Devices(mesh, platform), jax.tree.map(lambda x: _spread(x, whole), params)


def pad(array: np.ndarray, size: int) -> np.ndarray:
    """Rows of zeros to `size` rows."""
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1))


def _spread(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds, or at least its rows of it, as one over their devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
