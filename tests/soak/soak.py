"""Trains for a long time with saves and evaluations: memory, open files and speed must not drift.

    python tests/soak/soak.py --minutes=30

Samples the process from outside every five seconds. The last line of output is one JSON object: the
slope of resident memory over the second half, by least squares, and open files between two saves
and steps a second in the first and in the last fifth of the time after the first minute.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import sys
import tempfile
import time

import numpy as np
from kills import FAST, HERE, ROOT, Life

EVERY = 5.0  # seconds between two samples


def sample(pid: int) -> tuple[float, int, int]:
    """(MiB of resident memory, open files, threads) of a process."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    resident = int(fields["VmRSS"].split()[0]) / 1024
    return resident, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"])


def last_step(file: pathlib.Path) -> int:
    """The step of the last whole line of metrics.jsonl, 0 without one."""
    try:
        with open(file, "rb") as lines:
            lines.seek(max(0, file.stat().st_size - 8192))
            whole = lines.read().splitlines()[-2]
        return int(json.loads(whole)["step"])
    except (OSError, IndexError, ValueError, KeyError):
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--samples", type=pathlib.Path, help="a file for all samples, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        flags = [f"--config={HERE}/recipe.py", f"--workdir={workdir}", "--config.steps=10000000"]
        flags += ["--config.log.every_steps=10", "--config.checkpoint.every_steps=200"]
        flags += ["--config.eval.every_steps=1000"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST, "JAX_PLATFORMS": "cpu"}
        life = Life([sys.executable, "-m", "coca_jax", "train", *flags], env)
        rows = []
        while time.monotonic() - life.begin < 60 * given.minutes and life.process.poll() is None:
            time.sleep(EVERY)
            step = last_step(workdir / "metrics.jsonl")
            rows.append((time.monotonic() - life.begin, step, *sample(life.process.pid)))
        life.process.send_signal(signal.SIGINT)
        status = life.end()
    if given.samples:
        given.samples.write_text(json.dumps(rows))
    print(json.dumps(summary(np.asarray(rows)) | {"status": status}))
    return int(status != 75)


def summary(rows: np.ndarray) -> dict[str, float]:
    """rows: float [samples, (seconds, step, MiB, files, threads)]."""
    half = rows[len(rows) // 2 :]
    thousands = half[:, 1] / 1000
    warm = rows[rows[:, 0] > 60]
    fifth = max(2, len(warm) // 5)

    def speed(part: np.ndarray) -> float:
        return float((part[-1, 1] - part[0, 1]) / (part[-1, 0] - part[0, 0]))

    return dict(
        minutes=rows[-1, 0] / 60,
        steps=float(rows[-1, 1]),
        mib_at_the_end=float(rows[-1, 2]),
        mib_per_1000_steps=float(np.polyfit(thousands, half[:, 2], 1)[0]),
        files_at_rest_first=float(warm[:fifth, 3].min()),  # a save holds some thirty for a moment
        files_at_rest_last=float(warm[-fifth:, 3].min()),
        most_files=float(rows[:, 3].max()),
        most_threads=float(rows[:, 4].max()),
        steps_a_second_first=speed(warm[:fifth]),
        steps_a_second_last=speed(warm[-fifth:]),
    )


if __name__ == "__main__":
    raise SystemExit(main())
