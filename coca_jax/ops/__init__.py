"""How the operations of the model run: one form for each platform, chosen here and nowhere else.

`reference` defines them in plain JAX; `cpu`, `gpu` and `tpu` replace what runs better otherwise on
their platform. The model (`coca_jax.models`) is written once and calls the methods of the form it
was built with. A form that does not know an option of the model steps aside for it, and says so.
"""

from __future__ import annotations

from typing import Any

from coca_jax.ops import cpu, gpu
from coca_jax.ops.cpu import Cpu
from coca_jax.ops.gpu import Gpu
from coca_jax.ops.reference import Reference
from coca_jax.ops.tpu import Tpu

IMPLEMENTATIONS = ("auto", "xla", "reference")


def compiler_options(platform: str, devices: int = 1) -> dict[str, Any]:
    """Options of XLA's compiler for a train step on so many devices of a platform."""
    if platform == "cpu":
        return cpu.compiler_options(devices)
    return gpu.COMPILER_OPTIONS if platform in ("gpu", "cuda") else {}


def choose(platform: str, implementation: str = "auto") -> Reference:
    """The form of the operations for devices of a platform.

    platform: 'cpu', 'gpu' (jax also says 'cuda' or 'rocm'), 'tpu'; of any other kind of device the
    reference.
    implementation: 'auto': what is fastest there. 'xla': the same layouts, but no kernel that XLA
    did not make itself (Pallas, cuDNN, C++). 'reference': plain JAX.
    Raises ValueError for another implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"model.implementation={implementation!r}; choose from {', '.join(IMPLEMENTATIONS)}"
        )
    kernels = implementation == "auto"
    if implementation == "reference":
        return Reference()
    if platform == "cpu":
        return Cpu(kernels=kernels)
    if platform in ("gpu", "cuda", "rocm"):
        return Gpu(cudnn=kernels and platform != "rocm")
    return Tpu(kernels=kernels) if platform == "tpu" else Reference()
