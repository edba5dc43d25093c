"""Times and memory of a train step with random weights, alone or beside open_clip's."""

from __future__ import annotations

import multiprocessing
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from coca_jax import partitioning, run_config, text_ends
from coca_jax.benchmarking import peer_times
from coca_jax.benchmarking.model_times import build, random_batch, timed
from coca_jax.config import Config
from coca_jax.data import files
from coca_jax.machine import compile_cache
from coca_jax.training import programs, text_lengths
from coca_jax.training.optimizer import make_schedule
from coca_jax.training.state import init_state
from coca_jax.training.step import of_step

Batch = dict[str, np.ndarray]


def train(config: Config, repeats: int, compare: bool = False, texts: str = "") -> dict[str, float]:
    """The whole train step at config.batch_size: pairs_per_second and what it comes from.

    compare: open_clip's step runs in turn with ours, on the same batches, with the same optimizer
    and weights of the losses, in bfloat16 by autocast where the model's dtype says so; then each
    once in a process of its own for its peak memory. texts: a file with a caption a line; batches
    take them in order, and the captions of ours are cut as config.text_lengths says. Without it
    captions are of 3 to max_len tokens, beside the peer full ones.
    """
    found = (
        batches(config, texts) if compare or texts else [random_batch(config, config.batch_size)]
    )
    step = ours(config)
    peer = theirs(config) if compare else None
    for batch in {lengths_of(batch, config): batch for batch in found}.values():
        step(batch)  # compiles
    place = dict(ours=0, theirs=0)

    def take(name: str) -> Batch:
        place[name] += 1
        return found[place[name] % len(found)]

    result = timed(
        lambda: step(take("ours")),
        repeats,
        None if peer is None else lambda: peer(take("theirs")),
    )
    rates = {"pairs_per_second": config.batch_size / result["seconds"]}
    if compare:
        own, other = (peak_bytes(name, config, found[0]) for name in ("ours", "theirs"))
        rates |= {"peak_bytes": own, "peer_peak_bytes": other, "peak_over_peer": own / other}
    return result | rates


def batches(config: Config, texts: str) -> list[Batch]:
    """Batches of random pixels with captions from a file, or full ones: every caption of the file
    once, at most four batches.

    Raises ValueError for a file that is none of text, or has fewer captions than a batch.
    """
    size, text = config.batch_size, config.model.text
    if not texts:
        full = random_batch(config, size)
        full["text_valid"][:] = True
        return [full]
    try:
        lines = [line for line in files.read_lines(texts) if line.strip()]
    except (OSError, ValueError) as error:
        line = f"--texts={texts}: give a text file, one caption a line"
        raise ValueError(line) from error
    if len(lines) < size:
        raise ValueError(f"--texts={texts} has {len(lines)} captions, a batch {size}; give more")
    found = []
    for start in range(0, min(len(lines), 4 * size) - size + 1, size):
        batch = random_batch(config, size)
        ids = peer_times.tokens(lines[start : start + size], text.max_len)
        valid = ids > 0
        batch["tokens"][:] = np.where(valid, 1 + (ids - 1) % (text.vocab_size - 1), 0)
        batch["text_valid"][:] = valid
        found.append(batch)
    return found


def lengths_of(batch: Batch, config: Config) -> text_lengths.Lengths:
    """The length to which a batch's captions are cut, for all of its rows."""
    longest = int(text_ends.lengths(batch["text_valid"]).max())
    return text_lengths.choose(config, (longest, longest))


def ours(config: Config) -> Callable[[Batch], Any]:
    """A function that takes one step on a batch, and its metrics."""
    mesh = partitioning.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    run_config.check_batch(config, partitioning.batch_parts(mesh))
    compiled: dict[text_lengths.Lengths, Any] = {}
    with jax.set_mesh(mesh):
        model = build(config)
        state = init_state(model, config, mesh)
        steps = config.steps or max(1000, config.optimizer.warmup_steps + 1)
        schedule = make_schedule(config.optimizer, steps)
        schedule = partitioning.replicate(mesh, schedule)

    def step(batch: Batch) -> Any:
        nonlocal state
        lengths = lengths_of(batch, config)
        with jax.set_mesh(mesh):
            if lengths not in compiled:
                size = config.model.image_size
                compiled[lengths] = programs.program(
                    model, of_step(config), mesh, size, lengths, False
                )
            placed = partitioning.place_batch(mesh, batch)
            state, metrics = compiled[lengths](state, placed, schedule)
        return metrics

    return step


def theirs(config: Config) -> Callable[[Batch], float]:
    """The same by open_clip: see peer_times.trainer."""
    step = peer_times.trainer(config)
    return lambda batch: step(batch["image"], np.where(batch["text_valid"], batch["tokens"], 0))


def peak_bytes(name: str, config: Config, batch: Batch) -> int:
    """What two steps of 'ours' or 'theirs' add to the memory of a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, config.to_dict(), batch))


def _peak(name: str, config: dict[str, Any], batch: Batch) -> int:
    from coca_jax.config import read

    compile_cache.use()  # compiling is not what is measured
    typed = read(Config, config)
    jax.block_until_ready(jax.numpy.zeros(1) + 1)
    peer_times.import_torch()

    def work() -> None:
        step: Callable[[Batch], Any] = (ours if name == "ours" else theirs)(typed)
        for _ in range(2):
            jax.block_until_ready(step(batch))

    return added(work)


def added(work: Callable[[], None]) -> int:
    """What `work` adds to the memory of this process at its peak, in bytes, 1 at least (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _memory("VmRSS")
    work()
    return max(1, _memory("VmHWM") - before)


def _memory(field: str) -> int:
    """Bytes of this process by its status file (Linux): 'VmRSS' now, 'VmHWM' the most."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])
