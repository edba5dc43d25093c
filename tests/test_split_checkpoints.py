"""Checkpoints whose arrays are split over processes: all of them come to the same step."""

import os
import socket
import subprocess
import sys

import pytest

TWO = """
import glob, os, sys
import jax, numpy as np
from coca_jax.parallel import sharding as partitioning
from coca_jax.checkpoints import manager as checkpointing
from coca_jax.training.state import TrainState
from jax.sharding import NamedSharding, PartitionSpec as P

number, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, number)
mesh = partitioning.make_mesh(1, 2, 1, devices=jax.devices())
split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())

def array(value, shape, where):
    noise = np.random.default_rng(0).normal(size=shape) if shape else 0  # else it is packed away
    values = np.asarray(value + noise, np.float32)
    return jax.make_array_from_callback(shape, where, lambda i: values[i])

def state(step):
    counter = lambda value: array(value, (), whole).astype("int32")
    w = array(step, (4096, 64), split)
    return TrainState(counter(step), counter(0), dict(w=w), dict(m=w), None)

with jax.set_mesh(mesh):
    found = checkpointing.Checkpoints(workdir, run={})
    for step in (1, 2):
        found.save(step, state(step))
        found.wait()
    if number == 1:
        files = glob.glob(f"{workdir}/checkpoints/2/params/ocdbt.process_1/d/*")
        open(max(files, key=os.path.getsize), "w").close()
    checkpointing._meet("damaged")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(1))
    shardings = jax.tree.map(lambda x: x.sharding, state(1))
    kept, step, lines = found.restore_newest(abstract, shardings)
    print("restored", step, round(float(kept.params["w"].mean()), 1), lines[0][:23], flush=True)
    found.close()
"""


@pytest.mark.long
def test_damage_that_one_of_two_processes_sees_sends_both_back(tmp_path):
    """The checksum of an array that is split over both is computed by both, or by none."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(number), str(port), str(tmp_path)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [one.communicate(timeout=120)[0] for one in both]
    finally:
        for one in both:
            one.kill()
    assert all("restored 1 1.0 checkpoint 2 is damaged" in text for text in said), said
