"""Kernels of C++ for a CPU: compiled at first use by the machine's own compiler, for its own
processor, and kept in the cache folder. Several at once, where who needs them begins in time."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import shlex
import shutil
import stat
import subprocess
import tempfile
import time

import jax

from coca_jax.runtime import cache_folder, machine, storage

HEADERS = tuple(sorted(pathlib.Path(__file__).parent.glob("*.h")))  # what the sources share
# No -ffast-math: the library would switch off denormal numbers in the whole process.
FLAGS = (
    "-std=c++17 -O3 -march=native -fPIC -shared -pthread"
    " -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros"
)

BFLOAT16 = "COCA_JAX_BFLOAT16"  # defined for kernels whose products are of that
SCRATCH = "compiling-"  # folders in which compilers write
ABANDONED = 3600.0  # seconds: none takes so long

Library = concurrent.futures.Future[ctypes.CDLL]
_warned: set[str] = set()  # why kernels are not there: one warning for all that lack a compiler
_compilers = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="kernels")


@functools.cache
def begin(source: pathlib.Path, define: str) -> Library:
    """Begins to compile a source file and does not wait; no failure is told before `register`."""
    return _compilers.submit(_build, source, define)


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies pairs of bfloat16 and adds them up in float32."""
    return "avx512_bf16" in machine.processor().split()


def switched_off() -> bool:
    """Whether the environment says that there are to be no kernels (COCA_JAX_CPU_KERNELS=0)."""
    return os.environ.get("COCA_JAX_CPU_KERNELS") == "0"


@functools.cache
def register(source: pathlib.Path, names: tuple[str, ...], without: str, define: str = "") -> bool:
    """Compiles a source file and registers its kernels, coca_jax_{name}, with JAX; False, with a
    warning that says why, once for each cause, where it cannot.

    without: what the kernels' lack costs, for the warning. define: a macro to compile it with.
    The compiler is CXX of the environment, or c++. COCA_JAX_CPU_KERNELS=0 switches all kernels off.
    """
    if switched_off():
        return False
    try:
        library = begin(source, define).result()
    except (OSError, ValueError) as error:
        if str(error) in _warned:
            return False
        _warned.add(str(error))
        remedy = "Name a folder in XDG_CACHE_HOME that has room, and from which programs may run"
        if isinstance(error, ValueError):
            remedy = "Install g++ or clang++, or name a C++ compiler in CXX"
        logging.getLogger("coca_jax").warning(
            "%s: %s. %s; COCA_JAX_CPU_KERNELS=0 says no to it.", without, error, remedy
        )
        return False
    for name in names:
        name = f"coca_jax_{name}"
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def register_bfloat16(source: pathlib.Path, names: tuple[str, ...], without: str) -> bool:
    """`register` of the same kernels for bfloat16, by the names that `target` gives; False without
    a word on a processor that lacks it."""
    if not multiplies_bfloat16():
        return False
    return register(source, tuple(f"bfloat16_{name}" for name in names), without, BFLOAT16)


def target(name: str, halves: bool) -> str:
    """What JAX knows a kernel by that is compiled for both; halves: that for bfloat16."""
    return f"coca_jax_{'bfloat16_' * halves}{name}"


def _build(source: pathlib.Path, define: str) -> ctypes.CDLL:
    """The compiled library, loaded. Raises ValueError with the compiler's words, or OSError where
    there is no place for it, or it cannot be loaded from there."""
    command = [*shlex.split(os.environ.get("CXX", "").strip() or "c++"), *FLAGS.split()]
    command += [f"-D{define}"] * bool(define) + ["-isystem", jax.ffi.include_dir()]
    texts = [file.read_text() for file in (source, *HEADERS)]
    made_for = (texts, command, jax.__version__, machine.processor())
    key = hashlib.sha256(repr(made_for).encode()).hexdigest()[:16]
    folder = cache_folder.folder()
    if found := _loaded(folder, key):
        return found
    _clear(folder)
    turn = folder / f"{SCRATCH}{key}"
    turn.mkdir(mode=0o700, exist_ok=True)
    try:
        with storage.alone_in(turn):  # the processes of a run all want it at once
            return _loaded(folder, key) or _compiled(command, source, folder, key)
    finally:
        shutil.rmtree(turn, ignore_errors=True)


def _loaded(folder: pathlib.Path, key: str) -> ctypes.CDLL | None:
    """The library that is there already."""
    for library in folder.glob(f"cpu_kernels-{key}-*.so"):
        if _is_whole(library):
            # A folder that machines share may hold that of another system, with another C library.
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(library))
    return None


def _compiled(
    command: list[str], source: pathlib.Path, folder: pathlib.Path, key: str
) -> ctypes.CDLL:
    """Compiles and loads it. Raises as `_build`."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
        made = pathlib.Path(scratch) / "kernels.so"
        try:
            done = subprocess.run(
                [*command, str(source), "-o", str(made)], capture_output=True, text=True
            )
        except FileNotFoundError:
            raise ValueError(f"there is no C++ compiler {command[0]!r}") from None
        except OSError as error:  # such as a file that may not be run
            raise ValueError(f"cannot run the C++ compiler {command[0]!r} ({error})") from None
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "failed")
            raise ValueError(f"{command[0]} cannot compile {source.name} ({first})")
        made.chmod(0o700)
        library = folder / f"cpu_kernels-{key}-{_digest(made)}.so"
        made.replace(library)
    return ctypes.CDLL(str(library))


def _clear(folder: pathlib.Path) -> None:
    """Removes what compilations that were killed have left behind."""
    for scratch in folder.glob(f"{SCRATCH}*"):
        with contextlib.suppress(FileNotFoundError):  # one that ends just now
            if time.time() - scratch.stat().st_mtime > ABANDONED:
                shutil.rmtree(scratch, ignore_errors=True)


def _is_whole(library: pathlib.Path) -> bool:
    """Whether a kept library is a file of this user's alone and has the contents that its name
    tells: it will be run."""
    try:
        found = library.lstat()
        mine = stat.S_ISREG(found.st_mode) and not cache_folder.others_may_write(found)
        return mine and library.stem.endswith(f"-{_digest(library)}")
    except FileNotFoundError:  # another process has just removed it
        return False


def _digest(library: pathlib.Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]
