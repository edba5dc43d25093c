"""Processes join, and agree on what they train, before the first collective."""

import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from coca_jax.data import source_index
from coca_jax.runtime import activity, multihost

ROOT = pathlib.Path(__file__).parent.parent
STEP = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="a", SLURM_LOCALID="0", SLURM_PROCID="0")


@pytest.fixture
def environment(monkeypatch):
    """Sets variables in an environment that names no processes; the list of what was joined."""
    for name in (
        *("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES", *STEP),
        *("TPU_WORKER_HOSTNAMES", "TPU_ML_PLATFORM", "SLURM_STEP_NUM_NODES"),
        *("OMPI_COMM_WORLD_LOCAL_SIZE", "CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS"),
    ):
        monkeypatch.delenv(name, raising=False)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **_: joined.append(a))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def set_all(env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return joined

    return set_all


@pytest.mark.parametrize(
    "env, joins",
    [
        ({}, False),
        (dict(SLURM_NTASKS="2", **STEP), True),
        (dict(SLURM_NTASKS="1", **STEP), False),
        (dict(SLURM_NTASKS="2"), False),  # an allocation, outside of a step
        (dict(SLURM_NTASKS="", **STEP), False),
        (dict(OMPI_COMM_WORLD_SIZE="2"), True),
        # mpirun in a batch script, which has a process number of SLURM's
        (dict(OMPI_COMM_WORLD_SIZE="2", SLURM_NTASKS="2", SLURM_PROCID="0"), True),
        (dict(MEGASCALE_NUM_SLICES="2"), True),
        (dict(TPU_WORKER_HOSTNAMES="a,b"), True),
        (dict(TPU_WORKER_HOSTNAMES="a,"), False),
    ],
)
def test_a_process_joins_others_where_its_environment_has_several(env, joins, environment):
    joined = environment(env)
    multihost.start()
    assert joined == ([()] if joins else [])
    for some in (("host:1",), ("", 2), ("host:1", 2), ("", 0, 0)):
        with pytest.raises(ValueError, match="go together"):
            multihost.start(*some)
    multihost.start("host:1", 2, 0)
    assert joined[-1] == ("host:1", 2, 0)


def test_an_mpi_that_says_no_place_to_meet_is_answered_with_the_flags(monkeypatch):
    """Open MPI 5, where jax 0.10 finds no coordinator."""
    for name in STEP:
        monkeypatch.delenv(name, raising=False)
    env = dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_LOCAL_SIZE="2")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"not all that .* give --coordinator=HOST:PORT, "):
        multihost.start()


TWO_NODES = dict(SLURM_STEP_NUM_NODES="2", **STEP)


@pytest.mark.parametrize(
    "env, all_of_them",
    [
        (dict(SLURM_NTASKS="2", **TWO_NODES), True),  # one a node
        (dict(SLURM_NTASKS="16", **TWO_NODES), False),  # one a GPU
        (dict(SLURM_NTASKS="16", **TWO_NODES, CUDA_VISIBLE_DEVICES="0,1,2"), False),
        (dict(SLURM_NTASKS="16", **TWO_NODES, CUDA_VISIBLE_DEVICES="0"), True),  # gpus-per-task=1
        (dict(SLURM_NTASKS="2", **TWO_NODES, JAX_LOCAL_DEVICE_IDS="1"), False),
        (dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_SIZE="1"), True),
        (dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_SIZE="2"), False),
        (dict(KUBERNETES_SERVICE_HOST="10.0.0.1"), True),
    ],
)
def test_a_process_alone_on_its_node_takes_all_gpus_there(
    env, all_of_them, environment, monkeypatch
):
    """Of others of SLURM and MPI jax makes the choice, which gives each the one of its number."""
    environment(env)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **told: joined.append(told))
    multihost.start("host:1", 2, 0)
    multihost.start()
    for told in joined:
        assert told.get("local_device_ids") == (() if all_of_them else None)
    assert len(joined) == 1 + ("KUBERNETES_SERVICE_HOST" not in env)


@pytest.mark.parametrize(
    "env, said",
    [
        (
            dict(SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_ID="7"),
            r"SLURM_NTASKS=2 says 2 processes, .* missing \(SLURM_STEP_NODELIST\): start it with "
            "srun, or unset SLURM_NTASKS",
        ),
        (dict(SLURM_NTASKS="two"), "SLURM_NTASKS=two in the environment is no number"),
        (dict(SLURM_NTASKS="2", **STEP | dict(SLURM_LOCALID="x")), "SLURM_LOCALID=x .* no number"),
        (dict(OMPI_COMM_WORLD_SIZE="-"), "OMPI_COMM_WORLD_SIZE=- in the environment"),
    ],
)
def test_an_environment_that_names_no_process_is_refused_by_its_variable(env, said, environment):
    joined = environment(env)
    with pytest.raises(ValueError, match=said):
        multihost.start()
    assert not joined


def test_what_another_process_writes_is_waited_for_with_a_word_and_a_bound(monkeypatch, capsys):
    """Of the index that process 0 makes, which had no bound."""
    clock = itertools.count(0, 40_000)

    class Hours:
        monotonic = staticmethod(lambda: next(clock))
        sleep = staticmethod(lambda seconds: None)

    monkeypatch.setattr(activity, "time", Hours)
    parts, looks = activity.parts(), iter([None, None, 7])
    assert activity.until("process 0", lambda: next(looks), hours=24) == 7
    assert activity.parts() == parts + 2 and capsys.readouterr().err == "waiting for process 0\n"
    with pytest.raises(ValueError, match="waited 24 h for process 0 to write the split 'train' of"):
        source_index.wait_for("memory://nobody", "train")
    assert next(clock) == 280_000  # after three looks, the last of which was after a day


ALONE = """
import sys
from coca_jax.runtime import multihost as processes
processes.NOTICE_AFTER = processes.NOTICE_EVERY = 0.3
processes.start(f"localhost:{sys.argv[1]}", 2, 0)
"""


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return str(server.getsockname()[1])


def python(*arguments, **pipes):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", *arguments]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, **pipes)


def test_a_process_says_which_others_it_waits_for():
    port = free_port()
    with python(ALONE, port) as one:
        try:
            lines = (line for line in one.stderr if line.startswith("waiting"))  # jax may warn
            told = list(itertools.islice(lines, 2))
        finally:
            one.kill()
    assert told == [f"waiting for 2 processes at localhost:{port}, this is process 0\n"] * 2


AGREE = """
import json, os, sys, time, types
from coca_jax.runtime import signals as stopping
stopping.install()
import jax
from coca_jax import config
from coca_jax.runtime import multihost as processes
from coca_jax.evaluation import runner as tasks
from coca_jax.training import multihost_checks as agreement; from coca_jax.runtime import lease
number, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
processes.start(f"localhost:{port}", 2, number)
stopping.current().joined(jax.process_count())
agreement.SEEN_WITHIN = 0.6
shared, other = f"{folder}/run", f"{folder}/own{number}"
plain = config.Config()
said = {}

def tell(name, check):
    try:
        check()
        said[name] = ""
    except processes.KnownToAll as error:
        said[name] = str(error)

threads = plain.change({"data.num_threads": 3 + number})
tell("same", lambda: agreement.on_command(threads.to_dict(), shared))
faster = plain.change({"optimizer.learning_rate": 5e-4, "seed": 3})
tell("config", lambda: agreement.on_command((faster if number else plain).to_dict(), shared))
sources = [dict(path=f"{folder}/{name}", split="train") for name in "ab"]
mine = plain.change({"data.sources": (sources[0], sources[number])})
other_data = {"--data": f"{folder}/{'ab'[number]}"} | ({"--text_field": "x"} if number else {})
tell("flags", lambda: agreement.on_command(plain.to_dict(), shared, other_data))
tell("source", lambda: agreement.on_command(mine.to_dict(), shared))
tell("workdir", lambda: agreement.on_command(plain.to_dict(), other))
told = dict(plain.to_dict(), data_digests=[dict(examples=9 + number, sha256="a")], workdir=other)
tell("data", lambda: agreement.on_data(told, shared, 9))
tell("again", lambda: agreement.on_data(plain.to_dict(), shared, 9))

def scored(**how):
    model = types.SimpleNamespace(num_frames=0, batch_size=8, checksum=lambda: "ab")
    vars(model).update(how)
    tasks.run_tasks(model, [], f"{folder}/scores")

tell("scores", scored)
tell("weights", lambda: scored(checksum=lambda: "ab" if number else "cd"))
tell("batches", lambda: scored(batch_size=8 + number))
images = {"retrieval/a examples": str(20 - number)}
tell("examples", lambda: processes.compare("examples", images))
said["left"] = number == 0 and (os.path.exists(shared) or os.path.exists(other))

def take():
    with lease.held(shared):
        raise AssertionError
if number == 0:
    os.makedirs(shared)
    held = lease.Lease(shared)
    held.acquire()
tell("lease", take)
if number == 0:
    held.release()
print(json.dumps(said), flush=True)
with stopping.failing_alone(2):
    if number == 0:
        time.sleep(100)  # as in a collective
    raise ValueError("no such\\nfolder")
"""


def test_processes_that_differ_all_say_so_and_end(tmp_path):
    port = free_port()
    both = [python(AGREE, str(n), port, str(tmp_path), stdout=subprocess.PIPE) for n in range(2)]
    try:
        outs = [one.communicate(timeout=100) for one in both]
    finally:
        for one in both:
            one.kill()
    assert [one.returncode for one in both] == [2, 2], outs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outs)  # Gloo has lines too
    assert first == second and first["same"] == first["again"] == "" and not first["left"]
    assert first["config"] == (
        "process 1 has optimizer.learning_rate=0.0005, process 0 has 0.0008 (seed too); start "
        "all processes with the same command, recipe and data"
    )
    assert f'has data.sources[1].path="{tmp_path}/b", process 0 has "{tmp_path}/a";' in str(
        first["source"]
    )
    assert first["flags"] == (
        f"process 1 has --data={tmp_path}/b, process 0 has {tmp_path}/a (--text_field too); start "
        "all processes with the same command, recipe and data"
    )
    assert first["workdir"] == (
        f"{tmp_path}/own1 of process 1 is not the folder of process 0 ({tmp_path}/own0): the "
        "workdir must be shared by all processes, or lie in a bucket"
    )
    assert "process 1 has data_digests[0].examples=10, process 0 has 9; start" in first["data"]
    assert first["scores"] == "" and not any(
        json.loads((tmp_path / "scores/eval.json").read_text())
    )
    assert "process 1 has weights=ab, process 0 has cd; start" in first["weights"]
    assert "process 1 has batch_size=9, process 0 has 8; start" in first["batches"]
    assert "process 1 has retrieval/a examples=19, process 0 has 20; start" in first["examples"]
    assert f"{tmp_path}/run is in use: process {both[0].pid} on host" in first["lease"]
    assert outs[0][1].endswith("error: process 1 ended: no such folder\n")
    assert outs[1][1].endswith("error: no such folder\n")
