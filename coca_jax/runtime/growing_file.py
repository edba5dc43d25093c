"""A file that grows at its end, on a disk or in a bucket, where an object is written whole."""

from __future__ import annotations

import os
import time
from typing import Any

from absl import logging

from coca_jax.runtime import storage

_AGAIN = "%s could not be written, it is tried again: %s"
OFTEN = 16 << 20  # bytes of an object that grows; one of twice as many is written half as often


class Growing:
    """A file that is written piece by piece, such as metrics.jsonl.

    A local one is appended to at once. An object in a bucket cannot grow: pieces gather in memory
    and `flush` writes the whole object again; `write` does so when that is long ago for its size.

    Args:
        path: of the file; its folder is made when missing.
        keep: bytes of what is there that stay; the rest is cut off.
        seconds: how often `write` brings an object in a bucket of up to OFTEN bytes up to date.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 0, seconds: float = 60.0):
        self._path, self._seconds = storage.place(path), seconds
        self._parts: list[bytes] = []
        self._file: Any = None
        self._changed, self._warned, self._written_at = False, False, time.monotonic()
        if storage.is_remote(self._path):
            found = self._path.read_bytes() if self._path.exists() else b""
            self._parts, self._changed = [found[:keep]], len(found) > keep
            self.flush()
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab", buffering=0)
            self._file.truncate(keep)

    def write(self, data: bytes, *, patient: bool = True) -> None:
        """Adds `data` at the end. What does not fit on a full disk is kept for the next time;
        unless patient it raises OSError."""
        self._parts.append(data)
        if self._file is not None:
            try:
                self._drain()
                self._warned = False
            except OSError as error:
                if not patient:
                    self._parts = []  # `close` would fail once more
                    raise
                if not self._warned:
                    logging.warning(_AGAIN, self._path, error)
                self._warned = True
            return
        self._changed = True
        rarer = max(1.0, len(self._parts[0]) / OFTEN)  # parts: what is there, then what is new
        if time.monotonic() - self._written_at > self._seconds * rarer:
            try:
                self.flush()
            except OSError as error:  # nothing is lost: the next one writes all of it
                self._written_at = time.monotonic()
                logging.warning(_AGAIN, self._path, error)

    def flush(self) -> None:
        """Returns when all that was written is in the file. Raises OSError when it cannot be."""
        if self._file is not None:
            self._drain()
        elif self._changed:
            self._parts = [b"".join(self._parts)]
            with storage.as_os_error(self._path, "cannot be written"):
                self._path.write_bytes(self._parts[0])
            self._changed, self._written_at = False, time.monotonic()

    def _drain(self) -> None:
        """Writes what waits to the local file, as far as it goes."""
        while self._parts:
            written = self._file.write(self._parts[0])
            self._parts[:1] = filter(None, [self._parts[0][written:]])

    def close(self) -> None:
        """Flushes; nothing may be written afterwards."""
        self.flush()
        if self._file is not None:
            self._file.close()
