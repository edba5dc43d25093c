"""A step on a CPU finds the pages of the step before, where the user has not set glibc up."""

import json
import os
import subprocess
import sys

import pytest

from coca_jax import freed_memory

# A result of 64 MiB, 16,384 pages, freed before the next one; after some runs to get there.
STEPS = """
import json, resource, sys
from coca_jax import freed_memory
if sys.argv[1] == "begin":
    freed_memory.begin()
kept = freed_memory.keep()
import jax, jax.numpy as jnp
import numpy as np

run, x = jax.jit(lambda x: jnp.outer(x, x)), np.ones(4096, np.float32)
for _ in range(6):
    run(x).block_until_ready()
cleared = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(5):
    run(x).block_until_ready()
    cleared.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(json.dumps([kept, float(np.median(np.diff(cleared)))]))
"""


def pages(what, **environment):
    """(whether memory is kept, pages that the kernel clears in a step)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "XLA_"))}
    env |= {"JAX_PLATFORMS": "cpu"} | environment
    run = [sys.executable, "-c", STEPS, what]
    found = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.skipif(freed_memory._function("mallopt") is None, reason="not glibc")
def test_steps_clear_no_pages_again():
    kept, faults = pages("begin")
    assert kept and faults < 200
    kept, faults = pages("leave")
    assert not kept and faults > 10_000


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_PLATFORMS": "cuda,cpu"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"},
        {"MALLOC_ARENA_MAX": "4"},
    ],
)
def test_other_devices_and_a_users_settings_are_left_alone(monkeypatch, environment):
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    options = []
    monkeypatch.setattr(freed_memory, "_begun", False)
    monkeypatch.setattr(freed_memory, "_function", lambda _: lambda *pair: options.append(pair))
    freed_memory.begin()
    assert options == [(freed_memory.ARENA_MAX, 1)]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    freed_memory.begin()
    assert not freed_memory.keep() and len(options) == 1
