"""A step on a CPU takes huge pages, where the system gives them to those who ask."""

import json
import os
import subprocess
import sys

import pytest

from coca_jax.runtime import huge_pages

# Whether the system has huge pages left is its matter, so what is told is whether it was asked:
# "hg" among the flags of the memory where a result of 64 MiB lies (man 5 proc_pid_smaps).
STEPS = """
import sys
from coca_jax.runtime import huge_pages
huge_pages.begin_again()
import json, pathlib
import jax, jax.numpy as jnp
import numpy as np

run, x = jax.jit(lambda x: jnp.outer(x, x)), np.ones(4096, np.float32)
asked = []
for _ in range(3):
    result = run(x).block_until_ready()
    address, inside = result.unsafe_buffer_pointer(), False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            begin, end = (int(x, 16) for x in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "VmFlags:":
            asked.append("hg" in rest)
    del result
print(json.dumps([asked, sys.argv[1:]]))
"""
RECIPE = """
import os, sys
def get_config():
    raise ValueError(f"{os.environ.get('GLIBC_TUNABLES')} {sys.argv[1:]}")
"""
CPU = {"JAX_PLATFORMS": "cpu"}
needs_asking = pytest.mark.skipif(
    not huge_pages.OF_THE_SYSTEM.exists()
    or "[madvise]" not in huge_pages.OF_THE_SYSTEM.read_text(),
    reason="the system gives huge pages to all or to nobody",
)


def environment(**more):
    """Without what the tests set for XLA, or a user for glibc."""
    mine = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", huge_pages.SETTINGS)}
    return mine | CPU | more


def steps(**more):
    """(for each of three steps, whether huge pages were asked for; the arguments that arrived)."""
    run = [sys.executable, "-c", STEPS, "a b", "--c='d'"]
    found = subprocess.run(run, env=environment(**more), capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


@needs_asking
def test_a_step_asks_for_huge_pages():
    arguments = ["a b", "--c='d'"]
    assert steps() == [[True] * 3, arguments]
    assert steps(GLIBC_TUNABLES="glibc.malloc.hugetlb=0") == [[False] * 3, arguments]


@needs_asking
@pytest.mark.parametrize("module", ["coca_jax train", "coca_jax.train"])
def test_a_command_that_trains_starts_with_them(module, tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    flags = [f"--config={tmp_path}/recipe.py", f"--workdir={tmp_path}/a run"]
    run = [sys.executable, "-m", *module.split(), *flags]
    own = {huge_pages.SETTINGS: "glibc.malloc.tcache_count=7"}
    done = subprocess.run(run, env=environment(**own), capture_output=True, text=True)
    wanted = "glibc.malloc.tcache_count=7:glibc.malloc.hugetlb=1"
    assert done.returncode == 2
    assert f"{wanted} {flags[::-1]}" in done.stderr or f"{wanted} {flags}" in done.stderr


@needs_asking
def test_other_devices_and_a_user_s_value_are_left_alone(monkeypatch):
    monkeypatch.delenv(huge_pages.SETTINGS, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert huge_pages.helps()
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert not huge_pages.helps()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv(huge_pages.SETTINGS, "glibc.malloc.hugetlb=0")
    assert not huge_pages.helps()


def test_nothing_begins_again_where_it_would_not_help(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv(huge_pages.SETTINGS, raising=False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("began again"))
    for text in ("[always] madvise never", "always madvise [never]"):
        (tmp_path / "enabled").write_text(text)
        monkeypatch.setattr(huge_pages, "OF_THE_SYSTEM", tmp_path / "enabled")
        huge_pages.begin_again()
    monkeypatch.setattr(huge_pages, "OF_THE_SYSTEM", tmp_path / "none")
    huge_pages.begin_again()
    assert huge_pages.SETTINGS not in os.environ
