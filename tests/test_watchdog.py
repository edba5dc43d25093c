"""A run that hangs is ended, started again by its launcher, and names what it hung in."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from coca_jax.data.evaluation_data import Records
from coca_jax.inference.devices import Devices
from coca_jax.runtime import activity, watchdog
from coca_jax.runtime.metric_log import TimeBuckets

ROOT = pathlib.Path(__file__).parent.parent


class Watched:
    """A watchdog of half a second, and what it said and did."""

    def __init__(self, workdir):
        self.buckets, self.lines, self.ended = TimeBuckets(), [], threading.Event()
        self.dog = watchdog.Watchdog(
            str(workdir), self.buckets, 0.5, say=self.lines.append, end=self._end, warn=0.2
        )
        self.dog.start()

    def _end(self, line, status):
        self.line, self.status = line, status
        self.ended.set()


def a_read_that_stalls(release):
    with activity.doing("reading data/mine"):
        release.wait()


def test_a_stalled_source_is_named_and_the_stacks_of_all_threads_are_kept(tmp_path):
    watched, release = Watched(tmp_path), threading.Event()
    reader = threading.Thread(target=a_read_that_stalls, args=(release,))
    reader.start()
    with watched.buckets("data_wait"):
        assert watched.ended.wait(10)
    release.set()
    reader.join()
    watched.dog.close()
    assert watched.status == 75
    assert "waiting for data: reading data/mine for" in watched.line
    assert watched.lines[0].startswith("warning: no step for 0 s, waiting for data: reading data/")
    (file,) = tmp_path.glob("hang_*_0.txt")
    assert str(file) in watched.line
    text = file.read_text()
    assert "a_read_that_stalls" in text and "test_a_stalled_source" in text


def test_a_run_that_goes_on_is_left_alone(tmp_path):
    watched = Watched(tmp_path)
    for _ in range(40):
        with watched.buckets("step"):
            time.sleep(0.03)
    with watched.buckets("compile"):  # may take ten times as long
        time.sleep(1.0)
    with watched.buckets("save"):
        time.sleep(0.3)
    with watched.buckets("step"):
        time.sleep(0.15)
    watched.dog.close()
    assert not watched.ended.is_set() and not list(tmp_path.iterdir())
    assert watched.lines[0].startswith("warning: no step for 0 s, saving")
    assert watched.lines[1].startswith("going on after")


def test_parts_of_long_work_are_progress_and_of_a_step_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "LONGER", 1)
    watched = Watched(tmp_path)
    for doing in watchdog.LONG:
        with watched.buckets(doing):
            for _ in range(30):
                activity.alive()
                time.sleep(0.03)  # in all nearly twice the bound
    assert not watched.ended.is_set()
    with watched.buckets("step"):  # a thread that reads on does not save a step that hangs
        while not watched.ended.is_set():
            with activity.doing("reading data/mine"):
                watched.ended.wait(0.03)
    watched.dog.close()
    assert "in a step" in watched.line


def test_long_work_says_that_it_gets_on(tmp_path):
    def moved(work):
        before = activity.parts()
        work()
        return activity.parts() - before

    records = Records(dict(builtin="scenes", split="test", kind="caption"), 600)
    assert moved(lambda: list(records)) == 3  # of 256 at a time
    none = dict(known={"no text"})  # so that all 2,000 are looked at
    assert moved(lambda: Records(dict(builtin="scenes"), 600, **none)) == 8
    devices = Devices(None, "cpu")
    assert moved(lambda: [devices.put(np.zeros((3, 2)), 4) for _ in range(5)]) == 5


def test_without_a_bound_nothing_is_watched(tmp_path):
    dog = watchdog.Watchdog(str(tmp_path), TimeBuckets(), 0)
    dog.start()
    assert not dog._thread.is_alive()
    dog.close()


def test_python_that_is_stuck_in_c_is_ended_too(tmp_path):
    code = (
        "import ctypes, faulthandler\n"
        "from coca_jax.runtime.metric_log import TimeBuckets\n"
        "from coca_jax.runtime import watchdog\n"
        "watchdog.STUCK = 0.5\n"
        f"dog = watchdog.Watchdog({str(tmp_path)!r}, TimeBuckets(), 1.0)\n"
        "dog.start()\n"
        "import time; time.sleep(0.3)\n"
        "def stuck(): ctypes.PyDLL(None).sleep(60)\n"  # does not let go of the interpreter
        "stuck()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=50
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in stuck" in done.stderr


RECIPE = """
import time
from coca_jax.recipes import tiny
from coca_jax.data import synthetic_source
from coca_jax.data import scenes

read, calls = synthetic_source.Scenes.read, []

def stall(self, indices):
    calls.append(1)
    if len(calls) > 12:
        time.sleep(600)
    return read(self, indices)

synthetic_source.Scenes.read = stall

def get_config():
    config = tiny.get_config()
    config.steps = 50
    config.faults.hang_minutes = 0.4
    return config
"""


@pytest.mark.slow
def test_train_of_a_source_that_stalls_ends_with_75(tmp_path):
    """Trains a few steps; the source then gives nothing for longer than the bound of 24 seconds."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    command = [sys.executable, "-m", "coca_jax", "train", f"--config={tmp_path}/recipe.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}/run"],
        capture_output=True,
        text=True,
        env=env,
        timeout=600,
    )
    assert done.returncode == 75, done.stderr[-3000:]
    last = done.stderr.splitlines()[-1]
    assert "waiting for data: reading scenes" in last
    assert len(list((tmp_path / "run").glob("hang_*_0.txt"))) == 1
    assert not (tmp_path / "run" / "lease.json").exists()
