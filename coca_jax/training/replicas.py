"""Silent data corruption: devices that should hold the same values are compared by checksum.

A device that computes wrongly without an error (Hochschild et al. 2021, "Cores that don't count")
shows where arrays are kept several times: after the same update of the same gradients their bits
must be the same on every replica. What is wrong in a gradient before it is summed over the devices
reaches all of them alike and is not seen.
"""

from __future__ import annotations

import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from coca_jax.checkpoints import verify
from coca_jax.training.callbacks import Callback
from coca_jax.training.train_step import Metrics

if typing.TYPE_CHECKING:
    from coca_jax.training.trainer import Trainer


class Corrupted(RuntimeError):
    """Devices that should hold the same values do not."""


class CompareReplicas(Callback):
    """Compares replicas each config.faults.compare_every_steps steps (0: never) and before a save, so
    that what is kept was compared. Raises Corrupted on all processes where they differ.
    """

    def __init__(self, trainer: Trainer):
        self._trainer, self._every = trainer, trainer.config.faults.compare_every_steps
        self._compared = 0  # the last step that was
        self._sums: Any = None

    def after_step(self, step: int, metrics: Metrics) -> None:
        if self._every and step % self._every == 0:
            self.compare(step)

    def before_save(self, step: int) -> None:
        if self._every and self._compared != step:
            self.compare(step)

    def compare(self, step: int) -> None:
        """Compares the trainer's state, which is the one after `step`."""
        self._compared = step
        arrays = verify.by_path(self._trainer.state)
        if self._sums is None:
            self._sums = sums_on_devices(arrays, self._trainer.mesh)
        found = np.asarray(multihost_utils.process_allgather(self._sums(arrays), tiled=True))
        wrong = differing(arrays, found, self._trainer.mesh)
        if not wrong:
            return
        names = sorted({name for _, name in wrong})
        devices = sorted({device for device, _ in wrong}, key=lambda d: d.id)
        listed = ", ".join(f"{d} (process {d.process_index})" for d in devices[:8])
        more = f" and {len(names) - 1} more arrays" if len(names) > 1 else ""
        raise Corrupted(
            f"after step {step} {listed} hold(s) other values of {names[0]}{more} than the other "
            "replicas: silent data corruption. The last checkpoint was compared and stays; take "
            "the device out and run the same command to go on"
        )


def sums_on_devices(arrays: dict[str, jax.Array], mesh: Mesh) -> Any:
    """A compiled function of `arrays`: uint32 [devices, arrays], each device's own parts summed."""
    specs = {name: x.sharding.spec for name, x in arrays.items()}  # type: ignore[attr-defined]

    def own(parts: dict[str, jax.Array]) -> jax.Array:
        # By name: of a dict, jit has the values in the order of its sorted keys.
        return jnp.stack([verify.sum_of(parts[name], jnp) for name in arrays])[None]

    everywhere = P(tuple(mesh.axis_names))
    return jax.jit(
        jax.shard_map(own, mesh=mesh, in_specs=(specs,), out_specs=everywhere, check_vma=False)
    )


def differing(
    arrays: dict[str, jax.Array], sums: np.ndarray, mesh: Mesh
) -> list[tuple[jax.Device, str]]:
    """(device, name of an array) where a device's part has another checksum than most of those that
    hold the same part; all of them where there are two of each kind.

    sums: uint32 [devices of the mesh in order, arrays].
    """
    devices = list(mesh.devices.flat)
    found = []
    for column, (name, x) in enumerate(arrays.items()):
        if (sums[:, column] == sums[0, column]).all():
            continue
        parts = x.sharding.devices_indices_map(x.shape)
        groups: dict[str, list[int]] = {}
        for row, device in enumerate(devices):
            groups.setdefault(str(parts[device]), []).append(row)
        for rows in groups.values():
            values, counts = np.unique(sums[rows, column], return_counts=True)
            if len(values) == 1:
                continue
            most = values[counts.argmax()] if counts.max() * 2 > len(rows) else None
            found += [(devices[row], name) for row in rows if sums[row, column] != most]
    return found
