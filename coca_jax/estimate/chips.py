"""Chips to compile for that are not here: TPU slices, NVIDIA GPUs, simulated CPU devices."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src.pallas.mosaic.tpu_info import ChipVersion, get_tpu_info_for_chip

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One TPU device as a program sees it: memory, peak, clock, one-way bandwidth of a link.

    name: of libtpu's topology. hertz: clock. peak: bfloat16 FLOP/s. hbm: bytes. link: bytes/s.
    stream: bytes/s of the memory. cores: that one device's program runs on. smallest: the topology
    of its smallest slice, such as 2x2x1.
    """

    name: str
    hertz: float
    peak: float
    hbm: int
    link: float
    stream: float
    cores: int
    smallest: str
    options: tuple[tuple[str, Any], ...] = ()


def _tpu(
    version: ChipVersion, name: str, link: float, smallest: str, cores: int = 1, **options: Any
) -> Tpu:
    """Sizes and peaks from JAX's table, which is by core. It has no clock: a matrix unit of v4 and
    v5 takes a row a cycle, one of v6e and later two. Links are by the makers' pages."""
    info = get_tpu_info_for_chip(version, cores)
    rows = 2 if info.generation >= 6 else 1
    each_cycle = rows * info.num_mxus * info.mxu_column_size**2 * 2
    return Tpu(
        name=name,
        hertz=info.bf16_ops_per_second / each_cycle,
        peak=cores * info.bf16_ops_per_second,
        hbm=cores * info.hbm_capacity_bytes,
        link=link,
        stream=cores * info.mem_bw_bytes_per_second,
        cores=cores,
        smallest=smallest,
        options=tuple(options.items()),
    )


MEGACORE: dict[str, Any] = dict(cores=2, chip_config_name="megacore")
TPUS = {
    "v4": _tpu(ChipVersion.TPU_V4, "v4", 4.5e10, "2x2x1", **MEGACORE),
    "v5e": _tpu(ChipVersion.TPU_V5E, "v5e", 4.5e10, "2x2"),
    "v5p": _tpu(ChipVersion.TPU_V5P, "v5", 9e10, "2x2x1", **MEGACORE),
    "v6e": _tpu(ChipVersion.TPU_V6E, "v6e", 9e10, "2x2"),
    "v7x": _tpu(ChipVersion.TPU_7X, "tpu7x", 1e11, "2x2x1"),  # a chip is two devices
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, by its data sheet.

    name: as its driver gives it. capability: of CUDA. peak: dense bfloat16 FLOP/s. hbm: bytes that
    a program can have. stream: bytes/s of the memory. link: NVLink bytes/s each way. cores:
    multiprocessors. fpus: float32 units of each. hertz: clock. shared: bytes of shared memory of a
    multiprocessor. cache: bytes of the second level.
    """

    name: str
    capability: tuple[int, int]
    peak: float
    hbm: int
    stream: float
    link: float
    cores: int
    fpus: int
    hertz: float
    shared: int
    cache: int

    def target(self) -> str:
        """The description that XLA compiles for (its GpuTargetConfigProto, in text form)."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared - 1024}
  core_count: {self.cores} fpus_per_core: {self.fpus} clock_rate_ghz: {self.hertz / 1e9}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(self.stream)} l2_cache_size: {self.cache} device_memory_size: {self.hbm}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }} device_description_str: "{self.name}"
"""


HOPPER: dict[str, Any] = dict(
    capability=(9, 0), peak=989e12, link=4.5e11, cores=132, fpus=128, hertz=1.98e9,
    shared=233472, cache=52428800,
)  # fmt: skip
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), peak=312e12, hbm=85100068864, stream=2.039e12, link=3e11,
        cores=108, fpus=64, hertz=1.41e9, shared=167936, cache=41943040,
    ),
    "h100": Gpu("NVIDIA H100 80GB HBM3", hbm=84929347584, stream=3.352e12, **HOPPER),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", hbm=151397597184, stream=4.8e12, **HOPPER),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices to compile for: `chip` is None for simulated CPU devices."""

    devices: Sequence[Any]
    shape: tuple[int, ...]
    chip: Tpu | Gpu | None


def get_slice(topology: str) -> Slice:
    """'v4:8x16x16', 'h100:8' or 'cpu:8' -> devices to compile for.

    Raises ValueError for an unknown chip or shape, or where the compiler of its kind is missing.
    """
    name, _, size = topology.partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise ValueError(
            f"--topology={topology!r}; write it as v4:8x16x16, v5e:16x16, h100:8 or cpu:8"
        )
    shape = tuple(int(n) for n in size.split("x"))
    if name == "cpu":
        return _cpu_slice(topology, shape)
    if name in GPUS:
        return _gpu_slice(topology, shape, GPUS[name])
    if name in TPUS:
        return _tpu_slice(topology, shape, TPUS[name])
    raise ValueError(
        f"--topology={topology!r}: unknown chip; choose from {', '.join((*TPUS, *GPUS))} or cpu"
    )


def _cpu_slice(topology: str, shape: tuple[int, ...]) -> Slice:
    count = int(np.prod(shape))
    if len(jax.devices()) < count:
        raise ValueError(
            f"--topology={topology} needs {count} CPU devices but jax started with "
            f"{len(jax.devices())}; set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return Slice(jax.devices()[:count], shape, None)


def _tpu_slice(topology: str, shape: tuple[int, ...], chip: Tpu) -> Slice:
    from jax.experimental import topologies

    axes = chip.smallest.count("x") + 1
    if len(shape) != axes:
        like = "x".join("ABC"[:axes])
        raise ValueError(
            f"--topology={topology}: this chip's slices have {axes} axes; write {like}, "
            f"{chip.smallest} being the smallest"
        )
    try:
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip.name}:{'x'.join(map(str, shape))}",
            **dict(chip.options),
        )
    except Exception as error:  # the plugin raises its own kinds
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"--topology={topology}: {lines[0]}; is the shape one that this chip comes in, and is "
            "libtpu installed (pip install libtpu)?"
        ) from None
    return Slice(description.devices, shape, chip)


def _gpu_slice(topology: str, shape: tuple[int, ...], gpu: Gpu) -> Slice:
    from jax.experimental import topologies

    if len(shape) != 1:
        raise ValueError(f"--topology={topology}: give the number of GPUs, such as h100:8")
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=gpu.target(), topology=f"1x1x{shape[0]}"
        )
    except Exception as error:  # the plugin raises its own kinds
        lines = str(error).splitlines() or [type(error).__name__]
        version = jax.__version__
        raise ValueError(
            f"--topology={topology}: {lines[0]}; the compiler comes with "
            f"pip install jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
        ) from None
    return Slice(description.devices, shape, gpu)
