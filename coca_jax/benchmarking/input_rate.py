"""How fast batches come without a model, also beside open_clip's pipeline over the same records."""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from coca_jax.benchmarking import peer_times
from coca_jax.config import Config, Recipe, typed
from coca_jax.data import run_vocabulary
from coca_jax.data.loaders import open_stream
from coca_jax.data.mixture import Mixture

PEER_EXAMPLES = 2000  # that a comparison reads again and again


def read_input(
    config: Recipe, seconds: float, every: float, repeats: int, compare: bool = False
) -> dict[str, Any]:
    """Batches without a model, for `seconds`: what `measure` returns.

    With `compare`, `repeats` times in turn with open_clip's pipeline over the first
    PEER_EXAMPLES records of the first source, all pinned to one core. The rates are then medians
    of images per second of processor time, with their extremes: {images_per_second_per_core,
    ..._low, ..._high, peer_images_per_second_per_core, ..., times_peer: the medians' quotient}.
    Raises ValueError on a system that cannot pin, and for a config that reads no pictures.
    """
    config = typed(config)
    if config.data.features:
        raise ValueError(
            f"data.features={config.data.features}: this times the reading of pictures, and this "
            "config reads what an image encoder has made of them; give --config.data.features=''"
        )
    if not compare:
        return measure(config, seconds, every)
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("--peer pins both to one core, which only Linux can; leave out --peer")
    config = config.change({"data.num_threads": 1})
    source = Mixture(config).sources[0]
    count = min(len(source), PEER_EXAMPLES)
    rates: dict[str, list[float]] = {"": [], "peer_": []}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        with tempfile.TemporaryDirectory() as folder:
            peer_times.write_tar(source.read(range(count)), f"{folder}/0.tar")
            peer = peer_times.input_batches(
                f"{folder}/0.tar", count, config.batch_size, config.model.image_size
            )
            next(peer)
            for _ in range(repeats):
                result = measure(config, seconds)
                rates[""].append(result["images_per_second_per_core"])
                rate, cores_busy, _ = rate_of(peer, seconds)
                rates["peer_"].append(rate / cores_busy)
    finally:
        os.sched_setaffinity(0, cores)
    quotient = statistics.median(rates[""]) / statistics.median(rates["peer_"])
    for name, found in rates.items():
        name += "images_per_second_per_core"
        result[name] = statistics.median(found)
        result |= {f"{name}_low": min(found), f"{name}_high": max(found)}
    return result | {"times_peer": quotient}


def measure(config: Config, seconds: float = 10.0, every: float = 0.0) -> dict[str, Any]:
    """How fast batches come.

    Args:
        config: of a run.
        seconds: how long to read.
        every: seconds between looks at the memory; 0: only its maximum at the end.

    Returns:
        images_per_second, images_per_second_per_core (per second of processor time used),
        first_batch_seconds (opening the data included), cores_busy, max_rss_mib; with `every`,
        rss_mib: at each look, the resident memory of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = run_vocabulary.load_or_train(config, folder)
    started = time.perf_counter()
    batches = open_stream(config, vocabulary)
    next(batches)
    first = time.perf_counter() - started
    for _ in range(4):  # what was made ahead while nobody looked
        next(batches)
    images, wall, busy, resident = 0.0, 0.0, 0.0, []
    while wall < seconds:
        rate, cores, took = rate_of((batch["image"] for batch in batches), every or seconds)
        images, wall, busy = images + rate * took, wall + took, busy + cores * took
        if every:
            resident.append(_resident_mib())
    batches.close()
    result: dict[str, Any] = dict(
        images_per_second=images / wall,
        images_per_second_per_core=images / busy,
        cores_busy=busy / wall,
        first_batch_seconds=first,
        max_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
    return result | (dict(rss_mib=resident) if every else {})


def rate_of(batches: Iterator[Any], seconds: float) -> tuple[float, float, float]:
    """(examples a second, cores busy, seconds taken) of reading batches for `seconds`.

    Batches are arrays, or tuples of them, with the examples as the first axis.
    """
    count, started, processor = 0, time.perf_counter(), time.process_time()
    while (wall := time.perf_counter() - started) < seconds:
        batch = next(batches)
        count += len(batch[0] if isinstance(batch, tuple) else batch)
    return count / wall, (time.process_time() - processor) / wall, wall


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20
