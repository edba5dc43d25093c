"""What a store fails to give, told apart from what is damaged.

Whoever reads strangers' files takes whatever goes wrong as damage of the file, and goes on. Of a
store that does not answer that would be a loss for good: what lies behind the gap would be missing
in an import that counts as finished. So reads of remote files that fail are noted here, whoever
catches them, and imports ask.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

# What says that nothing is there, or that it is no file: another try gives the same.
ANSWERS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
Failure = tuple[str, Exception]  # the file's path, and what its store said

_noted: contextvars.ContextVar[list[Failure] | None] = contextvars.ContextVar("noted", default=None)


class Unreachable(OSError):
    """A store did not give a file, or not all of it; what the file holds is not known."""


def error(path: str, why: Exception) -> Unreachable:
    """The error of an import that a store ended."""
    text = " ".join(f"{type(why).__name__}: {why}".split())
    return Unreachable(
        f"{path}: its store failed to give all of it ({text[:300]}); nothing of its shard is kept, "
        "finished shards are: give the same command again once the store answers"
    )


@contextlib.contextmanager
def noting() -> Iterator[list[Failure]]:
    """The failures of stores while it is open, in this thread."""
    before, found = _noted.get(), []  # type: tuple[list[Failure] | None, list[Failure]]
    _noted.set(found)
    try:
        yield found
    finally:
        _noted.set(before)


@contextlib.contextmanager
def required() -> Iterator[None]:
    """Raises Unreachable where a store fails while it is open, whoever takes it for damage."""
    with noting() as failures:
        try:
            yield
        except Exception as why:
            if not failures:
                raise
            raise error(*failures[0]) from why
    if failures:
        raise error(*failures[0]) from failures[0][1]


def note(path: str, why: Exception) -> None:
    """Tells whoever is `noting` that a store failed to give a file."""
    noted = _noted.get()
    if noted is not None:
        noted.append((path, why))


@contextlib.contextmanager
def asking(path: str, answers: tuple[type[Exception], ...] = ANSWERS) -> Iterator[None]:
    """Notes what a store raises there, but for answers, and raises it."""
    try:
        yield
    except answers:
        raise
    except Exception as why:  # the libraries of stores have types of their own
        note(path, why)
        raise


class Asked:
    """A remote file that is open; its reads that fail are noted. All else is the file's own."""

    def __init__(self, file: Any, path: str):
        self._file, self._path = file, path

    def read(self, size: int = -1) -> bytes:
        """As of files. Even a store that refuses has given a part before."""
        with asking(self._path, (ValueError,)):
            return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        """As of files."""
        with asking(self._path, (ValueError,)):
            return self._file.readinto(buffer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
