"""Random access to records: what a source of data is, whatever the place it lies in."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from coca_jax.data.sources.records import Record
from coca_jax.data.sources.references import Changed
from coca_jax.runtime import activity

Indices = Sequence[int] | np.ndarray
Reader = Callable[[Indices], list[Record]]


class Problem(NamedTuple):
    """Why a record cannot be used: a word for its kind, and what is wrong with this one."""

    reason: str
    detail: str


UNREAD = Record(b"", ("",), ("",), "")  # in the place of a record that cannot be read


class Source:
    """Random access to records, some of which may turn out not to decode.

    Attributes:
        name: for messages.
        kind: the supervision.Kind of its examples, set by `filters.open_source`.
        every: what each record is known to have, of what kinds want: 'text', 'label'.
        folder: where an index of it may be kept, '' where there is no such place.
        fingerprint: tells these records, in this order, from all others; '': unknown.
        applied_fields: whether text_field and label_field of its entry were taken when it was
            opened, and are no fields of `extra`.
        class_names: the labels that its records have, sorted, where they are known.
        unchecked: whether its images have not been read when it was made.
    """

    def __init__(
        self,
        name: str,
        size: int,
        read: Reader,
        read_texts: Reader | None = None,
        *,
        every: Iterable[str] = (),
        folder: str = "",
        fingerprint: str = "",
        applied_fields: bool = False,
    ):
        self.name = name
        self.kind: Any = None
        self.every = frozenset(every)
        self.folder, self.fingerprint = folder, fingerprint
        self.applied_fields = applied_fields
        self.class_names: tuple[str, ...] | None = None
        self.unchecked = False
        self._size = size
        self._read = read
        self._read_texts = read_texts or read

    def __len__(self) -> int:
        return self._size

    @property
    def complete(self) -> bool:
        """Whether each record is known to have what its kind trains on."""
        return self.kind.wanted in self.every

    def read(self, indices: Indices) -> list[Record]:
        """The records at `indices`, in their order."""
        return self._read(indices)

    def read_texts(self, indices: Indices) -> list[Record]:
        """The same, where the image may be left out because only texts are wanted."""
        return self._read_texts(indices)

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), 256):
            yield from self.read(range(start, min(start + 256, len(self))))

    def labels(self) -> list[str]:
        """The distinct labels of all records, sorted; reads them all where they are not known.

        Raises ValueError where a shard is damaged.
        """
        if self.class_names is None:
            found: set[str] = set()
            for start in range(0, len(self), 1024):
                part = np.arange(start, min(start + 1024, len(self)))
                records, unread = read_all(self, part, texts=True)
                if unread:
                    row = min(unread)
                    raise ValueError(
                        f"data source {self.name}: record {start + row} {unread[row].detail}; the classes "
                        "are those of all records, so prepare it again, or name the classes"
                    )
                for record in records:
                    found.update(record.labels)
            self.class_names = tuple(sorted(found))
        return list(self.class_names)


def read_whole_texts(source: Source, indices: np.ndarray) -> Iterator[tuple[int, Record]]:
    """(row, record) of the records at `indices`, as `read_texts` gives them. What a damaged shard
    does not give is left out, as training leaves it out, and a warning says how many."""
    left: list[str] = []
    for start in range(0, len(indices), 1024):
        records, unread = read_all(source, indices[start : start + 1024], texts=True)
        left += [one.detail for one in unread.values()]
        yield from ((start + n, one) for n, one in enumerate(records) if n not in unread)
    if left:
        logging.warning("%s: %d texts are left out; first: %s", source.name, len(left), left[0])


def read_all(
    source: Source, indices: np.ndarray, texts: bool = False
) -> tuple[list[Record], dict[int, Problem]]:
    """Records of a source, and {row: why} of those that cannot be read.

    With `texts` they are those of `read_texts`, and only damage is passed over: where the data do
    not answer, that is raised, for nobody counts how many are missing.
    """
    read, passed = (source.read_texts, RuntimeError) if texts else (source.read, Exception)
    try:
        with activity.doing(f"reading {source.name}"):
            return read(indices), {}
    except passed:  # array_record raises RuntimeError for the whole of a read
        records, unread = [], {}
        for row, index in enumerate(indices.tolist()):
            record, why = read_one(source, index, texts)
            records.append(record)
            if why:
                unread[row] = why
        return records, unread


def read_one(source: Source, index: int, texts: bool = False) -> tuple[Record, Problem | None]:
    """A record, or one without an image and why it cannot be read; `texts` as of `read_all`.

    Raises OSError where the process has no file descriptor left or a store does not answer, which
    is not a fault of the record.
    """
    read, passed = (source.read_texts, RuntimeError) if texts else (source.read, Exception)
    try:
        with activity.doing(f"reading {source.name}"):
            return read([index])[0], None
    except passed as error:  # of a damaged shard, or of whatever the data lie on
        if os.strerror(errno.EMFILE) in str(error):  # array_record's errors have no number
            raise OSError(
                f"data source {source.name}: record {index} cannot be read, as this process has "
                f"too many files open ({error}); allow more, `ulimit -n 65536`"
            ) from None
        if isinstance(error, OSError) and not _is_damage(error):
            raise  # nothing is known of the record
        return UNREAD, Problem(_reason(error), f"cannot be read: {error}")


def _is_damage(error: OSError) -> bool:
    """Whether a file is gone or damaged, and not its store or the machine out of order."""
    return isinstance(error, FileNotFoundError) or error.errno in _OF_FILES


# Errors of one local file: it is damaged, forbidden, a folder, or its name cannot be one.
_OF_FILES = (
    *(errno.EIO, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing_image"
    if isinstance(error, Changed):
        return "changed_file"
    return "unreadable_file" if isinstance(error, OSError) else "damaged_record"
