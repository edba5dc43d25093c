"""Kills one training again and again, at moments of every kind; it must end as a calm one does.

    python tests/soak/kills.py --kills=100                  # one process: SIGKILL, SIGTERM, SIGINT
    python tests/soak/kills.py --kills=20 --stops=5 --processes=2   # one of two, by local.sh

A kill is aimed at a kind of moment (start-up, compile, step, save, evaluation, the report at the
end) and falls a random time after a line says that it has begun. The two runs must then be equal:
every array of the last checkpoint by its bits, every logged number, every score, no step twice or
missing. The last line of output is one JSON object. The exit status is 0 when all are equal and
every kill gave the status that it should.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EVERY, EVALUATE = 20, 50  # of recipe.py
COMPARED = ("loss", "contrastive_loss", "captioning_loss", "gradient_norm", "learning_rate")
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
MOMENTS = ("start-up", "compile", "step", "save", "evaluation", "report")
LIMIT = 600.0  # seconds after which a life that does not end has failed; jax may wait for 300


class Life:
    """One start of the training; its lines are read as they come, with their times."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self.begin = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._seen = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line))

    def wait_for(self, wanted: Any) -> bool:
        """Whether a line that was not looked at yet makes `wanted` true; False when it ended."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            while self._seen < len(self.lines):
                self._seen += 1
                if wanted(self.lines[self._seen - 1][1]):
                    return True
            if self.process.poll() is not None and self._seen == len(self.lines):
                return False
            time.sleep(0.002)
        raise AssertionError(f"nothing for {LIMIT} s: {self.text()}")

    def end(self, limit: float = LIMIT) -> int:
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # which a launcher passes on to its processes
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
            self.process.kill()
            raise AssertionError(f"it did not end in {limit:.0f} s: {self.text()}") from None
        self._reader.join()
        return status

    def first_step(self) -> float | None:
        """Seconds from the start to the first line of a step."""
        return next((t - self.begin for t, line in self.lines if step_of(line)), None)

    def text(self) -> str:
        return "".join(line for _, line in self.lines)[-3000:]


def step_of(line: str) -> int:
    """The step that a line of progress tells of, else 0."""
    return int(line.split("/")[0][5:]) if line.startswith("step ") and "/" in line[:14] else 0


def aim(life: Life, moment: str, rng: random.Random, total: int) -> bool:
    """Waits until the life is in the middle of a moment; False when the run ended before."""
    delay = rng.uniform(0, 0.3)
    if moment == "start-up":
        delay = rng.uniform(0.05, 4.0)
    elif moment == "compile":
        if not life.wait_for(lambda line: "compiling the train step" in line):
            return False
        delay = rng.uniform(0, 1.0)
    elif moment == "save":
        if not life.wait_for(lambda line: step_of(line) and step_of(line) % EVERY == 0):
            return False
    elif moment == "evaluation":
        if not life.wait_for(lambda line: line.startswith("evaluating step")):
            return False
    elif moment == "report":
        if not life.wait_for(lambda line: line.startswith(f"evaluating step {total} ")):
            return False
        delay = rng.uniform(0, 2.0)
    else:
        more, seen = rng.randint(1, 2 * EVERY), [0]

        def enough(line: str) -> bool:
            seen[0] += bool(step_of(line))
            return seen[0] >= more

        if not life.wait_for(enough):
            return False
        delay = rng.uniform(0, 0.05)
    time.sleep(delay)
    return life.process.poll() is None


def environment(work: pathlib.Path) -> dict[str, str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST, "JAX_PLATFORMS": "cpu"}
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "compiled"))
    env |= {"PYTHON": sys.executable}
    return env | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}


def train(workdir: pathlib.Path, steps: int) -> list[str]:
    flags = [f"--config={HERE}/recipe.py", f"--config.steps={steps}", f"--workdir={workdir}"]
    return [*flags, "--config.log.every_steps=1"]


def alone(workdir: pathlib.Path, steps: int) -> list[str]:
    return [sys.executable, "-m", "coca_jax", "train", *train(workdir, steps)]


def compare(workdir: pathlib.Path, calm: pathlib.Path, steps: int) -> list[str]:
    """What differs between two runs: nothing when all is well."""
    from coca_jax.runtime.metric_log import read_metrics

    rows, want = read_metrics(workdir), read_metrics(calm)
    found = []
    if [row["step"] for row in rows] != list(range(1, steps + 1)):
        found.append("a step is logged twice or missing")
    for a, b in zip(rows, want, strict=False):
        if [a[k] for k in COMPARED] != [b[k] for k in COMPARED]:
            found.append(f"numbers of step {a['step']} differ")
            break
    arrays, wanted = (read_arrays(place, steps) for place in (workdir, calm))
    if arrays.keys() != wanted.keys():
        found.append("other arrays")
    different = [n for n in wanted if not np.array_equal(arrays.get(n), wanted[n], equal_nan=True)]
    if different:
        found.append(
            f"{len(different)} of {len(wanted)} arrays differ, the first is {different[0]}"
        )
    scores = [json.loads((place / "eval.json").read_text()) for place in (workdir, calm)]
    if scores[0] != scores[1]:
        found.append("scores differ")
    return found


def read_arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint: parameters, their average, optimizer, counters."""
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    from coca_jax.checkpoints import items

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # whatever devices wrote it

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    found = {}
    folder = epath.Path(workdir) / "checkpoints" / str(step)
    for item in ("params", "ema", "opt_state", "counters"):
        target = jax.tree.map(placed, items.metadata(folder, item))
        tree = ocp.StandardCheckpointer().restore(folder / item, target)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def plan(kills: int, rng: random.Random) -> list[str]:
    """The moments in order: those at the end of the run come last."""
    late = max(1, kills // 16)
    kinds = ["start-up", "compile", "step", "save", "evaluation"]
    early = [kinds[n % len(kinds)] for n in range(kills - late)]
    rng.shuffle(early)
    return early + ["report"] * late


def kill_alone(
    work: pathlib.Path, kills: int, rng: random.Random, steps: int, end: float
) -> dict[str, Any]:
    """All kills of one training of one process, or those until `end`, and how it ended."""
    env, workdir = environment(work), work / "killed"
    counts: collections.Counter[str] = collections.Counter()
    problems, lost = [], []
    sent = None
    for number, moment in enumerate(plan(kills, rng)):
        name = rng.choice(["SIGKILL", "SIGTERM", "SIGINT"])
        if time.monotonic() > end:
            break
        life = Life(alone(workdir, steps), env)
        hit = aim(life, moment, rng, steps)
        if sent is not None and life.first_step() is not None:
            lost.append(life.begin + life.first_step() - sent)
        sent = time.monotonic()
        if hit:
            life.process.send_signal(getattr(signal, name))
        status = life.end()
        counts[f"{moment} {name}" if hit else f"{moment} missed"] += hit
        fine = {"SIGKILL": (-9, 0), "SIGTERM": (75, 0), "SIGINT": (75, 0)}[name]
        if not life.lines and name != "SIGKILL":
            fine = (*fine, -getattr(signal, name))  # Python itself was not up yet
        if status not in fine or "Traceback" in life.text():
            problems.append(f"kill {number} ({moment}, {name}): status {status}: {life.text()}")
        last = [line for _, line in life.lines if step_of(line)][-1:]
        reached = last[0].split("/")[0] if last else "no step"
        say(f"{number} {moment} {name} {'hit' if hit else 'MISSED'} {status} {reached}")
    life = Life(alone(workdir, steps), env)
    if life.end(limit=3600) != 0:
        problems.append(f"the last start: {life.text()}")
    return dict(kills=sum(counts.values()), by=dict(counts), problems=problems, seconds=lost)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stops", type=int, default=0, help="SIGSTOPs, with several processes")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="of the training; 0: by the kills")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which none is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=pathlib.Path, help="a folder; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or pathlib.Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        rng, end = random.Random(given.seed), time.monotonic() + 60 * given.minutes
        if given.processes == 1:
            steps = given.steps or max(60, 10 * given.kills // EVALUATE * EVALUATE)
            command = alone(work / "calm", steps)
        else:
            import pairs

            steps = given.steps or 30 * (given.kills + given.stops) // EVALUATE * EVALUATE
            command = pairs.together(work / "calm", steps, given.processes)
        calm = Life(command, environment(work))
        if calm.end(limit=3600) != 0:
            say(calm.text())
            return 1
        say(f"the calm run took {time.monotonic() - calm.begin:.0f} s for {steps} steps")
        if given.processes == 1:
            found = kill_alone(work, given.kills, rng, steps, end)
        else:
            found = pairs.kill(work, given.kills, given.stops, rng, steps, given.processes, end)
        found["problems"] += compare(work / "killed", work / "calm", steps)
        seconds = sorted(found.pop("seconds"))
        if seconds:
            found["median_seconds_from_kill_to_first_new_step"] = statistics.median(seconds)
            found["longest"] = seconds[-1]
    print(json.dumps(found | {"equal": not found["problems"], "steps": steps}))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
