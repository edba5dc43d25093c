"""Kernels for bfloat16 in a form that this processor would not choose, in place of its own."""

import contextlib
import functools

import jax
import pytest

from coca_jax.ops.cpu import build

TILES, VECTORS = "tiles", "vectors"  # of a processor with tiles (AMX) the first is its own choice


@functools.cache
def _register(source, names):
    """Those of a source file, compiled without tiles, as vectors_{their name}."""
    library = build._build(source, build.BFLOAT16)
    for name in names:
        found = jax.ffi.pycapsule(getattr(library, build.target(name, True)))
        jax.ffi.register_ffi_target(f"vectors_{name}", found, platform="cpu")


@contextlib.contextmanager
def chosen(form, kernels):
    """Those of the module `kernels` in a form; without tiles, the second is the first: skipped."""
    if form == TILES:
        yield
        return
    if "amx_bf16" not in build.compile_cache.processor().split():
        pytest.skip("a processor without tiles has this form alone")
    own = build.target
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "c++ -mno-amx-bf16")
        _register(kernels.SOURCE, kernels.KERNELS)
        patch.setattr(build, "target", lambda n, halves: f"vectors_{n}" if halves else own(n, 0))
        jax.clear_caches()  # what was traced calls the other form
        yield
    jax.clear_caches()
