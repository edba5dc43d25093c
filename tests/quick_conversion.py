"""Weights of other libraries are loaded without a new Python for each."""

import types

import pytest

from coca_jax.inference import loading


@pytest.fixture(scope="module", autouse=True)
def conversions_are_forks(commands):
    """In a module that imports this, the conversion that `coca_jax.load` starts is a fork: it is
    the same command. test_weights_files.py and test_tower_commands.py have it in a new Python."""
    python = types.SimpleNamespace(executable=str(commands.bin / "python"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "sys", python)
        yield
