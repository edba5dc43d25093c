"""What stays in memory of saves and of texts.

    python benchmarks/saves.py

Prints a line of JSON: `leak`, objects of Python that a save of 320 arrays leaves behind, of 30
after the first 10; `given_back`, milliseconds that giving free memory back takes after a save;
`texts`, MiB of 50,000 texts of 70 characters that are tokenised once and kept.
"""

from __future__ import annotations

import gc
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from coca_jax.checkpoints import manager
from coca_jax.checkpoints.manager import Checkpoints
from coca_jax.data.texts import Tokenizer
from coca_jax.training.state import TrainState

ARRAYS, FIRST, MORE = 320, 10, 30
TEXTS, CHARACTERS, LENGTH = 50_000, 70, 64


def resident() -> float:
    """MiB of this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmRSS"))


def saves() -> tuple[float, float]:
    """(objects a save leaves behind, milliseconds of giving memory back)."""
    arrays = {f"layer_{n}": jnp.full((16, 16), n, jnp.float32) for n in range(ARRAYS // 2)}
    state = TrainState(jnp.int32(0), jnp.int32(0), arrays, dict(moments=arrays), None)
    blocks, took, give_back = [], [], manager.give_back

    def timed() -> None:
        start = time.perf_counter()
        give_back()
        took.append(time.perf_counter() - start)

    manager.give_back = timed
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, keep=2)
        for step in range(FIRST + MORE):
            checkpoints.wait()
            checkpoints.save(step, state)
            if step % FIRST == FIRST - 1:
                checkpoints.wait()
                gc.collect()
                blocks.append(sys.getallocatedblocks())
        checkpoints.wait()
    return (blocks[-1] - blocks[0]) / MORE, 1000 * statistics.median(took)


def texts() -> float:
    """MiB that kept texts take."""
    drawn = np.random.default_rng(0).integers(97, 123, (TEXTS, CHARACTERS), np.uint8)
    lines = [bytes(row).decode() for row in drawn]

    def encode(some: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = np.zeros((len(some), LENGTH), np.int32)
        return tokens, tokens == 0, np.full(len(some), LENGTH, np.int32)

    tokenizer = Tokenizer(encode)
    gc.collect()
    before = resident()
    for start in range(0, TEXTS, 64):
        part = lines[start : start + 64]
        tokenizer(part, part)
    return resident() - before


def main() -> None:
    """Command-line entry."""
    left, milliseconds = saves()
    found = dict(leak=dict(after=left), given_back=dict(milliseconds=milliseconds))
    print(json.dumps(found | dict(texts=dict(mib=texts()))))


if __name__ == "__main__":
    main()
