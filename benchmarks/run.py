"""One row of the benchmark: so many CPU minutes of training on a data set, then its scores.

    python benchmarks/run.py --row=coca_jax --data=scenes
    python benchmarks/run.py --row=open_clip_coca --data=emoji --seed 1 2 --folder=data --minutes=6

Two short runs say what start and compilation cost and what a step costs; from that follow the steps
that fit the minutes, for all seeds; seeds that are run later take as many as those of the same
row, minutes and machine did. Then the row trains and is scored, and its line is added to
results.json. What counts is the CPU time of the training process and its children, start and
compilation included, on the cores that the command may use (taskset -c 0,1 for two).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from machine import commit, machine, versions
from settings import DATA, ROWS

HERE = pathlib.Path(__file__).resolve().parent
TRIALS = (8, 168)  # steps of the two short runs, which compile in unequal times


def call(
    act: str, args: argparse.Namespace, seed: int, steps: int, workdir: str
) -> tuple[dict, float]:
    """(what the script of the row prints at last, its CPU seconds)."""
    script = HERE / ("torch_row.py" if ROWS[args.row].torch else "jax_row.py")
    with tempfile.TemporaryDirectory() as cache:  # nothing compiled is taken from before
        environment = os.environ | dict(
            JAX_COMPILATION_CACHE_DIR=cache,
            XDG_CACHE_HOME=cache,
            PYTHONPATH=f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            JAX_PLATFORMS="cpu",
        )
        before = spent()
        command = [sys.executable, str(script), act, args.row, args.data, args.folder]
        command += [str(steps), str(seed), workdir]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[1:])} failed")
        return json.loads(done.stdout.splitlines()[-1]), spent() - before


def spent() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def fitting(args: argparse.Namespace, scratch: str) -> int:
    """The steps that fit the minutes, by the two short runs."""
    seed = args.seed[0]
    took = [call("train", args, seed, n, os.path.join(scratch, f"trial-{n}"))[1] for n in TRIALS]
    step = max((took[1] - took[0]) / (TRIALS[1] - TRIALS[0]), 1e-3)
    start = max(took[0] - TRIALS[0] * step, 0.0)
    steps = int((60 * args.minutes - start) / step)
    print(
        f"start {start:.0f} s, a step {step:.3f} s of CPU: {steps} steps in {args.minutes:g} min",
        file=sys.stderr,
    )
    if steps < TRIALS[0]:
        raise SystemExit(
            f"--minutes={args.minutes:g} is less than {TRIALS[0]} steps take; give more"
        )
    return steps


def add(path: pathlib.Path, line: dict[str, Any]) -> None:
    """Adds a line to results.json; one of the same row, data, seed and minutes is replaced."""
    rows = json.loads(path.read_text()) if path.exists() else []
    key = ("row", "data", "seed", "minutes", "machine")
    rows = [old for old in rows if any(old[k] != line[k] for k in key)]
    path.write_text(json.dumps([*rows, line], indent=1) + "\n")


def of_other_seeds(args: argparse.Namespace) -> int:
    """The steps that other seeds of the row took, in the same minutes on such a machine; 0 where
    there are none, or not all took as many."""
    path = pathlib.Path(args.out)
    lines = json.loads(path.read_text()) if path.exists() else []
    same = dict(row=args.row, data=args.data, minutes=args.minutes, machine=machine())
    lines = [line for line in lines if all(line[key] == same[key] for key in same)]
    steps = {line["steps"] for line in lines if line["seed"] not in args.seed}
    if len(steps) != 1:
        return 0
    (found,) = steps
    print(f"{found} steps, as other seeds of this row took: {path}", file=sys.stderr)
    return found


def run(args: argparse.Namespace, seed: int, steps: int, workdir: str) -> dict[str, Any]:
    """Trains the row with a seed and scores it: its line of results.json. Raises SystemExit where
    the program has changed meanwhile."""
    now = commit()
    told, seconds = call("train", args, seed, steps, workdir)
    try:
        scores = call("score", args, seed, steps, workdir)[0]["scores"]
    except SystemExit:
        kept = shutil.copytree(workdir, tempfile.mkdtemp(prefix=f"{args.row}-"), dirs_exist_ok=True)
        print(f"what was trained is kept in {kept}", file=sys.stderr)
        raise
    if commit() != now:
        raise SystemExit(
            f"the program was {now} when seed {seed} began and is {commit()} now: run it once more"
        )
    return dict(
        row=args.row,
        data=args.data,
        seed=seed,
        minutes=0.0 if args.steps else args.minutes,
        cpu_minutes=round(seconds / 60, 2),
        steps=steps,
        pairs=told["pairs"],
        machine=machine(),
        commit=now,
        versions=versions(),
        date=datetime.date.today().isoformat(),
        scores={name: scores[name] for name in DATA[args.data].shown if name in scores},
    )


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", required=True, choices=ROWS)
    parser.add_argument("--data", required=True, choices=DATA)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    parser.add_argument("--minutes", type=float, default=0.0, help="of CPU; 0: the data set's")
    parser.add_argument(
        "--steps", type=int, default=0, help="in place of minutes; not for the table"
    )
    parser.add_argument("--folder", default="data", help="where the prepared data sets lie")
    parser.add_argument("--out", default=str(HERE / "results.json"), help="where the line is added")
    args = parser.parse_args()
    args.minutes = args.minutes or DATA[args.data].minutes
    args.folder = os.path.abspath(args.folder)
    with tempfile.TemporaryDirectory() as scratch:
        steps = args.steps or of_other_seeds(args) or fitting(args, scratch)
        for seed in args.seed:
            line = run(args, seed, steps, os.path.join(scratch, f"seed-{seed}"))
            add(pathlib.Path(args.out), line)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
