"""What a captioner said of each record so far: a file of an evaluation that goes on from it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from coca_jax.data import bounded_json
from coca_jax.evaluators import Record
from coca_jax.evaluators.writing import Writing
from coca_jax.files import growing_file, storage


class Outputs:
    """What a model said of each record so far, a file from which a later start goes on.

    JSON lines: first what was asked for, then for each record in order its key, its caption and
    the log likelihood (nats) and number of tokens of each of its references.

    Args:
      path: of the file; its folder is made when missing.
      request: what the outputs depend on. A file made for another request is begun anew; a last
        line that was cut short is dropped, and a damaged one with all behind it, with a warning.
      write: does it on one process; every process reads the file when this is made.
    """

    def __init__(self, path: str | os.PathLike[str], request: Mapping[str, Any], *, write: Writing):
        self._path, self._write = storage.place(path), write
        self._first = json.dumps(dict(request=request), sort_keys=True, default=list) + "\n"
        self._found: list[dict[str, Any]] = []
        data = self._path.read_bytes() if self._path.exists() else b""
        if data.startswith(first := self._first.encode()):
            # Not splitlines: captions may hold other separators. What is behind the last is cut.
            for number, line in enumerate(data[len(first) :].split(b"\n")[:-1], 2):
                try:
                    self._found.append(_output(line))
                except ValueError as error:
                    told = "%s, line %d, is damaged (%s): captions from there on are made anew"
                    logging.warning(told, self._path, number, error)
                    break
        self._taken = 0
        self._file: growing_file.Growing | None = None

    def take(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Returns what the file holds of the records that come next: of all, the first, or none."""
        found: list[dict[str, Any]] = []
        for record, one in zip(records, self._found[self._taken :]):
            if one["key"] != str(record.get("key", "")):  # other data than it was made from
                del self._found[self._taken + len(found) :]
                break
            found.append(one)
        self._taken += len(found)
        return found

    def add(self, outputs: Sequence[Mapping[str, Any]]) -> None:
        """Appends the outputs of the records that `take` did not have."""
        self._write(lambda: self._add(outputs))

    def _add(self, outputs: Sequence[Mapping[str, Any]]) -> None:
        if self._file is None:
            begin = (self._first + _lines(self._found[: self._taken])).encode()
            storage.write_bytes(self._path, begin)
            self._file = growing_file.Growing(self._path, keep=len(begin))
        self._file.write(_lines(outputs).encode())

    def close(self) -> None:
        """Returns when the file holds all of it."""
        if self._file is not None:
            self._write(self._file.close)


def _output(line: bytes) -> dict[str, Any]:
    """Of one record. Raises ValueError for what `add` has not written."""
    found = bounded_json.parse(line, len(line))
    if "key" not in found:
        raise ValueError("no key")
    return found


def _lines(outputs: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in outputs)
