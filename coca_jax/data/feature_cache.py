"""Tokens of a frozen image encoder, computed once and kept on the disk.

A source has a folder, named after what its tokens follow from (weights, preprocessing, records):

    about.json   what that is
    tokens.bin   the tokens of row r at r x the bytes of a row
    rows.bin     of each row 12 bytes: its state, and CRC-32s of the encoded image and of the tokens

Row index x A + a is augmentation a of A of a record. Rows may be written in any order, the tokens
of a row before its state, so that a process can be killed at any moment and the next one goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401 (makes numpy know bfloat16)
import numpy as np

from coca_jax.config import Config, Entry, shapes
from coca_jax.config.model import BLOCK
from coca_jax.data import pixels
from coca_jax.data.pixels import Plan
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.source import Source
from coca_jax.data.texts import Draw
from coca_jax.runtime import json_files

GIB = 2**30
MISSING, GOOD, BAD = 0, 1, 2  # states of a row; BAD: the image does not decode
ROW = np.dtype([("state", "<u4"), ("image", "<u4"), ("tokens", "<u4")])
# What of config.data says how the pixels come about that the encoder sees.
SEEN = (
    *("augment", "randaugment", "flip", "resize", "fast_resize", "num_frames", "frame_jitter"),
    "augmentations",
)


def shape(config: Config) -> tuple[int, ...]:
    """Of the encoder's tokens of one example: (N, W), of a clip (T, N, W); of a dual encoder, whose
    image side is locked up to it, the embedding's: (E,)."""
    model = config.model
    if model.family != "coca":
        return (model.embed_dim,)
    patches = shapes.patches(model.image_size, model.patch_size)
    places = patches + int(model.image.class_token)
    frames = (config.data.num_frames,) if config.data.num_frames else ()
    return (*frames, places, model.image.width)


def dtype(config: Config) -> str:
    """Of what is kept: tokens in the model's dtype, embeddings as they are compared."""
    return config.model.dtype if config.model.family == "coca" else "float32"


def augmentations(config: Config) -> int:
    """How many rows an image has: one where its augmentations are all the same."""
    return max(1, _drawn(config))


def _drawn(config: Config) -> int:
    """config.data.augmentations, or 0 where nothing is drawn for an image."""
    return config.data.augmentations if config.data.varies else 0


def about(config: Config, source: Source, number: int, weights: Mapping[str, int]) -> dict:
    """What the tokens of source `number` follow from. weights: checksums of the encoder's."""
    model, data = config.model.to_dict(), config.data.to_dict()
    keys = ("image_size", "patch_size", "image_mean", "image_std", "dtype", "image", *BLOCK)
    if config.model.family != "coca":
        keys += ("family", "embed_dim", "pooler")
    del model["image"]["onnx"]  # the file's checksum says which one it is, wherever it lies
    found: dict[str, Any] = dict(
        format=1,
        records=source.fingerprint or _described(source, config.data.sources[number]),
        model={key: model[key] for key in keys},
        data={key: data[key] for key in SEEN} | dict(augmentations=_drawn(config)),
        weights=dict(weights),
    )
    if _drawn(config):
        found |= dict(seed=config.seed, source=number)
    return json.loads(json.dumps(found, default=list))


def _described(source: Source, entry: Entry) -> str:
    """Records that nothing tells from others for certain."""
    found = f"{source.name}, {len(source)} records"
    if entry.where:
        found += f" with {json.dumps(dict(entry.where), sort_keys=True, default=list)}"
    return found


class Features:
    """The kept tokens of one source. Thread-safe; one process writes.

    Args:
        folder: where the folders of all sources lie; made when missing.
        about: from `about`.
        rows: how many there are.
        config: of the run.
        before: bytes that the sources before it have yet to write into `folder`.

    Attributes:
        path: the folder of this source.
        to_come: bytes of tokens that are not on the disk.
        shape, dtype: of a row's tokens.
        rows: as given.

    Raises:
        ValueError: too many bytes for data.features_gib or the disk, or a damaged folder.
    """

    def __init__(
        self, folder: str, about: Mapping[str, Any], rows: int, config: Config, before: int = 0
    ):
        text = json.dumps(about, sort_keys=True)
        self.path = pathlib.Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.shape, self.dtype = shape(config), np.dtype(dtype(config))
        self.rows = rows
        self._bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self._lock = threading.Lock()
        self.to_come = self._check_room(folder, config.data.features_gib, before)
        self.path.mkdir(parents=True, exist_ok=True)
        place = self.path / "about.json"
        if place.exists() and json_files.read_sealed(place) != about:
            raise ValueError(f"{place} is of other tokens; delete {self.path} and start again")
        json_files.write_sealed(place, dict(about))
        names = (self.path / "tokens.bin", self.path / "rows.bin")
        self._tokens, self._rows = (os.open(p, os.O_RDWR | os.O_CREAT, 0o644) for p in names)
        held = os.pread(self._rows, rows * ROW.itemsize, 0)
        new = bytes(rows * ROW.itemsize - len(held))
        self._put(self._rows, new, len(held))  # a state has its room, and is never written in part
        self._known = np.frombuffer(held + new, ROW).copy()
        if (self._known["state"] > BAD).any():
            raise self._damaged("rows.bin")

    def _check_room(self, folder: str, most_gib: float, before: int) -> int:
        """The bytes that are not on the disk yet. Raises ValueError where they are too many."""
        needed = self.rows * self._bytes
        if needed > most_gib * GIB:
            raise ValueError(
                f"data.features={folder}: the tokens of {self.rows} images of {self._bytes} bytes "
                f"are {needed / GIB:.3g} GiB, more than data.features_gib={most_gib:g}; raise it, "
                "or lower data.augmentations or the sources' limit"
            )
        place = pathlib.Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        there = self.path / "tokens.bin"
        held = there.stat().st_blocks * 512 if there.exists() else 0
        to_come = max(0, needed - held)
        free = shutil.disk_usage(place).free
        if to_come and before + to_come > free:
            raise ValueError(
                f"data.features={folder}: {(before + to_come) / GIB:.3g} GiB are needed and "
                f"{free / GIB:.3g} free; give a folder on a larger disk"
            )
        return to_come

    def _put(self, file: int, data: bytes, place: int) -> None:
        """Writes all of it: where the disk has room for a part alone, that is no error of the first
        write. Raises OSError for what finds none."""
        rest = memoryview(data)
        try:
            while rest:
                done = os.pwrite(file, rest, place)
                rest, place = rest[done:], place + done
        except OSError as error:
            free = shutil.disk_usage(self.path).free
            raise OSError(
                f"{self.path}: {error.strerror} for kept tokens, {free / GIB:.3g} GiB free; make "
                "room, or give another folder as data.features: the rows before these are kept"
            ) from error

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path}/{what} is damaged; delete {self.path} and start again: it is computed "
            "anew"
        )

    def missing(self) -> np.ndarray:
        """The rows that are not there yet, int64, in order."""
        return np.flatnonzero(self._known["state"] == MISSING)

    def write(self, rows: np.ndarray, records: Sequence[Record], tokens: np.ndarray) -> None:
        """Keeps the tokens [n, ...] of rows, in order of `rows`; of their records the checksums.
        Raises OSError where the disk is full."""
        found = np.zeros(len(rows), ROW)
        for at, (row, record) in enumerate(zip(rows.tolist(), records)):
            data = np.ascontiguousarray(tokens[at], self.dtype).tobytes()
            self._put(self._tokens, data, row * self._bytes)
            found[at] = (GOOD, zlib.crc32(record.image), _checksum(data, row))
        os.fsync(self._tokens)
        self._note(rows, found)

    def write_bad(self, rows: np.ndarray, records: Sequence[Record]) -> None:
        """Notes rows whose images do not decode."""
        crcs = [(BAD, zlib.crc32(record.image), 0) for record in records]
        self._note(rows, np.array(crcs, ROW))

    def _note(self, rows: np.ndarray, found: np.ndarray) -> None:
        with self._lock:
            self._known[rows] = found
            for row, one in zip(rows.tolist(), found):
                self._put(self._rows, one.tobytes(), row * ROW.itemsize)

    def read(self, row: int, record: Record) -> np.ndarray | None:
        """The tokens of a row; None where its image does not decode, or was not there to be read.

        Raises:
            ValueError: another image than that of which the tokens are, or damaged tokens.
        """
        state, image, checksum = self._known[row].tolist()
        if state == MISSING or not record.image:
            return None
        if zlib.crc32(record.image) != image:
            raise ValueError(
                f"{self.path}: {record.key!r} is another image than the one whose tokens were "
                f"kept: the data changed; delete {self.path} and start again"
            )
        if state == BAD:
            return None
        data = os.pread(self._tokens, self._bytes, row * self._bytes)
        if len(data) != self._bytes or _checksum(data, row) != checksum:
            raise self._damaged("tokens.bin")
        return np.frombuffer(data, self.dtype).reshape(self.shape)

    def close(self) -> None:
        """Closes the files."""
        os.close(self._tokens)
        os.close(self._rows)


def _checksum(data: bytes, row: int) -> int:
    """CRC-32 of a row's bytes, which would be another one at the place of another row."""
    return zlib.crc32(data, row & 0xFFFFFFFF)


class Tokens:
    """What `pixels.Pixels` is to a batch, of kept tokens: a source's rows in place of its images.

    Args:
        config: of the run.
        stores: of each source.

    Attributes:
        field: of the batch.
        shape: of one example.
        pairs, threads: as of Pixels.
    """

    field, pairs, threads = "encoded", False, 1

    def __init__(self, config: Config, stores: Sequence[Features]):
        self._stores, self._count = stores, augmentations(config)
        self.shape, self._dtype = shape(config), np.dtype(dtype(config))

    def plan(
        self, records: Sequence[Record], draw: Draw, indices: np.ndarray | None = None
    ) -> Plan:
        """Which row each example reads: the same augmentation as `Pixels.plan` draws."""
        if indices is None:
            raise ValueError("kept tokens are read by the places of the records in their source")
        rows = pixels.one_of(draw, indices, self._count).positions
        source = np.broadcast_to(np.asarray(draw.source, np.int64), len(records))
        return dict(store=source.copy(), row=rows.astype(np.int64))

    def render(self, records: Sequence[Record], plan: Plan) -> tuple[np.ndarray, dict[int, str]]:
        """Tokens [n, ...] of `shape`; {row: why} of those that are not there.

        Raises:
            ValueError: as `Features.read`.
        """
        out = np.zeros((len(records), *self.shape), self._dtype)
        failed: dict[int, str] = {}
        places = zip(plan["store"].tolist(), plan["row"].tolist())
        for at, (record, (source, row)) in enumerate(zip(records, places)):
            found = self._stores[source].read(row, record)
            if found is None:
                failed[at] = "no tokens are kept of it: it did not decode when they were made"
            else:
                out[at] = found
        return out, failed

    def close(self) -> None:
        """The files stay open for the rest of the run."""
