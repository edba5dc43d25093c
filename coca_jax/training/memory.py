"""Whether a train step fits the memory, asked of the compiler before anything large is made.

A compiled program knows its bytes: arguments (parameters, optimizer, batch), temporaries, outputs.
The compiler finds them out early and then spends its time on fast code, so that the question costs
a fraction of a compilation; it is asked only where a bound from above does not fit by itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import coca_jax
from coca_jax import ops as operations
from coca_jax.config import Config, typed
from coca_jax.data import batch_schedule
from coca_jax.data.mixture import head_classes
from coca_jax.parallel import sharding
from coca_jax.runtime import cache_folder, device_memory, storage
from coca_jax.training import auto_mesh
from coca_jax.training.programs import abstract_batch, build_step
from coca_jax.training.state import of_state, trainable

# On a CPU: the same buffers, code that nobody runs. Other compilers take no such options.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
GIB = 2**30
KEPT, MOST_KEPT = "step_bytes.json", 100  # a file of the cache folder, and its entries


def step_bytes(config: Config, mesh: Mesh) -> int:
    """Bytes that the train step of `config` takes on one device, as the compiler counts them.

    Raises jax.errors.JaxRuntimeError where the compiler refuses it.
    """
    with jax.set_mesh(mesh):
        step, arguments = build_step(config, mesh)
        platform = mesh.devices.flat[0].platform
        options = operations.compiler_options(platform, mesh.size) | (
            QUICK if platform == "cpu" else {}
        )
        compiled = step.lower(*arguments).compile(compiler_options=options)
    found = compiled.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + outputs


def bounds(config: Config, mesh: Mesh) -> tuple[int, int]:
    """(what a step needs at least, at most) of one device in bytes, without compiling.

    At most: its arguments and every array that the traced step ever makes, a loop's as often as it
    runs.
    """
    with jax.set_mesh(mesh):
        step, arguments = build_step(config, mesh)
        made = _made(jax.make_jaxpr(step)(*arguments).jaxpr)
    return least(config, mesh), made + sum(_bytes(x) for x in jax.tree.leaves(arguments))


def least(config: Config, mesh: Mesh) -> int:
    """What a step needs at least of one device in bytes, without a trace: the state, the batch and
    the gradients of what is trained, in the model's dtype where that is smaller, spread evenly."""
    with jax.set_mesh(mesh):
        arguments = build_step(config, mesh)[1]
    argument_bytes = sum(_bytes(x) for x in jax.tree.leaves(arguments))
    width = np.dtype(config.model.dtype).itemsize  # in which the compiler may keep them
    trained = jax.tree.leaves(trainable(arguments[0].params, typed(config)))
    gradients = sum(x.size * min(width, x.dtype.itemsize) for x in trained)
    return (argument_bytes + gradients) // mesh.size


def cached_bounds(config: Config, mesh: Mesh) -> tuple[int, int]:
    """`bounds`, kept in the cache folder from start to start: a trace of the step takes a third of
    the time that a small run needs to go on."""
    file, key = cache_folder.folder() / KEPT, _key(config, mesh)
    cached: dict[str, list[int]] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or damaged
        cached = dict(json.loads(file.read_text()))
        low, high = cached[key]
        return int(low), int(high)
    cached[key] = list(bounds(config, mesh))
    with contextlib.suppress(OSError):  # it is for the next start only
        newest = dict(list(cached.items())[-MOST_KEPT:])
        storage.write_text(file, json.dumps(newest, indent=0))
    return cached[key][0], cached[key][1]


def _key(config: Config, mesh: Mesh) -> str:
    """Of all that a step's bounds follow from, this package's own sources included."""
    platform = mesh.devices.flat[0].platform
    classes = len(head_classes(config))
    parts = (config.remat, config.accumulate_steps, config.text_parts)
    model = (repr(of_state(config).config), *parts, classes)
    batch = {name: (x.shape, str(x.dtype)) for name, x in abstract_batch(config, mesh).items()}
    known = (jax.__version__, _sources(), platform, dict(mesh.shape), model, batch)
    return hashlib.sha256(repr(known).encode()).hexdigest()


@functools.cache  # what this process runs by
def _sources() -> list[tuple[str, int, int]]:
    """Name, time of change and size of each file of this package."""
    files = sorted(pathlib.Path(coca_jax.__file__).parent.rglob("*.py"))
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]


def _bytes(x: Any) -> int:
    return int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize


def _made(jaxpr: Any) -> int:
    """Bytes of all that a program makes."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * _made(inner)
        for out in equation.outvars:
            if hasattr(out.aval, "shape") and hasattr(out.aval.dtype, "itemsize"):
                total += int(np.prod(out.aval.shape)) * out.aval.dtype.itemsize
    return total


def check(config: Config, mesh: Mesh, say: Callable[[str], None]) -> None:
    """Raises ValueError where a step, of the largest batch, does not fit, with settings that do.

    say: takes a line before what lasts.
    """
    line, fits = problem(config, mesh, say)
    if line and not fits:
        raise ValueError(
            f"{line}; not even the smallest batch fits: take a smaller model or more devices"
        )
    if line:
        raise ValueError(
            f"{line}; what fits: {' '.join(f'--config.{k}={v}' for k, v in fits.items())}"
        )


def problem(config: Config, mesh: Mesh, say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """(what is wrong with the memory of a step of the largest batch, settings that fit); an empty
    line where nothing is. say: as of `check`."""
    room = device_memory.available()
    if config.batch_sizes:
        config = config.change({"batch_size": max(batch_schedule.sizes(config)), "batch_sizes": ()})
    need, most = cached_bounds(config, mesh)
    if most <= room:
        return "", {}
    if need <= room:
        say("asking the compiler whether a step fits the memory ...")
        need = _bytes_or_all(config, mesh)
        if need <= room:
            return "", {}
    say("a step does not fit the memory; looking for settings that do ...")
    line = (
        f"a step of batch_size={config.batch_size} needs {need / GIB:.1f} GiB and "
        f"{mesh.devices.flat[0].platform} has {room / GIB:.1f} GiB free on a device"
    )
    return line, fitting(config, mesh, room)


def fitting(config: Config, mesh: Mesh, room: int) -> dict[str, Any]:
    """Settings by which a step fits `room` bytes, checked by the compiler: remat='named' and the
    fewest accumulate_steps, which compute the same; else the largest batch_size; {} for nothing."""
    unit = sharding.batch_parts(mesh) * config.text_parts
    rows = config.batch_size // unit
    if least(config.change(dict(batch_size=unit, accumulate_steps=1)), mesh) > room:
        return {}
    # Memory grows with the rows that are computed at a time: two points give the line.
    few = max(1, rows // 16)
    tried = config.change(dict(remat="named", batch_size=few * unit, accumulate_steps=1))
    base = _bytes_or_all(tried, mesh)
    if base > room and few > 1:
        few, tried = 1, tried.change(dict(batch_size=unit))
        base = _bytes_or_all(tried, mesh)
    if base > room:
        return {}
    with_state = least(tried, mesh)
    each = max(1, (base - with_state) // few)
    at_a_time = max(1, min(rows, int(0.9 * (room - with_state) / each)))
    while at_a_time:
        divisors = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= at_a_time]
        whole = config.change(dict(remat="named", accumulate_steps=divisors[0]))
        if divisors[0] < rows or rows == 1:
            if _bytes_or_all(whole, mesh) <= room:
                return dict(remat="named", accumulate_steps=divisors[0])
        tried = tried.change(dict(batch_size=at_a_time * unit))
        if _bytes_or_all(tried, mesh) <= room:
            return dict(remat="named", batch_size=at_a_time * unit)
        at_a_time //= 2
    return {}


@contextlib.contextmanager
def explained(config: Config, mesh: Mesh) -> Iterator[None]:
    """Turns the error of a step that runs out of memory inside into a ValueError with advice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"out of memory in a step of batch_size={config.batch_size} "
            f"({str(error).splitlines()[0]}); give {less(config, mesh)}"
        ) from None


def less(config: Config, mesh: Mesh) -> str:
    """Flags of the same run in less memory: at least twice as many micro-batches, if the batches
    split into these, and remat."""
    rows = math.gcd(*batch_schedule.sizes(config)) // (
        sharding.batch_parts(mesh) * config.text_parts
    )
    more = (n for n in range(2 * config.accumulate_steps, rows + 1) if rows % n == 0)
    parts = "".join(f"--config.accumulate_steps={n} " for n in [*more][:1])
    return f"{parts}--config.remat=named, or a smaller batch_size"


def _bytes_or_all(config: Config, mesh: Mesh) -> int:
    """`step_bytes`, or more than there is where the compiler itself runs out of the device's."""
    try:
        return step_bytes(config, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return 2**62


def needed(config: Config) -> int:
    """Bytes that a step takes on one of this machine's devices: the bound from above where that
    fits, for it costs no compilation, else what the compiler counts."""
    mesh = auto_mesh.make(config).mesh
    most = cached_bounds(config, mesh)[1]
    return most if most <= device_memory.available() // 2 else _bytes_or_all(config, mesh)
