"""Keeps what libraries print of their own accord off the screen of a normal run.

Commands call `environment` before anything heavy is imported. What a user set already stays.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import logging
import os
import pathlib
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

import absl.logging

_OF_SAVES = ("future.py", "async_checkpointer.py", "checkpoint_manager.py")  # of Orbax
GOOGLE, ACCELERATORS = "0x1ae0", ("/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/accel*")


def environment() -> None:
    """Settings that libraries read when they are imported."""
    # TensorFlow reads records and texts here, on the CPU; it reports every GPU that it misses.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # PIL's two lines on a large picture, of which this package has its own limit and its own line.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    # Said to programs of each call; a command makes one for each batch of its data.
    warnings.filterwarnings("ignore", r"\d+ of \d+ texts are cut: ")
    if importlib.util.find_spec("libtpu") and not has_accelerator():
        # There for `compile` alone. JAX would start it, and it complains of the missing TPU.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


class PlainFormatter(logging.Formatter):
    """'warning: text' in place of absl's prefix with a time, a thread and a source line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING or text.startswith(("warning: ", "error: ")):
            return text
        return f"{'error' if record.levelno >= logging.ERROR else 'warning'}: {text}"


def plain_warnings() -> None:
    """Logs and Python's warnings are plain lines on standard error from now on."""
    absl.logging.get_absl_handler().setFormatter(PlainFormatter())
    former = warnings.formatwarning

    def plain(message: Any, category: Any, filename: str, lineno: int, line: Any = None) -> str:
        if category is UserWarning:  # ours; those of libraries name their place
            return f"warning: {message}\n"
        return former(message, category, filename, lineno, line)

    warnings.formatwarning = plain


class Lasting:
    """Standard error of a run of days: a full disk, or a reader that is gone, loses its lines and
    never ends the run."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> int:
        """Writes what can be written."""
        with contextlib.suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes what can be written."""
        with contextlib.suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def checkpoints() -> None:
    """Drops what Orbax and TensorStore print of saves and restores that fail: two hundred lines of
    tracebacks where the disk is full, a traceback an array where files are missing. Whoever saves
    or restores says in a line what went wrong."""
    logging.getLogger("absl").addFilter(_not_of_saves)
    logging.getLogger("asyncio").addFilter(_not_of_lost_writes)
    before = sys.unraisablehook

    def hook(found: sys.UnraisableHookArgs, /) -> None:
        # Other reads come to their end after the first one that failed has closed the loop.
        if found.object is not None or str(found.exc_value) != "Event loop is closed":
            before(found)

    sys.unraisablehook = hook


def _not_of_saves(record: logging.LogRecord) -> bool:
    path = pathlib.PurePath(record.pathname)
    return "orbax" not in path.parts or path.name not in _OF_SAVES


def _not_of_lost_writes(record: logging.LogRecord) -> bool:
    """False for an error of Orbax that nobody has asked for: of the writes that go on together the
    first one to fail is raised, and asyncio logs all others."""
    if "exception was never retrieved" not in record.getMessage() or not record.exc_info:
        return True
    frames = traceback.extract_tb(record.exc_info[2])
    return not any("orbax" in pathlib.PurePath(frame.filename).parts for frame in frames)


def has_accelerator() -> bool:
    """Whether this machine seems to have a TPU or a GPU, by its devices."""
    if "JAX_FORCE_TPU_INIT" in os.environ or any(glob.glob(name) for name in ACCELERATORS):
        return True
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    return any(pathlib.Path(path).read_text().strip() == GOOGLE for path in vendors)


def standard_output() -> None:
    """Sends what is not Python's own from standard output to nowhere, for the rest of the process.

    Gloo, through which CPU processes speak, prints a line for every connection there.
    """
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Keeps back what a library prints on standard error while it is imported, Python's warnings
    included; an import that fails shows all of it.

    TensorFlow's first lines come before it has read any setting.
    """
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(before, kept.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
