"""Processes join, before the first collective."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from coca_jax import processes

ROOT = pathlib.Path(__file__).parent.parent
STEP = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="a", SLURM_LOCALID="0", SLURM_PROCID="0")


@pytest.fixture
def environment(monkeypatch):
    """Sets variables in an environment that names no processes; the list of what was joined."""
    for name in (
        *("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES", *STEP),
        *("TPU_WORKER_HOSTNAMES", "TPU_ML_PLATFORM"),
    ):
        monkeypatch.delenv(name, raising=False)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **_: joined.append(a))

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
    processes.start()
    assert joined == ([()] if joins else [])
    for some in (("host:1",), ("", 2), ("host:1", 2), ("", 0, 0)):
        with pytest.raises(ValueError, match="go together"):
            processes.start(*some)
    processes.start("host:1", 2, 0)
    assert joined[-1] == ("host:1", 2, 0)


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
        processes.start()
    assert not joined


ALONE = """
import sys
from coca_jax import processes
processes.TOLD_AFTER = processes.TOLD_EVERY = 0.3
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
            told = [one.stderr.readline() for _ in range(2)]
        finally:
            one.kill()
    assert told == [f"waiting for 2 processes at localhost:{port}, this is process 0\n"] * 2
