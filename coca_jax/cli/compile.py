"""Compiles a config's train step for chips that are not here, and says what it would cost.

For a TPU this runs the real TPU compiler (the package `libtpu`) on this machine's CPU for the very
step that `train` runs, for NVIDIA GPUs XLA's compiler (jax-cuda12-plugin). All times are estimates:
of a TPU the compiler's own schedule and `estimated_cycles`, summed over the optimised program, of a
GPU a roofline of its kernels, and a bound for collectives from link bandwidth. `--topology=cpu:8`
compiles for simulated CPU devices, which have no estimates. The exit status is 1 where the step
does not fit in memory.

Examples:
  coca-jax compile --config=coca_2b --topology=v4:8x16x16
  coca-jax compile --config=coca_base --topology=h100:8 --config.batch_size=512
  coca-jax compile --config=coca_base --topology=cpu:8 --config.batch_size=64
  coca-jax compile --config=coca_2b --topology=v4:8x16x16 --hosts=512 --save_seconds=20
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from coca_jax.cli import main as cli
from coca_jax.runtime import goodput, storage
from coca_jax.training import recipes

GIB = 2**30


def show(result: dict[str, Any], rows: int) -> None:
    """Prints the table for people, with so many rows of costliest places."""
    memory = result["bytes_per_device"]
    line = "  ".join(f"{k} {three_digits(v / GIB)}" for k, v in memory.items())
    print(f"devices {result['devices']}, parameters {result['params'] / 1e6:.1f}M")
    print(f"GiB per device: {line}")
    print(
        f"model TFLOP: {three_digits(result['model_flops_per_pair'] / 1e12)} per pair, "
        f"{three_digits(result['model_flops_per_device'] / 1e12)} per device and step"
    )
    for kind, size in sorted(result["collective_bytes"].items()):
        print(f"  {kind:20s} {three_digits(size / GIB):>8} GiB per device and step")
    if "hbm_share" not in result:
        return
    print(f"share of HBM {result['hbm_share']:.1%}; {'fits' if result['fits'] else 'DOES NOT FIT'}")
    if "roofline_mfu" in result:
        show_gpu(result)
    else:
        show_tpu(result)
    for where, share in result["costliest"][:rows]:
        print(f"  {share:6.1%}  {where}")


def three_digits(number: float) -> str:
    """With at least three that say something, however small the model."""
    return f"{number:.3g}" if number < 999 else f"{number:,.0f}"


def show_tpu(result: dict[str, Any]) -> None:
    """The compiler's cycles."""
    print("The compiler's schedule, not a measurement:")
    print(
        f"  {result['scheduled_cycles'] / 1e6:.1f}M cycles (its own estimated_cycles: "
        f"{result['estimated_cycles'] / 1e6:.1f}M, of which {result['scheduled_share']:.0%} have a "
        f"schedule), and {result['kernel_cycles'] / 1e6:.1f}M of kernels = "
        f"{result['estimated_compute_seconds']:.4f} s compute, "
        f"MFU {result['estimated_mfu_compute_only']:.1%} compute only "
        f"({result['mfu_compute_only_by_estimated_cycles']:.1%} by estimated_cycles)"
    )
    print(
        f"  {result['collectives']} collectives "
        f"({result['asynchronous_collectives']} asynchronous) at least "
        f"{result['collective_bound_seconds']:.4f} s at full link speed, of which the "
        f"schedule leaves {result['exposed_collective_seconds']:.4f} s exposed"
    )
    print(
        f"  MFU {result['estimated_mfu_no_overlap']:.1%} to {result['estimated_mfu']:.1%}, "
        f"{result['estimated_mfu_by_schedule']:.1%} by the schedule: if none of them overlaps, if "
        "all do, if they overlap with what stands between their start and their end"
    )
    for kernel, cycles in sorted(result["cycles_by_kernel"].items(), key=lambda x: -x[1]):
        print(f"    {cycles / 1e6:6.2f}M  {kernel}")
    print("costliest places outside kernels:")


def show_gpu(result: dict[str, Any]) -> None:
    """The roofline."""
    print("A roofline of the compiled kernels, a bound and not a measurement:")
    print(
        f"  {result['kernels']} kernels move {result['memory_traffic_bytes'] / 1e9:.1f} GB: "
        f"{result['roofline_compute_seconds']:.4f} s, "
        f"MFU at most {result['roofline_mfu_compute_only']:.1%}"
    )
    if result["collectives"]:
        print(
            f"  {result['collectives']} collectives ({result['asynchronous_collectives']} "
            f"asynchronous) at least {result['collective_bound_seconds']:.4f} s; step "
            f"{result['roofline_step_seconds']:.4f} s if they overlap, MFU at most "
            f"{result['roofline_mfu']:.1%} ({result['roofline_mfu_no_overlap']:.1%} if not)"
        )
    print("costliest places:")


def show_goodput() -> dict[str, Any]:
    """What is left for steps on so many hosts, which fail now and then."""
    given = flags.FLAGS
    found = goodput.estimate(
        given.hosts, given.host_hours, given.save_seconds, given.restart_seconds
    )
    print(
        f"{given.hosts} host(s) fail every {found['hours_between_failures']:.1f} h: with a save "
        f"every {found['checkpoint_seconds'] / 60:.1f} min (checkpoint.every=auto) steps that "
        f"count have {found['expected_goodput']:.1%} of the time by Daly's formula, "
        f"{found['simulated_goodput']:.1%} in a simulation"
        if "simulated_goodput" in found
        else f"{given.hosts} hosts fail too often to train"
    )
    return found


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    recipes.define_flag()
    flags.DEFINE_string(
        "topology",
        None,
        "Chips, as v4:8x16x16, v5e:16x16, v5p:8x8x8, v6e:16x16, v7x:8x8x8, h100:8, h200:8, a100:8 "
        "or cpu:8.",
    )
    flags.DEFINE_string("dump_hlo", "", "File for the optimised HLO text.")
    flags.DEFINE_integer("hosts", 0, "Hosts of the run: says the goodput to expect; 0: does not.")
    flags.DEFINE_float(
        "host_hours",
        round(goodput.HOST_HOURS),
        "Mean hours between failures of one host; the default: Llama 3's.",
    )
    flags.DEFINE_float("save_seconds", 10.0, "That a save holds the steps up, for --hosts.")
    flags.DEFINE_float("restart_seconds", 300.0, "From a failure to the next step, for --hosts.")
    flags.DEFINE_integer("top", 25, "Rows of the table of costliest operations.", 0)


def summary(result: dict[str, Any]) -> list[str]:
    """Nothing more than the tables that are printed before."""
    del result
    return []


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry: exit status 1 when the step does not fit."""
    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}; give --config={argv[1]}")
    check_goodput()
    if flags.FLAGS.config is None or flags.FLAGS.topology is None:
        raise ValueError("give --config=NAME and --topology=v4:8x16x16 (or cpu:8)")
    check_hosts(flags.FLAGS.topology, flags.FLAGS.hosts)
    if not flags.FLAGS.hosts:
        cli.refuse_given(("host_hours", "save_seconds", "restart_seconds"), "it is for --hosts")
    if flags.FLAGS.dump_hlo:
        check_file(flags.FLAGS.dump_hlo)
    prepare_platform(flags.FLAGS.topology)
    cli.say(f"compiling for {flags.FLAGS.topology}: minutes for a large model on many chips")
    from coca_jax.estimate import compiled

    result = compiled.compile_step(flags.FLAGS.config, flags.FLAGS.topology, flags.FLAGS.dump_hlo)
    if "bytes_per_device" in result:
        show(result, flags.FLAGS.top)
    if flags.FLAGS.hosts:
        result |= show_goodput()
    if not result["fits"]:
        cli.show(result, summary(result))
        sys.exit(1)
    return result


def check_goodput() -> None:
    """Raises ValueError for numbers of --hosts and its like that cannot be."""
    given = flags.FLAGS
    if given.hosts < 0:
        raise ValueError(f"--hosts={given.hosts}: give a number of hosts, or 0")
    for name in ("host_hours", "save_seconds", "restart_seconds"):
        value = given[name].value
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name}={value}: give a number above 0")


def check_file(name: str) -> None:
    """Raises ValueError where --dump_hlo is no name of a file that can be written: before minutes
    of compiling."""
    path = storage.place(name)
    if name.endswith("/") or (not storage.is_remote(path) and path.is_dir()):
        raise ValueError(f"--dump_hlo={name} is a folder; give a file in it")
    storage.check_writable(path.parent, make=False)


def check_hosts(topology: str, hosts: int) -> None:
    """Raises ValueError for more hosts than chips; what is no topology has its own words later."""
    match = re.fullmatch(r"\w+:(\d+(?:x\d+)*)", topology)
    chips = math.prod(int(n) for n in match[1].split("x")) if match else hosts
    if hosts > chips:
        raise ValueError(
            f"--hosts={hosts} is more than the {chips} devices of --topology={topology}; give the "
            "hosts that these are on"
        )


def prepare_platform(topology: str) -> None:
    """Compiling needs no accelerator: keeps jax, which is not imported yet, on the CPU, with enough
    devices for cpu:N."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    match = re.fullmatch(r"cpu:(\d+(?:x\d+)*)", topology)
    if match:
        count = math.prod(int(n) for n in match[1].split("x"))
        flag = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


if __name__ == "__main__":
    cli.command("compile")
