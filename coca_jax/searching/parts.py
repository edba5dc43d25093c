"""The folder of an index: embeddings and names in numbered parts, laid out as clip-retrieval does.

    img_emb/img_emb_N.npy         float16 [n, E], L2-normalised
    metadata/metadata_N.parquet   image_path, caption: one row a row of the embeddings; size and
                                  mtime_ns of a local file
    index.json                    the model, and what was indexed
    staged/                       indexes of shards that are done and not yet joined; see staged.py

A part is there when its parquet file is: that is written last, and says in its schema's metadata
which pictures of which group the part holds, so that a run that was ended goes on where it was. It
may also drop rows of earlier parts, whose pictures are gone or have changed: they stay in the files
and count no more.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coca_jax.data import bounded_json
from coca_jax.files import local_files, sealed_json, storage
from coca_jax.searching import checks

_KEY = b"coca_jax"
_HEADER = 128  # bytes before the numbers, as NumPy writes it
_DROPPED = 300_000  # rows that one part drops, of which its schema holds the numbers
_MOST = 1 << 26  # bytes that it may hold; earlier parts drop any number of rows
_NAME = re.compile(r"metadata_(\d+)\.parquet")
COLUMNS = ("image_path", "caption")
STAMP = ("size", "mtime_ns")  # columns too; null of what is no local file, missing in old parts


@dataclasses.dataclass
class Done:
    """What the parts of a group hold: how many of its pictures, and whether those are all."""

    pictures: int = 0
    whole: bool = False


class Row(NamedTuple):
    """A row to write: name, caption and `local_files.stamp` of a picture."""

    name: str
    caption: str
    stamp: tuple[int, int] | None = None


class Known(NamedTuple):
    """What the parts say last of a file: its row, -1 where it could not be read, its stamp and its
    caption."""

    row: int
    stamp: tuple[int, int] | None = None
    caption: str = ""


class Parts:
    """The parts of an index.

    Attributes:
        about: the contents of index.json; {} for a new folder.
        skipped: names of pictures that could not be read, and why.
        in_groups: rows of groups with a key, which are no files.

    Raises:
        ValueError: the folder holds something else, or is damaged.
    """

    def __init__(self, folder: str):
        self.folder = folder
        place = storage.place(folder)
        self.about: dict[str, Any] = {}
        if (place / "index.json").exists():
            self.about = sealed_json.read(place / "index.json")
            checks.check_about(self.about, f"{folder}/index.json")
        else:
            checks.check_folder(folder)
        self.skipped: dict[str, str] = {}
        self.in_groups = 0
        self._done: dict[str, Done] = {}
        self._tables: list[pa.Table] = []
        self._files: dict[str, Known] | None = None
        self._base: str | None = None
        self._rows = 0  # with those that are dropped
        self._dropped: set[int] = set()
        own = place / "metadata"
        names = [path.name for path in own.iterdir()] if self.about and own.exists() else []
        found = sorted(int(one[1]) for one in map(_NAME.fullmatch, names) if one)
        for number, there in enumerate(found):
            if number != there:
                raise self._damaged(number, "metadata", "missing")
            self._take(self._read(number))

    def _damaged(self, number: int, kind: str, why: str) -> ValueError:
        """The error for a part's file, of its metadata or img_emb; why: what it is."""
        suffix = "parquet" if kind == "metadata" else "npy"
        return ValueError(
            f"{self.folder}/{kind}/{kind}_{number}.{suffix} is {why}; delete "
            f"metadata_{number}.parquet and all of higher numbers in {self.folder}/metadata, and "
            "run the same `search index` again"
        )

    def _read(self, number: int) -> pa.Table:
        path = storage.place(self.folder) / f"metadata/metadata_{number}.parquet"
        try:
            table = pq.read_table(io.BytesIO(path.read_bytes()))
            said = bounded_json.parse(table.schema.metadata[_KEY], _MOST)
            kinds = (said["group"], str), (said["skipped"], dict), (said["last"], bool)
            if not all(isinstance(value, kind) for value, kind in kinds):
                raise ValueError("its metadata have other types")
            told = pa.schema([(name, pa.string()) for name in COLUMNS])
            table.select(list(COLUMNS)).cast(told)
            if STAMP[0] in table.column_names:
                table.select(list(STAMP)).cast(pa.schema([(name, pa.int64()) for name in STAMP]))
            for row in said.get("dropped", []):
                if type(row) is not int or not 0 <= row < self._rows:
                    raise ValueError("it drops what is no earlier row")
            return table
        except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise self._damaged(number, "metadata", f"damaged ({error})") from None

    @property
    def base(self) -> str:
        """The folder in which relative names begin: where the index was made, or, where that is no
        more or on another machine, the current one."""
        if self._base is None:
            made = self.about.get("made_in", "")
            there = isinstance(made, str) and os.path.isdir(made)
            self._base = made if there else os.getcwd()
        return self._base

    @property
    def checkpoint(self) -> str:
        """Where the index's model lies: as it was given, or, where nothing is there from the
        current folder, as seen from `base`; '' for a new folder."""
        given = self.about.get("checkpoint", "")
        before = os.path.join(self.base, given)
        moved = bool(given) and not os.path.exists(given) and os.path.exists(before)
        return before if moved else given

    def whole_path(self, name: str) -> str:
        """The one spelling of a picture or a group."""
        return local_files.whole_path(name, self.base)

    def done(self, group: str) -> Done:
        """How much there is of a group with a key."""
        return self._done.get(self.whole_path(group), Done()) if group else Done()

    @property
    def files(self) -> dict[str, Known]:
        """Of pictures that are files, by their whole paths; those that are dropped left out."""
        if self._files is None:  # some seconds of millions, which a query does not need
            self._files, first = {}, 0
            for table in self._tables:
                self._know(self._files, table, first)
                first += len(table)
            _forget(self._files, self._dropped)  # at once: to find some goes through all files
        return self._files

    def grouped(self) -> dict[str, list[int]]:
        """Rows of groups with a key, by its one spelling; those that are dropped left out."""
        found: dict[str, list[int]] = {}
        first = 0
        for table in self._tables:
            group = json.loads(table.schema.metadata[_KEY])["group"]
            if group:
                rows = {*range(first, first + len(table))} - self._dropped
                found.setdefault(self.whole_path(group), []).extend(sorted(rows))
            first += len(table)
        return found

    def _know(self, files: dict[str, Known], table: pa.Table, first: int) -> None:
        """Adds to `files` what a part says but for what it drops; first: its first row's number."""
        said = json.loads(table.schema.metadata[_KEY])
        if not said["group"]:
            texts = (table[name].to_pylist() for name in COLUMNS)
            for row, (name, caption, stamp) in enumerate(zip(*texts, _stamps(table)), first):
                files[self.whole_path(name)] = Known(row, stamp, caption)
            files |= {self.whole_path(name): Known(-1) for name in said["skipped"]}

    def _take(self, table: pa.Table) -> None:
        said = json.loads(table.schema.metadata[_KEY])
        if said["group"]:
            done = self._done.setdefault(self.whole_path(said["group"]), Done())
            done.pictures += len(table) + len(said["skipped"])
            done.whole = said["last"]
            self.in_groups += len(table)
        elif self.skipped:
            for name in table[COLUMNS[0]].to_pylist():
                self.skipped.pop(name, None)
        if self._files is not None:
            self._know(self._files, table, self._rows)
            _forget(self._files, {*said.get("dropped", ())})
        self._tables.append(table)
        self._rows += len(table)
        self.skipped |= said["skipped"]
        self._dropped |= set(said.get("dropped", ()))

    def begin(self, about: dict[str, Any]) -> None:
        """Writes index.json of a new folder, or checks that the same model made the old one.

        Raises:
            ValueError: another model.
        """
        checks.check_model(self.folder, self.about, about)
        if not self.about:
            self.about, self._base = about, None
            (storage.place(self.folder) / "metadata").mkdir(parents=True, exist_ok=True)
            sealed_json.write(storage.place(self.folder) / "index.json", about)

    def write(
        self,
        group: str,
        embeddings: np.ndarray,
        rows: Sequence[Row],
        skipped: dict[str, str],
        last: bool,
        dropped: Iterable[int] = (),
    ) -> None:
        """Adds a part: float32 [n, E] and n rows; `last` of its group. dropped: earlier rows that
        count no more."""
        known = [self.files.get(self.whole_path(name)) for name in skipped]
        if not group and skipped and not rows and all(one and one.row < 0 for one in known):
            return  # files that could not be read before either
        number = len(self._tables)
        out = io.BytesIO()
        np.save(out, embeddings.astype(np.float16))
        place = storage.place(self.folder)
        storage.write_bytes(place / f"img_emb/img_emb_{number}.npy", out.getvalue())
        said = json.dumps(
            dict(group=group, skipped=skipped, last=last)
            | (dict(dropped=sorted(dropped)) if dropped else {})
        )
        columns = {
            name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(COLUMNS)
        } | {
            name: pa.array([row.stamp[i] if row.stamp else None for row in rows], pa.int64())
            for i, name in enumerate(STAMP)
        }
        table = pa.table(columns).replace_schema_metadata({_KEY: said.encode()})
        out = io.BytesIO()
        pq.write_table(table, out)
        storage.write_bytes(place / f"metadata/metadata_{number}.parquet", out.getvalue())
        self._take(table)

    def take(self, other: Parts, start: int) -> None:
        """Adds the parts of another index of the same model that begin at picture `start` or
        after it."""
        before = 0
        for number, table in enumerate(other._tables):
            said = json.loads(table.schema.metadata[_KEY])
            if before >= start:
                texts = (table[name].to_pylist() for name in COLUMNS)
                rows = [Row(*told) for told in zip(*texts, _stamps(table))]
                self.write(said["group"], other._part(number), rows, said["skipped"], said["last"])
            before += len(table) + len(said["skipped"])

    def drop(self, gone: Iterable[int] = ()) -> None:
        """Drops the rows of `gone`, and those of files that later parts hold again or could not
        read."""
        last = {known.row for known in self.files.values()}
        rows = range(self._rows)
        of_files = itertools.chain.from_iterable(
            [not json.loads(table.schema.metadata[_KEY])["group"]] * len(table)
            for table in self._tables
        )
        old = {row for row, is_file in zip(rows, of_files) if is_file and row not in last}
        dropped = sorted((old | set(gone)) - self._dropped)
        for start in range(0, len(dropped), _DROPPED):
            some = dropped[start : start + _DROPPED]
            self.write("", np.zeros((0, self.about["width"])), [], {}, True, some)

    def names(self) -> list[str]:
        """Of all pictures, in the order of the embeddings."""
        return self._column("image_path")

    def captions(self) -> list[str]:
        """Of all pictures, '' where the data have none."""
        return self._column("caption")

    def rows(self) -> np.ndarray:
        """int64 [N]: of all pictures, the rows in the files, where dropped ones count too."""
        return np.delete(np.arange(self._rows), sorted(self._dropped))

    def _column(self, name: str) -> list[str]:
        found = [text for table in self._tables for text in table[name].to_pylist()]
        return [text for row, text in enumerate(found) if row not in self._dropped]

    def stamps(self) -> np.ndarray:
        """int64 [N, 2]: size and mtime_ns of all pictures, -1 of what has none."""
        found = [
            np.stack([table[name].fill_null(-1).to_numpy() for name in STAMP], 1)
            if STAMP[0] in table.column_names
            else np.full((len(table), 2), -1)
            for table in self._tables
        ]
        whole = np.concatenate([np.zeros((0, 2), np.int64), *found])
        return np.delete(whole, sorted(self._dropped), axis=0)

    def embeddings(self) -> np.ndarray:
        """float16 [N, E] of all pictures, in order.

        Raises:
            ValueError: a part is missing or damaged.
        """
        kept = np.ones(self._rows, bool)
        kept[list(self._dropped)] = False
        whole = np.empty((int(kept.sum()), self.about["width"]), np.float16)
        first = place = 0
        for number, table in enumerate(self._tables):  # one part at a time is in memory twice
            rows = kept[first : first + len(table)]
            count = int(rows.sum())
            whole[place : place + count] = self._part(number)[rows]
            first, place = first + len(table), place + count
        return whole

    def check(self) -> None:
        """Raises ValueError where the embeddings of a part are missing or cut."""
        system, plain = storage.filesystem(f"{self.folder}/img_emb")
        found = system.find(plain, detail=True).items()
        sizes = {posixpath.basename(name): told["size"] for name, told in found}
        for number, table in enumerate(self._tables):
            size, wanted = sizes.get(f"img_emb_{number}.npy"), 2 * len(table) * self.about["width"]
            if size != _HEADER + wanted:
                why = "missing" if size is None else f"damaged ({size} bytes)"
                raise self._damaged(number, "img_emb", why)

    def _part(self, number: int) -> np.ndarray:
        path = storage.place(self.folder) / f"img_emb/img_emb_{number}.npy"
        try:
            return _array(path.read_bytes(), (len(self._tables[number]), self.about["width"]))
        except FileNotFoundError:
            raise self._damaged(number, "img_emb", "missing") from None
        except (OSError, ValueError) as error:
            raise self._damaged(number, "img_emb", f"damaged ({error})") from None


def _forget(files: dict[str, Known], dropped: set[int]) -> None:
    """Removes the files of rows that are dropped."""
    for name in [name for name, known in files.items() if known.row in dropped] if dropped else ():
        del files[name]


def _stamps(table: pa.Table) -> list[tuple[int, int] | None]:
    """Of each row of a part."""
    if STAMP[0] not in table.column_names:
        return [None] * len(table)
    pairs = zip(*(table[name].to_pylist() for name in STAMP))
    return [None if size is None or time is None else (size, time) for size, time in pairs]


def _array(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    """A float16 array of a .npy file. numpy's own reader reserves what a header asks for.

    Raises:
        ValueError: no such file, or of another shape or type.
    """
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError
        found, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception:  # its parser is Python's own
        raise ValueError("not a .npy file") from None
    left = len(data) - file.tell()
    if found != shape or by_columns or dtype != np.float16 or left != 2 * shape[0] * shape[1]:
        raise ValueError(f"{left} bytes of {dtype} {found} for float16 {shape}")
    return np.frombuffer(data, np.float16, offset=file.tell()).reshape(shape)
