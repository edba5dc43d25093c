"""The folder of an index: embeddings and names in numbered parts.

    img_emb/img_emb_N.npy       float16 [n, E], L2-normalised, laid out as clip-retrieval does
    metadata/metadata_N.jsonl   the part's header; then one line per row of the embeddings:
                                image_path, caption, and for a local file its size and mtime_ns
    metadata/metadata_N.parquet image_path and caption alone, for other tools (--parquet)
    index.json                  the model and the indexed inputs
    staged/                     finished indexes of shards that are not joined yet; see staged.py

A part exists once its JSONL file does, because that file is written last. Its header says which
pictures of which group the part holds, so an interrupted run resumes where it stopped. The header
may also drop rows of earlier parts, whose pictures are gone or have changed: those rows stay in the
files and no longer count.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import posixpath
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from coca_jax.inference import fingerprint
from coca_jax.runtime import bounded_json, extras, json_files, storage

# What is refused of an index: a folder of something else, a damaged index.json, another model.


STAGED = "staged"
LEASE = "lease.json"  # of who writes to it, see runtime/lease.py


def check_folder(folder: str) -> None:
    """Raises ValueError for a folder without index.json that holds anything else than what is there
    before that: one whose first run was killed, or found the disk full, is begun again."""
    place = storage.place(folder)
    if place.exists() and not all(map(_comes_first, place.iterdir())):
        raise ValueError(f"{folder} holds something that is no index; give a new folder")


def _comes_first(path: Any) -> bool:
    if path.name == "metadata":  # empty: what is in it would be of an index that lost its JSON
        return path.is_dir() and not any(path.iterdir())
    unnamed = storage.UNNAMED.fullmatch(path.name)
    return path.name in (STAGED, LEASE) or bool(unnamed and unnamed[1] in (LEASE, "index.json"))


def check_model(folder: str, there: dict[str, Any], about: dict[str, Any]) -> None:
    """Raises ValueError where the index of `folder`, {} for a new one, is another model's."""
    if there and not fingerprint.same(there["model"], about["model"]):
        check_dtype(f"--out={folder}", there, about.get("dtype"))
        raise ValueError(
            f"--out={folder} was made by another model ({there['checkpoint']}); embeddings of two "
            "models do not compare: give a new folder"
        )


def check_dtype(index: str, there: dict[str, Any], dtype: str | None) -> None:
    """Raises ValueError where an index, called `index`, was made in another dtype than a model's,
    whose weights are rounded to it. None, and in what older versions wrote: unknown."""
    made = there.get("dtype")
    if made and dtype and made != dtype:
        raise ValueError(
            f"{index} was made with --dtype={made}, and the model is in {dtype}: other weights; "
            f"give --dtype={made}, or index again into a new folder"
        )


def check_about(about: dict[str, Any], place: str) -> None:
    """Raises ValueError where index.json lacks what `begin` writes."""
    width = about.get("width")
    texts = all(isinstance(about.get(key), str) for key in ("model", "checkpoint"))
    if not texts or not isinstance(width, int) or not 0 < width <= 65_536:
        raise ValueError(
            f"{place} is damaged: it names no model, checkpoint and width; index again"
        )


_HEADER = 128  # bytes before the numbers, as NumPy writes it
_DROPPED = 300_000  # rows that one part drops, of which its header holds the numbers
_NAME = re.compile(r"metadata_(\d+)\.jsonl")


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


class _Part(NamedTuple):
    """The contents of a metadata file.

    Attributes:
        group: key of the group that its pictures belong to; '' for files.
        skipped: names of unreadable pictures, and why.
        last: whether the group ends here.
        dropped: rows of earlier parts that no longer count.
        names, captions: one per row.
        stamps: int64 [n, 2], size and mtime_ns; -1 for anything but a local file.
    """

    group: str
    skipped: dict[str, str]
    last: bool
    dropped: list[int]
    names: list[str]
    captions: list[str]
    stamps: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def rows(self) -> list[Row]:
        pairs = [None if size < 0 else (size, time) for size, time in self.stamps.tolist()]
        return [Row(*row) for row in zip(self.names, self.captions, pairs)]

    def dump(self) -> bytes:
        lines = []
        for name, caption, stamp in self.rows():
            row: dict[str, Any] = dict(image_path=name, caption=caption)
            if stamp:
                row |= dict(size=stamp[0], mtime_ns=stamp[1])
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        rows = "".join(lines).encode()
        header = dict(
            group=self.group,
            skipped=self.skipped,
            last=self.last,
            dropped=self.dropped,
            rows=len(self),
            crc32=zlib.crc32(rows),  # of the lines below
        )
        return (json.dumps(json_files.seal(header), ensure_ascii=False) + "\n").encode() + rows


def _load(data: bytes, earlier: int) -> _Part:
    """The inverse of `_Part.dump`; earlier: number of rows in the parts before it.

    Raises:
        ValueError, KeyError, TypeError: damaged data.
    """
    first, _, rest = data.partition(b"\n")
    header = json_files.unseal(bounded_json.parse(first, len(first)), "its header")
    kinds = dict(group=str, skipped=dict, last=bool, dropped=list, rows=int, crc32=int)
    for key, kind in kinds.items():
        if type(header[key]) is not kind:
            raise ValueError(f"its header's {key!r} is not of type {kind.__name__}")
    if zlib.crc32(rest) != header["crc32"]:
        raise ValueError("its checksum does not match")
    for row in header["dropped"]:
        if type(row) is not int or not 0 <= row < earlier:
            raise ValueError("it drops a row that no earlier part has")
    rows = bounded_json.loads(b"[" + b",".join(rest.splitlines()) + b"]")
    if len(rows) != header["rows"]:
        raise ValueError(f"it has {len(rows)} rows instead of {header['rows']}")
    stamps = [(row.get("size", -1), row.get("mtime_ns", -1)) for row in rows]
    return _Part(
        header["group"],
        header["skipped"],
        header["last"],
        header["dropped"],
        [row["image_path"] for row in rows],
        [row["caption"] for row in rows],
        np.array(stamps, np.int64).reshape(-1, 2),
    )


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
            self.about = json_files.read_sealed(place / "index.json")
            check_about(self.about, f"{folder}/index.json")
        else:
            check_folder(folder)
        self.skipped: dict[str, str] = {}
        self.in_groups = 0
        self._done: dict[str, Done] = {}
        self._parts: list[_Part] = []
        self._files: dict[str, Known] | None = None
        self._base: str | None = None
        self._rows = 0  # with those that are dropped
        self._dropped: set[int] = set()
        own = place / "metadata"
        names = [path.name for path in own.iterdir()] if self.about and own.exists() else []
        matches = [one for one in map(_NAME.fullmatch, names) if one]
        for number, there in enumerate(sorted(int(one[1]) for one in matches)):
            if number != there:
                raise self._damaged(number, "metadata", "missing")
            self._take(self._read(number))

    def _damaged(self, number: int, kind: str, why: str) -> ValueError:
        """The error for a part's file, of its metadata or img_emb; why: what it is."""
        suffix = "jsonl" if kind == "metadata" else "npy"
        return ValueError(
            f"{self.folder}/{kind}/{kind}_{number}.{suffix} is {why}; delete "
            f"metadata_{number}.jsonl and all of higher numbers in {self.folder}/metadata, and "
            "run the same `search index` again"
        )

    def _read(self, number: int) -> _Part:
        path = storage.place(self.folder) / f"metadata/metadata_{number}.jsonl"
        try:
            return _load(path.read_bytes(), self._rows)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
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
        return storage.whole_path(name, self.base)

    def done(self, group: str) -> Done:
        """How much there is of a group with a key."""
        return self._done.get(self.whole_path(group), Done()) if group else Done()

    @property
    def files(self) -> dict[str, Known]:
        """Of pictures that are files, by their whole paths; those that are dropped left out."""
        if self._files is None:  # some seconds of millions, which a query does not need
            self._files, first = {}, 0
            for part in self._parts:
                self._know(self._files, part, first)
                first += len(part)
            _forget(self._files, self._dropped)  # at once: to find some goes through all files
        return self._files

    def _know(self, files: dict[str, Known], part: _Part, first: int) -> None:
        """Adds to `files` the files of a part but for the rows it drops; first: the number of its
        first row."""
        if not part.group:
            for row, (name, caption, stamp) in enumerate(part.rows(), first):
                files[self.whole_path(name)] = Known(row, stamp, caption)
            files |= {self.whole_path(name): Known(-1) for name in part.skipped}

    def _take(self, part: _Part) -> None:
        if part.group:
            done = self._done.setdefault(self.whole_path(part.group), Done())
            done.pictures += len(part) + len(part.skipped)
            done.whole = part.last
            self.in_groups += len(part)
        elif self.skipped:
            for name in part.names:
                self.skipped.pop(name, None)
        if self._files is not None:
            self._know(self._files, part, self._rows)
            _forget(self._files, {*part.dropped})
        self._parts.append(part)
        self._rows += len(part)
        self.skipped |= part.skipped
        self._dropped |= {*part.dropped}

    def begin(self, about: dict[str, Any]) -> None:
        """Writes index.json of a new folder, or checks that the same model made the old one.

        Raises:
            ValueError: another model.
        """
        check_model(self.folder, self.about, about)
        if not self.about:
            self.about, self._base = about, None
            (storage.place(self.folder) / "metadata").mkdir(parents=True, exist_ok=True)
            json_files.write_sealed(storage.place(self.folder) / "index.json", about)

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
        number = len(self._parts)
        out = io.BytesIO()
        np.save(out, embeddings.astype(np.float16))
        place = storage.place(self.folder)
        storage.write_bytes(place / f"img_emb/img_emb_{number}.npy", out.getvalue())
        stamps = np.array([row.stamp or (-1, -1) for row in rows], np.int64).reshape(-1, 2)
        names, captions = [row.name for row in rows], [row.caption for row in rows]
        part = _Part(group, skipped, last, sorted(dropped), names, captions, stamps)
        storage.write_bytes(place / f"metadata/metadata_{number}.jsonl", part.dump())
        self._take(part)

    def write_parquet(self) -> None:
        """Writes image_path and caption of each part as clip-retrieval's tools read them.

        Raises ValueError: pyarrow is not installed.
        """
        extras.check("pyarrow", "parquet", "--parquet")
        import pyarrow as pa
        import pyarrow.parquet as pq

        for number, part in enumerate(self._parts):
            out = io.BytesIO()
            pq.write_table(pa.table(dict(image_path=part.names, caption=part.captions)), out)
            path = storage.place(self.folder) / f"metadata/metadata_{number}.parquet"
            storage.write_bytes(path, out.getvalue())

    def take(self, other: Parts, start: int) -> None:
        """Adds the parts of another index of the same model that begin at picture `start` or
        after it."""
        before = 0
        for number, part in enumerate(other._parts):
            if before >= start:
                self.write(part.group, other._part(number), part.rows(), part.skipped, part.last)
            before += len(part) + len(part.skipped)

    def drop(self, gone: Iterable[int] = ()) -> None:
        """Drops the rows of `gone`, and those of files that later parts hold again or could not
        read."""
        last = {known.row for known in self.files.values()}
        rows = range(self._rows)
        of_files = itertools.chain.from_iterable(
            [not part.group] * len(part) for part in self._parts
        )
        old = {row for row, is_file in zip(rows, of_files) if is_file and row not in last}
        dropped = sorted((old | set(gone)) - self._dropped)
        for start in range(0, len(dropped), _DROPPED):
            some = dropped[start : start + _DROPPED]
            self.write("", np.zeros((0, self.about["width"])), [], {}, True, some)

    def names(self) -> list[str]:
        """Of all pictures, in the order of the embeddings."""
        return self._selected(part.names for part in self._parts)

    def captions(self) -> list[str]:
        """Of all pictures, '' where the data have none."""
        return self._selected(part.captions for part in self._parts)

    def rows(self) -> np.ndarray:
        """int64 [N]: of all pictures, the rows in the files, where dropped ones count too."""
        return np.delete(np.arange(self._rows), sorted(self._dropped))

    def _selected(self, parts: Iterable[list[str]]) -> list[str]:
        texts = itertools.chain.from_iterable(parts)
        return [text for row, text in enumerate(texts) if row not in self._dropped]

    def stamps(self) -> np.ndarray:
        """int64 [N, 2]: size and mtime_ns of all pictures, -1 of what has none."""
        found = [part.stamps for part in self._parts]
        whole = np.concatenate([np.zeros((0, 2), np.int64), *found])
        return np.delete(whole, sorted(self._dropped), axis=0)

    def embeddings(self) -> np.ndarray:
        """float16 [N, E] of all pictures, in order.

        Raises:
            ValueError: a part is missing or damaged.
        """
        mask = np.ones(self._rows, bool)
        mask[list(self._dropped)] = False
        whole = np.empty((int(mask.sum()), self.about["width"]), np.float16)
        first = place = 0
        for number, part in enumerate(self._parts):  # one part at a time is in memory twice
            rows = mask[first : first + len(part)]
            count = int(rows.sum())
            whole[place : place + count] = self._part(number)[rows]
            first, place = first + len(part), place + count
        return whole

    def check(self) -> None:
        """Raises ValueError where the embeddings of a part are missing or cut."""
        system, plain = storage.filesystem(f"{self.folder}/img_emb")
        found = system.find(plain, detail=True).items()
        sizes = {posixpath.basename(name): entry["size"] for name, entry in found}
        for number, part in enumerate(self._parts):
            size, wanted = sizes.get(f"img_emb_{number}.npy"), 2 * len(part) * self.about["width"]
            if size != _HEADER + wanted:
                why = "missing" if size is None else f"damaged ({size} bytes)"
                raise self._damaged(number, "img_emb", why)

    def _part(self, number: int) -> np.ndarray:
        path = storage.place(self.folder) / f"img_emb/img_emb_{number}.npy"
        try:
            return _array(path.read_bytes(), (len(self._parts[number]), self.about["width"]))
        except FileNotFoundError:
            raise self._damaged(number, "img_emb", "missing") from None
        except (OSError, ValueError) as error:
            raise self._damaged(number, "img_emb", f"damaged ({error})") from None


def _forget(files: dict[str, Known], dropped: set[int]) -> None:
    """Removes the files of rows that are dropped."""
    for name in [name for name, known in files.items() if known.row in dropped] if dropped else ():
        del files[name]


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
