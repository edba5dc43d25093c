"""What this machine is: its devices, their memory, and how fast they multiply."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.machine import cores
from coca_jax.ops.cpu import build
from coca_jax.training import memory


@dataclasses.dataclass(frozen=True)
class Machine:
    """Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    devices: how many of them.
    memory: bytes that a step may take on one of them.
    flops: floating-point operations a second of XLA's matrix products, over all of them.
    cores: processors that this process may use.
    dtype: in which models train fastest here, 'float32' or 'bfloat16'.
    """

    platform: str
    devices: int
    memory: float
    flops: float
    cores: int
    dtype: str


def look() -> Machine:
    """This machine, measured for about half a second."""
    devices = jax.local_devices()
    alone = devices[0].platform == "cpu"  # one of them has all cores
    dtype = "bfloat16" if multiplies_bfloat16(devices[0]) else "float32"
    return Machine(
        platform=devices[0].platform,
        devices=len(devices),
        memory=float(memory.available()),
        flops=matrix_flops(dtype) * (1 if alone else len(devices)),
        cores=cores.count(),
        dtype=dtype,
    )


def multiplies_bfloat16(device: Any) -> bool:
    """Whether a device has products in bfloat16: TPUs, NVIDIA's GPUs from Ampere on (compute
    capability 8.0), AMD's, and of CPUs those that say so."""
    if device.platform == "cpu":
        return build.multiplies_bfloat16()
    known = re.match(r"(\d+)\.\d", str(getattr(device, "compute_capability", "")))
    return not known or int(known[1]) >= 8


def matrix_flops(dtype: str, seconds: float = 0.4) -> float:
    """Operations a second of XLA's products of matrices on one device: 1,024 x 1,024 in float32 on
    a CPU, 8,192 x 8,192 in `dtype` elsewhere."""
    on_cpu = jax.local_devices()[0].platform == "cpu"
    side = 1024 if on_cpu else 8192
    x = jnp.ones((side, side), jnp.float32 if on_cpu else dtype)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    count, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        product(x).block_until_ready()
        count += 1
    return 2 * side**3 * count / taken
