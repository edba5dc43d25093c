"""The index of a view (views.py), kept in a file so that it is made once.

Making one reads every record of the data. The file lies beside the data or in the workdir of the
run, and is checked when it is read.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from coca_jax.console import activity
from coca_jax.data import files
from coca_jax.files.storage import write_bytes

FOLDER = "views"  # of index files, beside the shards or in a workdir
_FORMAT = 2  # of index files; a file of another is made anew. 2: answers of null are none


class Index(NamedTuple):
    """What a view leaves of n examples.

    Attributes:
        rows: integers [n], the record of each example.
        parts: integers [n], which of the record's texts or questions; None: the whole record.
        class_names: the distinct labels of the examples, sorted; None where they were not seen.
    """

    rows: np.ndarray
    parts: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None


class Indexes:
    """Where index files are kept, and which process of a run makes them.

    A file lies beside the data, or, where that cannot be written, in `workdir`. Of several
    processes the first one makes it and leaves it in the workdir, which all of them see, and the
    others wait for it there.

    Args:
        workdir: of the run; '' for none.
        process_index, process_count: of this process, and how many there are.
    """

    def __init__(self, workdir: str = "", process_index: int = 0, process_count: int = 1):
        self._workdir = workdir
        self._first = process_index == 0
        self._several = process_count > 1 and bool(workdir)

    def get(self, folder: str, mark: str, rows: int, make: Callable[[], Index]) -> Index:
        """The index of a view, from its file or made.

        Args:
            folder: of the data; '' for a place that keeps no files.
            mark: all that the index depends on; a file that was made of anything else is not taken.
            rows: how many records there are.
            make: makes the index.

        Raises:
            ValueError: what `make` raises; or the first process has written nothing in a day.
        """
        name = f"{hashlib.blake2b(mark.encode(), digest_size=12).hexdigest()}.npz"
        found = self._find(folder, name, mark, rows)
        if found is None and self._several and not self._first:
            found = self._wait(name, mark, rows)
        if found is None:
            found = make()
            self._save(folder, name, _encode(mark, found))
        elif self._several and self._first and self._find("", name, mark, rows) is None:
            self._save("", name, _encode(mark, found))  # the others may not see the data's folder
        return found

    def _find(self, folder: str, name: str, mark: str, rows: int) -> Index | None:
        for place in filter(None, (folder, self._workdir)):
            path = files.join(files.join(place, FOLDER), name)
            try:
                found = _decode(files.read(path), mark, rows) if files.exists(path) else None
            except (OSError, ValueError) as error:
                logging.warning("%s: damaged, made anew (%s)", path, error)
                continue
            if found is not None:
                return found
        return None

    def _wait(self, name: str, mark: str, rows: int) -> Index:
        path = f"{self._workdir}/{FOLDER}/{name}"
        look = functools.partial(self._find, "", name, mark, rows)
        # It may read a billion records. Where it ends meanwhile, this process hears of that.
        return activity.until(f"process 0 to write {path}", look, hours=24, pause=0.5)

    def _save(self, folder: str, name: str, data: bytes) -> None:
        written = bool(folder) and _write(folder, name, data)
        if self._workdir and (self._several or not written):
            written = _write(self._workdir, name, data) or written
        if not written:
            logging.info("an index could not be kept, neither in %r nor in a workdir", folder)


def _write(folder: str, name: str, data: bytes) -> bool:
    try:
        write_bytes(files.join(files.join(folder, FOLDER), name), data)
    except OSError:  # read-only data are usual
        return False
    return True


def _encode(mark: str, index: Index) -> bytes:
    small = np.uint32 if not len(index.rows) or index.rows.max() < 1 << 32 else np.int64
    arrays: dict[str, Any] = dict(rows=index.rows.astype(small))
    if index.parts is not None:
        arrays["parts"] = index.parts.astype(np.uint32)
    names = None if index.class_names is None else list(index.class_names)
    head = json.dumps(dict(format=_FORMAT, made_of=mark, class_names=names))
    out = io.BytesIO()
    np.savez_compressed(out, head=np.frombuffer(head.encode(), np.uint8), **arrays)
    return out.getvalue()


def _decode(data: bytes, mark: str, rows: int) -> Index | None:
    """None: made of something else. Raises ValueError: damaged."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            head = json.loads(arrays["head"].tobytes().decode())
            found = arrays["rows"].astype(np.int64)
            parts = arrays["parts"].astype(np.int64) if "parts" in arrays.files else None
    except Exception as error:  # zipfile, zlib, numpy and json each have their own
        raise ValueError(str(error)) from None
    if head.get("format") != _FORMAT or head.get("made_of") != mark:
        return None
    if len(found) and found.max() >= rows or (parts is not None and len(parts) != len(found)):
        raise ValueError(f"it names records beyond {rows}")
    names = head["class_names"]
    return Index(found, parts, None if names is None else tuple(names))
