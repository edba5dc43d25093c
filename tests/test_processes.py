"""One device and the devices of two processes train alike and take over from each other."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import fsspec
import jax
import numpy as np
import pytest
from conftest import COMPILE_FAST

from coca_jax.checkpoints import manager, verify
from coca_jax.runtime.metric_log import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
WORDS = "vocabulary.model"
# A step whose program has a third less to compile than the recipe's.
SMALL = ("--config.model.bias=False", "--config.optimizer.name=adamw")


def launch(commands, workdir, processes, devices, *flags):
    """Trains configs/tiny.py by launch/local.sh, whose Python is the server of forks."""
    command = ["bash", "launch/local.sh", str(processes), f"--devices={devices}", "--"]
    command += ["--config=configs/tiny.py", f"--workdir={workdir}", *SMALL, *flags]
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    env |= {"PYTHON": str(commands.bin / "python"), "XLA_FLAGS": COMPILE_FAST}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == 5  # process 0's result and nothing else
    return [row["loss"] for row in read_metrics(workdir)], manager.load_params(workdir)[0]


@pytest.fixture(scope="module")
def one_device(commands, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("one"))
    return workdir, launch(commands, workdir, 1, 1)


def forget_the_end(workdir):
    shutil.rmtree(f"{workdir}/checkpoints/5")
    assert manager.find_step(workdir)[1] == 3


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert len(got[0]) == 5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got[1], want[1])


@pytest.mark.long
def test_one_device_saves_and_those_of_two_processes_go_on(one_device, commands, tmp_path):
    """Of one device each, and both hold all rows: as on nodes of GPUs with mesh.tensor."""
    workdir = str(shutil.copytree(one_device[0], tmp_path / "copy"))
    forget_the_end(workdir)
    assert_same(launch(commands, workdir, 2, 1, "--config.mesh.tensor=2"), one_device[1])


@pytest.mark.long
def test_two_processes_of_four_devices_save_and_one_device_goes_on(one_device, commands, tmp_path):
    """Each process has half of the rows and every parameter, split over its own devices."""
    workdir, words = str(tmp_path / "two"), f"--config.data.vocabulary={one_device[0]}/{WORDS}"
    four = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    split = launch(commands, workdir, 2, 4, *four, words)
    assert_same(split, one_device[1])
    forget_the_end(workdir)
    assert_same(launch(commands, workdir, 1, 1, words), one_device[1])


@pytest.mark.long
def test_two_processes_go_on_in_a_bucket(one_device, commands, s3):
    workdir = f"{s3}/processes"
    system = fsspec.filesystem("s3")
    system.put(f"{one_device[0]}/", "bucket/processes/", recursive=True)
    system.rm("bucket/processes/checkpoints/5", recursive=True)
    # Each process has a half of every parameter.
    assert_same(launch(commands, workdir, 2, 2, "--config.mesh.fsdp=4"), one_device[1])
    written = system.find("bucket/processes/checkpoints/5/params")
    assert {part for name in written for part in name.split("/") if part.startswith("ocdbt.")} == {
        *("ocdbt.process_0", "ocdbt.process_1")
    }


SHARES = """
import contextlib, json, resource, sys
import jax, numpy as np
from coca_jax.evaluation import evaluators; from coca_jax.parallel import sharding as partitioning
from coca_jax.checkpoints import manager as checkpointing, verify as checksums
from coca_jax.runtime import multihost as processes
from coca_jax.evaluation.runner import Unfinished
from coca_jax.evaluation.evaluators.base import NotWritten, Writing
from coca_jax.config import typed
from coca_jax.recipes import tiny
from coca_jax.inference import devices
from coca_jax.training import setup
from coca_jax.training.state import TrainState
processes.keep_gloo_off_standard_output()
processes.start(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
there, params = devices.place({"scale": np.arange(6.0)}, jax.devices())
rows = there.put(np.arange(5.0), there.bucket(5))
whole = there.jit(lambda rows, params: rows * params["scale"][2])(rows, params)
batches = {}
for tensor in (1, 2, 4):  # two devices a process: one holds two shards, one, and both the same one
    mesh = partitioning.make_mesh(-1, 1, tensor)
    number, count = partitioning.readers(mesh)
    mine = np.arange(8.0)[number * 8 // count : (number + 1) * 8 // count]
    placed = partitioning.place_batch(mesh, {"rows": mine})["rows"]
    everywhere = jax.NamedSharding(mesh, jax.P())
    batch = jax.jit(lambda rows: rows, out_shardings=everywhere)(placed)
    parts = [np.asarray(shard.data).tolist() for shard in placed.addressable_shards]
    batches[tensor] = (number, count, parts, np.asarray(batch).tolist())
split = jax.NamedSharding(mesh, jax.P("tensor"))
weights = jax.make_array_from_callback((1024,), split, lambda at: np.arange(1024.0)[at])
one = jax.make_array_from_callback((), everywhere, lambda _: np.int32(1))
params, counters = {"weights": weights}, {"count": one}
state = TrainState(step=one, skipped=one, params=params, opt_state=counters, ema=None)
checkpoints, failures = checkpointing.Checkpoints(sys.argv[3]), []
largest = resource.getrlimit(resource.RLIMIT_FSIZE)
for step, full in ((1, -1), (2, 1), (3, 0), (4, -1)):  # whose disk has 100 bytes left
    if full == int(sys.argv[1]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, largest[1]))
    try:
        checkpoints.save(step, state)
        checkpoints.wait_for(step)
    except checkpointing.SaveFailed as error:
        failures.append((step, str(error)))
    resource.setrlimit(resource.RLIMIT_FSIZE, largest)
try:
    unwritten = str(Unfinished("/proc/scores", {}, Writing(sys.argv[1] == "0", 2)))
except NotWritten as error:
    unwritten = str(error)
config = tiny.get_config()
config.optimizer.name, config.optimizer.image_learning_rate = "adamw", 0.0
config.init_from, config.data.features = "weights", "kept"
try:
    refused = str(setup.check_devices(typed(config)))
except ValueError as error:
    refused = str(error)
evaluators.warn("scenes", "found by both")
told = dict(batches=batches, unwritten=unwritten, refused=refused)
told["gathered"] = processes.gathered("names", f"of {sys.argv[1]}")
told["sums"] = checksums.of_tree(dict(split=weights, here=np.arange(5.0), everywhere=one))
told["keeps_programs"] = jax.config.jax_enable_compilation_cache
told |= dict(failures=failures, steps=checkpoints.steps())
checkpoints.close()
told |= dict(own=there.own_rows(5).tolist(), whole=np.asarray(whole).tolist())
print(json.dumps(told | dict(one=[float(np.asarray(s.data)[0]) for s in rows.addressable_shards])))
"""


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """What each of two processes of two devices says of its rows and of its saves."""
    workdir = str(tmp_path_factory.mktemp("saves"))
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {COMPILE_FAST}"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SHARES, str(number), port, workdir],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return [json.loads(out) | dict(warned=err.count("scenes: found by both")) for out, err in said]


def test_programs_of_several_processes_on_cpus_are_not_kept(shares):
    """Process 0 read those of an earlier run while process 1 compiled: their collectives came in
    two orders, and XLA ended both with "Received data size doesn't match expected size"."""
    assert [one["keeps_programs"] for one in shares] == [False, False]


def test_checksums_of_two_processes_are_those_of_one(shares):
    """Of a split array each sums its parts; what both have whole counts once."""
    arrays = dict(
        split=np.arange(1024, dtype=np.float32), here=np.arange(5.0), everywhere=np.int32(1)
    )
    want = verify.of_tree({name: np.asarray(x) for name, x in arrays.items()})
    assert [one["sums"] for one in shares] == [want, want]


def test_rows_of_a_training_batch_are_dealt_to_the_processes_that_hold_them(shares):
    """With the parameters split over both processes (tensor=4) each reads every row."""
    rows = np.arange(8.0).tolist()
    first, second = (one["batches"] for one in shares)
    assert first["1"] == [0, 2, [rows[:2], rows[2:4]], rows]
    assert second["1"] == [1, 2, [rows[4:6], rows[6:]], rows]
    assert first["2"] == [0, 2, [rows[:4]] * 2, rows]
    assert second["2"] == [1, 2, [rows[4:]] * 2, rows]
    assert first["4"] == second["4"] == [0, 1, [rows] * 2, rows]


def test_rows_of_a_model_s_batch_lie_on_the_devices_of_both_processes(shares):
    """Five rows are eight on four devices: a process reads its four, both have every result."""
    names = ("own", "whole", "one")
    first, second = ({name: one[name] for name in names} for one in shares)
    assert first.pop("own") == [True] * 4 + [False] * 4
    assert second.pop("own") == [False] * 4 + [True] * 4
    assert (first.pop("one"), second.pop("one")) == ([0.0, 2.0], [4.0, 0.0])  # of each device
    assert first == second == dict(whole=[0.0, 2.0, 4.0, 6.0, 8.0, 0.0, 0.0, 0.0])


def test_a_save_that_one_process_cannot_write_fails_on_both_and_the_next_succeeds(shares):
    """They would wait twenty minutes for each other, and end without the reason."""
    for number, one in enumerate(shares):
        assert one["steps"] == [1, 4]
        assert [step for step, _ in one["failures"]] == [2, 3]
        for process, (_, line) in zip((1, 0), one["failures"]):
            assert "the disk is full" in line
            assert (f"/checkpoints: process {process}: " in line) == (number != process)


def test_each_process_hears_what_all_say(shares):
    assert [one["gathered"] for one in shares] == [["of 0", "of 1"]] * 2


def test_what_all_evaluators_find_is_said_once(shares):
    assert [one["warned"] for one in shares] == [1, 0]


def test_scores_that_process_0_cannot_write_are_told_to_all(shares):
    """A run goes on without them, as one process does: on a full disk it may have room later."""
    assert shares[0]["unwritten"] in shares[1]["unwritten"]
    assert "/proc/scores" in shares[0]["unwritten"]


def test_kept_tokens_are_refused_before_any_data_are_read(shares):
    """Each process would fill the folder with rows of all."""
    for one in shares:
        assert one["refused"] == "data.features=kept is for one process, these are 2; set it to ''"
