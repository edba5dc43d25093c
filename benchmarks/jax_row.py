"""The row of this program: `train` by the recipe, and its own evaluation.

Called by run.py: python benchmarks/jax_row.py train|score ROW DATA FOLDER STEPS SEED WORKDIR
"""

from __future__ import annotations

import json
import sys

from settings import config_of

from coca_jax.cli.train import train


def main(act: str, row: str, data: str, folder: str, steps: str, seed: str, workdir: str) -> None:
    """train: without evaluation. score: the same run, which is at its end, evaluates."""
    config = config_of(data, folder, int(steps), int(seed))
    if act == "train":
        config = config.change({"eval.tasks": ()})
    found = train(config, workdir)
    batch = config.batch_size
    told = dict(scores={k: v for k, v in found.items() if "/" in k}, pairs=int(steps) * batch)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
