"""Kernels for bfloat16 in the form that they have on a processor without tiles (AMX)."""

import contextlib
import functools

import jax
import pytest

from coca_jax.ops.cpu_kernels import build

HAS_TILES = "amx_bf16" in build.machine.processor().split()


@functools.cache
def _register(source, names):
    """Those of a source file, compiled without tiles, as vectors_{their name}: for this processor,
    but soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", build.FLAGS.replace("-O3", "-O1") + " -mno-amx-bf16")
        library = build._build(source, build.BFLOAT16)
    for name in names:
        found = jax.ffi.pycapsule(getattr(library, build.target(name, True)))
        jax.ffi.register_ffi_target(f"vectors_{name}", found, platform="cpu")


@contextlib.contextmanager
def without_tiles(kernels):
    """Those of the module `kernels` in that form."""
    _register(kernels.SOURCE, kernels.KERNELS)
    own = build.target
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "target", lambda n, halves: f"vectors_{n}" if halves else own(n, 0))
        jax.clear_caches()  # what was traced calls the other form
        yield
    jax.clear_caches()


def forms(kernels):
    """Contexts for all forms that there are: the processor's own, and the other one."""
    return [contextlib.nullcontext(), *[without_tiles(kernels)] * HAS_TILES]
