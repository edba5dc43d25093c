"""Compiles a config's train step for a TPU slice without the slice, and says what it would cost.

`python -m coca_jax.compile --config=configs/coca_2b.py --topology=v4:8x16x16` runs the real TPU
compiler (the package `libtpu`) on this machine's CPU for the very step that `train` runs. All times
are estimates: the compiler's own `estimated_cycles`, summed over the optimised program, and a bound
for collectives from link bandwidth. `--topology=cpu:8` compiles for simulated CPU devices, which
have no cycle estimates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from coca_jax import cli, hlo_cost, kernel_cost, partitioning, recipes, run_config, train_step
from coca_jax.data import batches
from coca_jax.data.mixture import head_classes
from coca_jax.models import coca

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation: memory, peak, clock, one-way bandwidth of one inter-chip link.

    Clocks other than v4's and bandwidths are not checked against a source.

    name: of libtpu's topology. hertz: clock. peak: bfloat16 FLOP/s. hbm: bytes. link: bytes/s.
    stream: bytes/s of the memory. cores: that one device's program runs on. smallest: the topology
    of its smallest slice, such as 2x2x1.
    """

    name: str
    hertz: float
    peak: float
    hbm: float
    link: float
    stream: float
    cores: int
    smallest: str
    options: tuple[tuple[str, Any], ...] = ()


MEGACORE = (("chip_config_name", "megacore"),)
CHIPS = {
    "v4": Chip("v4", 1.05e9, 275e12, 32 * GIB, 4.5e10, 1.2e12, 2, "2x2x1", MEGACORE),
    "v5e": Chip("v5e", 1.5e9, 197e12, 16 * GIB, 4.5e10, 8.1e11, 1, "2x2"),
    "v5p": Chip("v5", 1.75e9, 459e12, 95 * GIB, 9e10, 2.7e12, 2, "2x2x1", MEGACORE),
    "v6e": Chip("v6e", 1.75e9, 918e12, 32 * GIB, 9e10, 1.6e12, 1, "2x2"),
}


def model_flops(model: ConfigDict) -> int:
    """Floating-point operations of one forward pass over one pair, a multiply-add being two.

    Matrix products only, attention over all keys, as CoCa's arithmetic is usually given: 708.9
    GFLOP for the 2.1B model at 288 pixels and 64 tokens. A training step is three times that.
    """
    image, text, pooler = model.image, model.text, model.pooler
    num_patches = (model.image_size // model.patch_size) ** 2
    tokens = num_patches + int(image.get("class_token", False))
    length, queries = text.max_len, pooler.num_queries

    def attention(n: int, m: int, width: int, source: int | None = None) -> int:
        source = width if source is None else source
        return 2 * (2 * n * width**2 + 2 * m * source * width + 2 * n * m * width)

    def mlp(n: int, width: int, dim: int) -> int:
        return 4 * n * width * dim

    patch = 2 * num_patches * model.patch_size**2 * 3 * image.width
    encoder = image.depth * (
        attention(tokens, tokens, image.width) + mlp(tokens, image.width, image.mlp_dim)
    )
    pooled = attention(queries, tokens, text.width, image.width)
    if pooler.kind == "cascade":
        pooled += attention(1, queries, text.width)
    elif pooler.kind == "parallel":
        pooled += attention(1, tokens, text.width, image.width)
    with_cls = length + 1
    unimodal = text.unimodal_depth * (
        attention(with_cls, with_cls, text.width) + mlp(with_cls, text.width, text.mlp_dim)
    )
    seen = queries - (pooler.kind == "open_clip")
    multimodal_dim = text.get("multimodal_mlp_dim", None) or text.mlp_dim
    mlps = 2 if text.get("cross", "paper") == "open_clip" else 1
    multimodal = text.multimodal_depth * (
        attention(length, length, text.width)
        + attention(length, seen, text.width)
        + mlps * mlp(length, text.width, multimodal_dim)
    )
    softmax = 2 * length * text.width * text.vocab_size
    joint = 2 * 2 * text.width * model.embed_dim
    return patch + encoder + pooled + unimodal + multimodal + softmax + joint


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices to compile for: `chip` is None for simulated CPU devices."""

    devices: Sequence[Any]
    shape: tuple[int, ...]
    chip: Chip | None


def get_slice(topology: str) -> Slice:
    """'v4:8x16x16' or 'cpu:8' -> devices to compile for.

    Raises ValueError for an unknown chip or shape, or where libtpu is missing.
    """
    name, _, size = topology.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", size):
        raise ValueError(f"--topology={topology!r}; write it as v4:8x16x16, v5e:16x16 or cpu:8")
    shape = tuple(int(n) for n in size.split("x"))
    count = int(np.prod(shape))
    if name == "cpu":
        if len(jax.devices()) < count:
            raise ValueError(
                f"--topology={topology} needs {count} CPU devices but jax started with "
                f"{len(jax.devices())}; set XLA_FLAGS=--xla_force_host_platform_device_count="
                f"{count}"
            )
        return Slice(jax.devices()[:count], shape, None)
    if name not in CHIPS:
        raise ValueError(f"--topology={topology!r}: unknown chip; choose from {list(CHIPS)} or cpu")
    from jax.experimental import topologies

    chip = CHIPS[name]
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.name}:{size}", **dict(chip.options)
        )
    except Exception as error:  # the plugin raises its own kinds
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"--topology={topology}: {lines[0]}; is the shape one that this chip comes in, and is "
            "libtpu installed (pip install libtpu)?"
        ) from None
    return Slice(description.devices, shape, chip)


def build_step(config: ConfigDict, mesh: Mesh) -> tuple[Any, tuple[Any, Any]]:
    """(jitted train step, its abstract arguments) exactly as `train` makes them."""
    model = coca.build(
        config.model,
        remat=config.remat,
        sigmoid=config.loss.contrastive == "sigmoid",
        platform=mesh.devices.flat[0].platform,
        head=config.head,
        num_classes=len(head_classes(config)),
    )
    abstract, shardings = train_step.state_shardings(model, config, mesh)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    step = train_step.make_train_step(model, config, config.steps or 1_000_000)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted, (state, abstract_batch(config, mesh))


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one global batch, split over data x fsdp."""
    sharding = NamedSharding(mesh, partitioning.spec("batch"))
    return {
        name: jax.ShapeDtypeStruct(
            (config.batch_size, *field.shape), np.dtype(field.dtype), sharding=sharding
        )
        for name, field in batches.fields(config).items()
        if field.trains
    }


def collective_seconds(
    collective: hlo_cost.Collective, shape: tuple[int, ...], link: float
) -> float:
    """A lower bound for one run of a collective: a ring both ways along as many axes of the torus
    as its group needs, each link at full speed."""
    axes, reach = 1, max(shape)
    for size in sorted(shape, reverse=True)[1:]:
        if reach >= collective.group:
            break
        axes, reach = axes + 1, reach * size
    share = (collective.group - 1) / collective.group
    speed = 2 * axes * link
    if collective.kind == "all-reduce":
        return 2 * collective.bytes * share / speed
    if collective.kind == "reduce-scatter":
        return collective.bytes * (collective.group - 1) / speed
    if collective.kind == "collective-permute":
        return collective.bytes / link
    return collective.bytes * share / speed


def place(op_name: str) -> str:
    """'jit(train_step)/transpose(jvp(CoCa))/.../mlp/in/dot_general' -> 'backward  ...mlp/in'."""
    if "rematted_computation" in op_name:
        kind = "recompute"
    elif "transpose(" in op_name:
        kind = "backward"
    elif "jvp(" in op_name:
        kind = "forward"
    else:
        kind = "update"
    parts = [
        p
        for p in op_name.split("/")
        if p
        not in ("while", "body", "closed_call", "checkpoint", "rematted_computation", "shard_map")
        and not p.startswith(("jit(", "jvp(", "transpose(", "CoCa.", "text_decoder."))
    ]
    return f"{kind:9s} {'/'.join(parts[:-1]) or (parts[-1] if parts else 'other')}"


def analyse(
    config: ConfigDict, slice_: Slice, compiled: Any, text: str, params: int
) -> dict[str, Any]:
    """The numbers of the report from a compiled step and its optimised HLO."""
    devices = len(slice_.devices)
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    total = arguments + temporaries + outputs + code
    cost = hlo_cost.summarise(text, devices)
    counted = compiled.cost_analysis() or {}
    forward = model_flops(config.model)
    per_device = 3 * forward * config.batch_size / devices
    result: dict[str, Any] = {
        "devices": devices,
        "params": params,
        "batch_size": config.batch_size,
        "bytes_per_device": {
            "arguments": arguments,
            "temporaries": temporaries,
            "outputs": outputs,
            "code": code,
            "total": total,
        },
        "model_flops_per_pair": 3 * forward,
        "model_flops_per_device": per_device,
        "compiled_flops_loops_once": counted.get("flops"),
    }
    kinds: dict[str, float] = {}
    for c in cost.collectives:
        kinds[c.kind] = kinds.get(c.kind, 0) + c.bytes * c.runs
    result["collective_bytes"] = kinds
    result["loops_of_unknown_length"] = len(cost.unknown_loops)
    chip = slice_.chip
    if chip is None:
        return result | {"fits": True}
    by_kernel = kernel_cycles(cost, chip)
    compute = (cost.cycles + sum(by_kernel.values())) / chip.hertz
    links = sum(collective_seconds(c, slice_.shape, chip.link) * c.runs for c in cost.collectives)
    ideal = per_device / chip.peak
    result |= {
        "estimated_cycles": cost.cycles,
        "kernel_cycles": sum(by_kernel.values()),
        "cycles_by_kernel": by_kernel,
        "estimated_compute_seconds": compute,
        "collective_bound_seconds": links,
        "estimated_step_seconds": max(compute, links),
        "estimated_mfu_compute_only": ideal / compute if compute else 0.0,
        "estimated_mfu": ideal / max(compute, links) if compute else 0.0,
        "estimated_mfu_no_overlap": ideal / (compute + links) if compute else 0.0,
        "hbm_bytes": chip.hbm,
        "hbm_share": total / chip.hbm,
        "fits": total <= chip.hbm,
    }
    result["costliest"] = costliest(cost, flags.FLAGS.top if flags.FLAGS.is_parsed() else 25)
    return result


def kernel_cycles(cost: hlo_cost.Cost, chip: Chip) -> dict[str, int]:
    """Cycles a step of each kernel: its scheduled instructions for every row of the batch, shared
    by the cores, or the time to stream its operands and results, whichever is more."""
    distinct = sorted({(name, types) for name, types, _ in cost.kernels})
    counts = kernel_cost.bundles(
        f"{chip.name}:{chip.smallest}", dict(chip.options), [(n, list(t)) for n, t in distinct]
    )
    bundles = dict(zip(distinct, counts))
    total: dict[str, int] = {}
    for name, types, runs in cost.kernels:
        steps, moved = kernel_cost.work(name, list(types))
        cycles = bundles[name, types] * -(-steps // chip.cores)
        cycles = max(cycles, round(moved / chip.stream * chip.hertz))
        sizes = [kernel_cost.parse(t)[1][-2] for t in types if t.startswith("bf16")]
        label = f"{name} {sizes[0]} x {sizes[1]}"
        total[label] = total.get(label, 0) + cycles * runs
    return total


def costliest(cost: hlo_cost.Cost, rows: int) -> list[tuple[str, float]]:
    """(where, share of all cycles) of the operations that cost most, the same places added up."""
    places: dict[str, int] = {}
    for name, cycles in cost.by_op.items():
        places[place(name)] = places.get(place(name), 0) + cycles
    ranked = sorted(places.items(), key=lambda x: -x[1])[:rows]
    return [(where, cycles / max(1, cost.cycles)) for where, cycles in ranked]


def show(result: dict[str, Any]) -> None:
    """Prints the table for people."""
    memory = result["bytes_per_device"]
    line = "  ".join(f"{k} {v / GIB:.2f}" for k, v in memory.items())
    print(f"devices {result['devices']}, parameters {result['params'] / 1e6:.1f}M")
    print(f"GiB per device: {line}")
    print(
        f"model TFLOP: {result['model_flops_per_pair'] / 1e12:.4f} per pair, "
        f"{result['model_flops_per_device'] / 1e12:.2f} per device and step"
    )
    for kind, size in sorted(result["collective_bytes"].items()):
        print(f"  {kind:20s} {size / GIB:8.3f} GiB per device and step")
    if "estimated_cycles" not in result:
        return
    print(f"share of HBM {result['hbm_share']:.1%}; {'fits' if result['fits'] else 'DOES NOT FIT'}")
    print("The compiler's estimate, not a measurement:")
    print(
        f"  {result['estimated_cycles'] / 1e6:.1f}M cycles, and "
        f"{result['kernel_cycles'] / 1e6:.1f}M of scheduled instructions of kernels = "
        f"{result['estimated_compute_seconds']:.4f} s compute, "
        f"MFU {result['estimated_mfu_compute_only']:.1%} compute only"
    )
    print(
        f"  collectives at least {result['collective_bound_seconds']:.4f} s at full link speed; "
        f"step {result['estimated_step_seconds']:.4f} s if they overlap, "
        f"MFU {result['estimated_mfu']:.1%} ({result['estimated_mfu_no_overlap']:.1%} if not)"
    )
    for kernel, cycles in sorted(result["cycles_by_kernel"].items(), key=lambda x: -x[1]):
        print(f"    {cycles / 1e6:6.2f}M  {kernel}")
    print("costliest places outside kernels:")
    for where, share in result["costliest"]:
        print(f"  {share:6.1%}  {where}")


@contextlib.contextmanager
def quiet_plugin() -> Iterator[None]:
    """Settings for libtpu on a machine without a TPU; they must stand before it is loaded."""
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    old = {k: os.environ.get(k) for k in settings}
    os.environ.update({k: v for k, v in settings.items() if k not in os.environ})
    try:
        yield
    finally:
        for key, value in old.items():
            if value is None:
                os.environ.pop(key, None)


def optimised_text(compiled: Any, folder: str) -> str:
    """The optimised HLO with the compiler's estimates.

    folder: what the compiler has dumped there is read where jaxlib cannot parse the program that
    it gets back: on chips with a SparseCore, gathers that are moved to it.
    """
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        files = list(pathlib.Path(folder).glob("*jit_train_step*after_codegen.txt"))
        if len(files) != 1:
            raise
        return files[0].read_text()


def compile_step(config: ConfigDict, topology: str, dump_hlo: str = "") -> dict[str, Any]:
    """Compiles and analyses; see the module's docstring. Raises ValueError for bad input."""
    config = config.copy_and_resolve_references()
    run_config.check(config)
    with quiet_plugin(), tempfile.TemporaryDirectory() as folder:
        slice_ = get_slice(topology)
        mesh = partitioning.make_mesh(**config.mesh, devices=slice_.devices)
        run_config.check_batch(config, partitioning.batch_parts(mesh), 1)
        with jax.set_mesh(mesh):
            step, (state, batch) = build_step(config, mesh)
            params = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state.params))
            start = time.perf_counter()
            lowered = step.lower(state, batch)
            options: dict[str, Any] = {}
            if slice_.chip is not None:
                options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            try:
                compiled = lowered.compile(compiler_options=options)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                needs = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", str(error))
                print(f"does not fit: {needs[0] if needs else str(error).splitlines()[0]}")
                return {"topology": topology, "devices": mesh.size, "params": params, "fits": False}
        seconds = time.perf_counter() - start
        text = optimised_text(compiled, folder)
    if dump_hlo:
        pathlib.Path(dump_hlo).write_text(text)
    mesh_shape = dict(mesh.shape)
    return {
        "topology": topology,
        "mesh": mesh_shape,
        "compile_seconds": round(seconds, 1),
    } | analyse(config, slice_, compiled, text, params)


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    recipes.define_flag()
    flags.DEFINE_string(
        "topology", None, "Chips, as v4:8x16x16, v5e:16x16, v5p:8x8x8, v6e:16x16, or cpu:8."
    )
    flags.DEFINE_string("dump_hlo", "", "File for the optimised HLO text.")
    flags.DEFINE_integer("top", 25, "Rows of the table of costliest operations.")


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry: exit status 1 when the step does not fit."""
    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}; options are --config and --topology")
    if flags.FLAGS.config is None or flags.FLAGS.topology is None:
        raise ValueError("give --config=NAME and --topology=v4:8x16x16 (or cpu:8)")
    prepare_platform(flags.FLAGS.topology)
    result = compile_step(flags.FLAGS.config, flags.FLAGS.topology, flags.FLAGS.dump_hlo)
    if "bytes_per_device" in result:
        show(result)
    if not result["fits"]:
        print(json.dumps(result), flush=True)
        sys.exit(1)
    return result


def prepare_platform(topology: str) -> None:
    """Compiling needs no accelerator: keeps jax on the CPU, with enough devices for cpu:N.

    jax reads both settings when it looks for devices, which is later than this.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    match = re.fullmatch(r"cpu:(\d+(?:x\d+)*)", topology)
    if match:
        count = int(np.prod([int(n) for n in match[1].split("x")]))
        flag = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    cli.command("compile")
