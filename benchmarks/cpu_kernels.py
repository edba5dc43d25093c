"""What each C++ kernel of ops/cpu_kernels gains on a train step, against XLA alone.

    taskset -c 0 python benchmarks/cpu_kernels.py [--steps=10] [--rows=emoji,demo] [--parts=all,conv]

Each variant is a process of its own, because a step is compiled once per process. Prints a line of
JSON for each: the recipe, its dtype, the kernels that are off ('all': none, 'none': all of them)
and the median processor seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import jax
import numpy as np

from coca_jax.apps import benchmark
from coca_jax.ops.cpu_kernels import conv, muon, turn
from coca_jax.training import recipes

KERNELS = dict(conv=conv, muon=muon, turn=turn)
ROWS = {
    "emoji": {},
    "demo": {},
    "finetune_open_clip": {"batch_size": 16, "model.dtype": "bfloat16"},  # coca_ViT-B-32
}


def measure(row: str, off: str, steps: int) -> float:
    """Median processor seconds of `steps` train steps, captions at full length, after two."""
    for name in KERNELS if off == "none" else {off} & KERNELS.keys():
        KERNELS[name].available = lambda: False
        if hasattr(KERNELS[name], "available_in_bfloat16"):
            KERNELS[name].available_in_bfloat16 = lambda: False
    config = recipes.typed(recipes.load(row))
    config = config.change(ROWS[row]) if ROWS[row] else config
    batch = benchmark.random_batch(config, config.batch_size)
    batch["text_valid"][:] = True
    step, found = benchmark.ours(config), []
    for _ in range(2 + steps):
        start = time.process_time()
        jax.block_until_ready(step(batch))
        found.append(time.process_time() - start)
    return float(np.median(found[2:]))


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--parts", default=",".join(("all", *KERNELS, "none")))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--one", action="store_true", help="Measure in this process.")
    args = parser.parse_args()
    for row in args.rows.split(","):
        for off in args.parts.split(","):
            if args.one:
                seconds = measure(row, off, args.steps)
                print(json.dumps(dict(row=row, off=off, seconds=round(seconds, 4))), flush=True)
                continue
            flags = (f"--rows={row}", f"--parts={off}", f"--steps={args.steps}", "--one")
            subprocess.run([sys.executable, __file__, *flags], check=True)


if __name__ == "__main__":
    main()
