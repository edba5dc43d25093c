"""Trains variants of a recipe with several seeds and compares their scores.

    python benchmarks/ablations.py benchmarks/ablations.toml --out=runs/ablations

The table names a recipe, seeds and the config keys in which each variant differs. Each run is a
`coca-jax train` in OUT/VARIANT/seedN: given again, the command resumes a run that was cut short and
skips those that are done. Prints a Markdown table (mean, and the range over the seeds) and writes
OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the entries of nested tables."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def train(recipe: str, overrides: Mapping[str, Any], seed: int, workdir: pathlib.Path) -> dict:
    """The scores {evaluator/dataset/metric: value} of a run, trained unless it is done."""
    scores = workdir / "scores.json"
    if not scores.exists():
        flags = [f"--config.{key}={value}" for key, value in overrides.items()]
        command = ["-m", "coca_jax", "train", f"--config={recipe}", f"--workdir={workdir}"]
        done = subprocess.run(
            [sys.executable, *command, f"--config.seed={seed}", *flags, "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{workdir}: training failed with status {done.returncode}")
        summary = json.loads(done.stdout.splitlines()[-1])
        scores.write_text(json.dumps({k: v for k, v in summary.items() if "/" in k}, indent=1))
    return json.loads(scores.read_text())


def cell(values: list[float]) -> str:
    """A mean and, of several values, their range."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g} to {max(values):.4g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    table = tomllib.loads(args.table.read_text())
    seeds, shared = table.get("seeds", [0]), table.get("overrides", {})
    found: dict[str, dict[int, dict]] = {name: {} for name in table["variants"]}
    for seed in seeds:
        for name, values in table["variants"].items():
            overrides = dict(flat(shared)) | dict(flat(values))
            recipe = overrides.pop("config", table["config"])
            print(f"{name}, seed {seed}", file=sys.stderr)
            place = args.out / name / f"seed{seed}"
            found[name][seed] = train(recipe, overrides, seed, place)
            (args.out / "results.json").write_text(json.dumps(found, indent=1))
    metrics = table.get("metrics") or sorted(
        {metric for runs in found.values() for scores in runs.values() for metric in scores}
    )
    print("| variant | " + " | ".join(metrics) + " |")
    print("|---" * (len(metrics) + 1) + "|")
    for name, runs in found.items():
        cells = (cell([run[m] for run in runs.values() if m in run]) for m in metrics)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
