"""The scripts of tests/soak in short: they run, and they see what is wrong."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_inference import model, words  # noqa: F401

from coca_jax.inference import export_folder

SOAK = pathlib.Path(__file__).parent / "soak"
sys.path.insert(0, str(SOAK))

import kills  # noqa: E402
import soak  # noqa: E402


def run(script, *flags):
    done = subprocess.run(
        [sys.executable, str(SOAK / script), *flags], capture_output=True, text=True, timeout=900
    )
    return done, json.loads(done.stdout.splitlines()[-1])


def test_the_plan_has_kills_of_every_kind_and_the_end_last():
    import random

    planned = kills.plan(100, random.Random(0))
    assert len(planned) == 100 and set(planned) == set(kills.MOMENTS)
    assert planned[-6:] == ["report"] * 6 and "report" not in planned[:-6]
    assert min(planned.count(moment) for moment in kills.MOMENTS[:-1]) >= 18


def test_a_line_of_progress_tells_its_step():
    assert kills.step_of("step 17/200 (8%) loss 5.8 | 20 pairs/s") == 17
    assert kills.step_of("step 20 is not saved") == kills.step_of("evaluating step 20 ...") == 0


def test_slopes_are_those_of_the_second_half():
    seconds = np.arange(0, 600, 5.0)
    steps = 10 * seconds
    memory = np.where(seconds < 200, 100 + seconds, 300 + 3 * (steps - 2000) / 1000)
    files = 9 + 30 * (np.arange(len(seconds)) % 3 == 1) + (seconds > 400)
    rows = np.stack([seconds, steps, memory, files, 40 + seconds * 0], 1)
    found = soak.summary(rows)
    assert found["mib_per_1000_steps"] == pytest.approx(3)
    assert found["files_at_rest_first"] == 9 and found["files_at_rest_last"] == 10
    assert found["most_files"] == 40
    assert found["steps_a_second_first"] == found["steps_a_second_last"] == pytest.approx(10)


@pytest.mark.slow
def test_four_kills_and_what_a_difference_looks_like(tmp_path):
    """Two runs of 60 steps, one of them killed four times (a minute); then one of them changed."""
    done, found = run("kills.py", "--kills=4", f"--work={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert found["equal"] and found["kills"] >= 3
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:30] + lines[29:]))
    assert kills.compare(killed, calm, 60)[0] == "a step is logged twice or missing"
    shutil.rmtree(killed / "checkpoints/60")
    shutil.copytree(calm / "checkpoints/40", killed / "checkpoints/60")
    assert any("arrays differ" in problem for problem in kills.compare(killed, calm, 60))


@pytest.mark.slow
def test_a_clock_that_jumps_and_a_process_that_sleeps():
    """libfaketime moves the wall clock; SIGSTOP holds the process for 20 seconds."""
    faults = ["asleep", "numbers"] + (["clock"] if shutil.which("faketime") else [])
    done, found = run("faults.py", *faults)
    assert done.returncode == 0, found


@pytest.mark.slow
def test_recaptioning_that_is_killed_ends_the_same(model, tmp_path):  # noqa: F811
    export_folder.write(model, str(tmp_path / "export"))
    done, found = run("recaption.py", f"--checkpoint={tmp_path}/export", "--kills=3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert found["kills"] == 3 and found["differences"] == [] and found["files"] > 5
