"""What a new run lacks is one message, with a command line that runs."""

import re
import shlex

import jax
import pytest

from coca_jax.config import typed
from coca_jax.runtime import device_memory
from coca_jax.training import memory, preflight, recipes


def problems(changes, workdir="", recipe="tiny", flags=(), has_data=False):
    """(problems of the message, the suggested command's flags)"""
    config = typed(recipes.load(recipe)).change(changes)
    command = ("coca-jax", "train", f"--config={recipe}", *flags)
    keywords = dict(has_data=has_data, recipe=recipe, command=command, say=lambda _: None)
    with pytest.raises(ValueError) as error:
        preflight.check(config, workdir, **keywords)
    text, _, last = str(error.value).partition(" runs here")
    lines = re.split(r"\(\d\) ", text.rpartition(". ")[0])[1:]
    return [line.removesuffix("; ") for line in lines], shlex.split(last.rpartition(": ")[2])


def test_nothing_is_reported_for_a_run_that_can_start(tmp_path):
    keywords = dict(has_data=False, recipe="tiny", command=(), say=lambda _: None)
    preflight.check(typed(recipes.load("tiny")), str(tmp_path), **keywords)


def test_workdir_data_mesh_and_memory_are_one_message(monkeypatch):
    def step_bytes(config, mesh):  # test_memory.py asks the compiler
        rows = config.batch_size // config.accumulate_steps // mesh.size
        return 2**20 + 2**16 * rows

    monkeypatch.setattr(memory, "step_bytes", step_bytes)
    monkeypatch.setattr(device_memory, "available", lambda: 2**23)
    changes = {"batch_size": 4096, "mesh.fsdp": 16, "data.sources": (dict(path="data/none"),)}
    lines, command = problems(changes, flags=["--config.mesh.fsdp=16"])
    expected = ("--workdir", "data/none: no such folder", "fsdp=16", "batch_size=4096 needs")
    assert len(lines) == 4
    for line, words in zip(lines, expected):
        assert words in line
    assert {"--config=tiny", "--workdir=runs/tiny", "--data=scenes"} <= set(command)
    assert "--config.mesh.fsdp=16" not in command and "--config.remat=named" in command
    assert "--config.accumulate_steps=8" in command  # 4096 / 8 devices / 8 = 64 rows: 5 MiB


def test_a_batch_that_does_not_divide_is_made_one_that_does(tmp_path):
    count = jax.device_count()
    size = 2 * count + 1
    lines, command = problems(
        dict(batch_size=size), str(tmp_path), flags=["--config.batch_size=17"]
    )
    assert len(lines) == 1 and f"batch_size={size} is not a multiple of" in lines[0]
    assert f"--config.batch_size={2 * count}" in command
    assert "--config.batch_size=17" not in command


def test_a_missing_package_is_reported_with_the_rest(monkeypatch):
    monkeypatch.setattr(preflight, "check_loader", _missing)
    lines, command = problems({"data.loader": "seqio"}, recipe="tiny")
    assert lines[1] == "needs the extra 'seqio'"
    assert "--config.data.loader=direct" in command


def _missing(loader):
    raise ValueError("needs the extra 'seqio'")
