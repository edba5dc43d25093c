"""Programs of models that tests build again, compiled once for all tests of a process."""

from collections.abc import Callable
from typing import Any

import jax
import pytest

from coca_jax.inference import embeddings, explain

KEPT: dict[tuple, Any] = {}


def kept(make: Callable) -> Callable:
    """`make`, whose result is that of before where module, configuration and devices are equal."""

    def made(module, model, devices, *more):
        key = (make, module, repr(model), devices.mesh, devices.platform, *more)
        if key not in KEPT:
            KEPT[key] = make(module, model, devices, *more)
        return KEPT[key]

    return made


@pytest.fixture(scope="module", autouse=True)
def no_compile_cache():
    """In a module that imports this, programs are kept in memory and not on disk. Models that
    differ in nothing but their parameters, which programs take as an argument, share them."""
    jax.config.update("jax_enable_compilation_cache", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "Programs", kept(embeddings.Programs))
        patch.setattr(explain, "program", kept(explain.program))
        yield
    jax.config.update("jax_enable_compilation_cache", True)
