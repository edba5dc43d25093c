"""Kernels for decoding on a CPU: products with weights in panels, attention over caches and images.

XLA's own products reach memory at less than half its rate when there are few rows, which is what a
step of decoding has. The source, `cpu_kernels.cc`, is compiled at first use by the machine's C++
compiler for the machine's processor, and kept. Numbers: docs/performance.md, "Captions beside
open_clip".
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import subprocess
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 16  # columns of a panel
WIDEST_HEAD = 128
SOURCE = pathlib.Path(__file__).with_name("cpu_kernels.cc")
# No -ffast-math: the library would switch off denormal numbers in the whole process.
FLAGS = (
    "-std=c++17 -O3 -march=native -fPIC -shared -pthread"
    " -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros"
)


def folder() -> pathlib.Path:
    """Where compiled things are kept between starts: ~/.cache/coca_jax, or below XDG_CACHE_HOME."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home) / "coca_jax"


@functools.cache
def available() -> bool:
    """Compiles and registers the kernels; False, with a warning that says why, where it cannot.

    The compiler is CXX of the environment, or c++. COCA_JAX_CPU_KERNELS=0 switches the kernels off.
    """
    if os.environ.get("COCA_JAX_CPU_KERNELS") == "0":
        return False
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, ValueError) as error:
        logging.getLogger("coca_jax").warning(
            "Captions on this CPU will take about 1.4 times as long as they need: %s. Install g++ "
            "or clang++, or name a C++ compiler in CXX; COCA_JAX_CPU_KERNELS=0 says no to it.",
            error,
        )
        return False
    for name in ("coca_jax_product", "coca_jax_attention", "coca_jax_image_attention"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def _build() -> pathlib.Path:
    """The compiled library. Raises ValueError with the compiler's words, or OSError."""
    command = [*shlex.split(os.environ.get("CXX") or "c++"), *FLAGS.split()]
    command += ["-isystem", jax.ffi.include_dir()]
    made_for = (SOURCE.read_text(), command, jax.__version__, _processor())
    key = hashlib.sha256(repr(made_for).encode()).hexdigest()[:16]
    library = folder() / f"cpu_kernels-{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = pathlib.Path(scratch) / library.name
        try:
            done = subprocess.run(
                [*command, str(SOURCE), "-o", str(made)], capture_output=True, text=True
            )
        except FileNotFoundError:
            raise ValueError(f"there is no C++ compiler {command[0]!r}") from None
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "failed")
            raise ValueError(f"{command[0]} cannot compile {SOURCE.name} ({first})")
        made.replace(library)
    return library


def _processor() -> str:
    """What the processor can do: a home folder may be shared by machines that differ."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def panels(kernel: jax.Array) -> jax.Array:
    """[D, F] as product() reads it, float32 [ceil(F / 16), D, 16], padded with zeros."""
    depth, width = kernel.shape
    kernel = jnp.pad(kernel.astype(jnp.float32), ((0, 0), (0, -width % LANES)))
    return kernel.reshape(depth, -1, LANES).transpose(1, 0, 2)


def product(x: jax.Array, panels: jax.Array, width: int) -> jax.Array:
    """x [R, D] @ the kernel [D, F] of which `panels` were made, F = width: float32 [R, F]."""
    return grouped_product(x[:, None], panels[None], width)[:, 0]


def grouped_product(x: jax.Array, panels: jax.Array, width: int) -> jax.Array:
    """A kernel for each group: x [R, G, D], panels [G, ceil(F / 16), D, 16] -> [R, G, F]."""
    out = jax.ShapeDtypeStruct((*x.shape[:2], width), jnp.float32)
    return jax.ffi.ffi_call("coca_jax_product", out)(x.astype(jnp.float32), panels)


class ImagePanels(NamedTuple):
    """Image tokens [B, Q, D] as attend_image() reads them."""

    tokens: jax.Array  # [B, ceil(Q / 16), D, 16]
    channels: jax.Array  # [B, ceil(D / 16), Q, 16]


def image_panels(image_tokens: jax.Array) -> ImagePanels:
    """Image tokens [B, Q, D] in both orders."""
    turned = image_tokens.transpose(0, 2, 1)
    return ImagePanels(jax.vmap(panels)(turned), jax.vmap(panels)(image_tokens))


def attend_image(query: jax.Array, image: ImagePanels) -> jax.Array:
    """[B, N, D] over image tokens as keys and as values: float32 [B, N, D]; no scale."""
    out = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    return jax.ffi.ffi_call("coca_jax_image_attention", out)(query, *image)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[B, H, N, K] x [B, H, M, K] -> [B, N, H K], float32; scores are not scaled.

    mask: bool [B, N, M], at least one true in each row; None: all. What it hides is not read.
    K must be a multiple of 16, up to WIDEST_HEAD.
    """
    batch, heads, count, width = query.shape
    if mask is None:
        mask = jnp.ones((batch, count, key.shape[2]), bool)
    out = jax.ShapeDtypeStruct((batch, count, heads, width), jnp.float32)
    call = jax.ffi.ffi_call("coca_jax_attention", out)
    return call(query, key, value, mask).reshape(batch, count, heads * width)
