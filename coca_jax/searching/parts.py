"""The folder of an index: embeddings and names in numbered parts, laid out as clip-retrieval does.

    img_emb/img_emb_N.npy         float16 [n, E], L2-normalised
    metadata/metadata_N.parquet   image_path, caption: one row a row of the embeddings
    index.json                    the model, and what was indexed
    staged/                       indexes of shards that are done and not yet joined; see staged.py

A part is there when its parquet file is: that is written last, and says in its schema's metadata
which pictures of which group the part holds, so that a run that was ended goes on where it was.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coca_jax import sealed_json, storage
from coca_jax.data import bounded_json

_KEY = b"coca_jax"
_NAME = re.compile(r"metadata_(\d+)\.parquet")
COLUMNS = ("image_path", "caption")
STAGED = "staged"


@dataclasses.dataclass
class Done:
    """What the parts of a group hold: how many of its pictures, and whether those are all."""

    pictures: int = 0
    whole: bool = False


class Parts:
    """The parts of an index.

    Attributes:
        about: the contents of index.json; {} for a new folder.
        done: of each group.
        skipped: names of pictures that could not be read, and why.

    Raises:
        ValueError: the folder holds something else, or is damaged.
    """

    def __init__(self, folder: str):
        self.folder = folder
        place = storage.place(folder)
        self.about: dict[str, Any] = {}
        if (place / "index.json").exists():
            self.about = sealed_json.read(place / "index.json")
            _check(self.about, f"{folder}/index.json")
        elif place.exists() and any(path.name != STAGED for path in place.iterdir()):
            raise ValueError(f"{folder} holds something that is no index; give a new folder")
        self.done: dict[str, Done] = {}
        self.skipped: dict[str, str] = {}
        self._tables: list[pa.Table] = []
        names = [p.name for p in (place / "metadata").iterdir()] if self.about else []
        numbers = sorted(int(found[1]) for found in map(_NAME.fullmatch, names) if found)
        if numbers != list(range(len(numbers))):
            raise ValueError(f"{folder}/metadata: parts are missing, there are {numbers}")
        for number in numbers:
            self._take(self._read(number))

    def _read(self, number: int) -> pa.Table:
        path = storage.place(self.folder) / f"metadata/metadata_{number}.parquet"
        try:
            table = pq.read_table(io.BytesIO(path.read_bytes()))
            said = bounded_json.parse(table.schema.metadata[_KEY])
            kinds = (said["group"], str), (said["skipped"], dict), (said["last"], bool)
            if not all(isinstance(value, kind) for value, kind in kinds):
                raise ValueError("its metadata have other types")
            table.select(list(COLUMNS)).cast(pa.schema([(name, pa.string()) for name in COLUMNS]))
            return table
        except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete it and all parts of a higher number, and run "
                "the same `search index` again"
            ) from None

    def _take(self, table: pa.Table) -> None:
        self._tables.append(table)
        said = json.loads(table.schema.metadata[_KEY])
        done = self.done.setdefault(said["group"], Done())
        done.pictures += len(table) + len(said["skipped"])
        done.whole = said["last"]
        self.skipped |= said["skipped"]

    def begin(self, about: dict[str, Any]) -> None:
        """Writes index.json of a new folder, or checks that the same model made the old one.

        Raises:
            ValueError: another model.
        """
        check_model(self.folder, self.about, about)
        if not self.about:
            self.about = about
            (storage.place(self.folder) / "metadata").mkdir(parents=True, exist_ok=True)
            sealed_json.write(storage.place(self.folder) / "index.json", about)

    def write(
        self,
        group: str,
        embeddings: np.ndarray,
        rows: Sequence[tuple[str, str]],
        skipped: dict[str, str],
        last: bool,
    ) -> None:
        """Adds a part: float32 [n, E], n (name, caption); `last` of its group."""
        number = len(self._tables)
        out = io.BytesIO()
        np.save(out, embeddings.astype(np.float16))
        place = storage.place(self.folder)
        storage.write_bytes(place / f"img_emb/img_emb_{number}.npy", out.getvalue())
        said = json.dumps(dict(group=group, skipped=skipped, last=last))
        columns = {
            name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(COLUMNS)
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
                rows = list(zip(*(table[name].to_pylist() for name in COLUMNS)))
                self.write(said["group"], other._part(number), rows, said["skipped"], said["last"])
            before += len(table) + len(said["skipped"])

    def names(self) -> list[str]:
        """Of all pictures, in the order of the embeddings."""
        return self._column("image_path")

    def captions(self) -> list[str]:
        """Of all pictures, '' where the data have none."""
        return self._column("caption")

    def _column(self, name: str) -> list[str]:
        return [text for table in self._tables for text in table[name].to_pylist()]

    def embeddings(self) -> np.ndarray:
        """float16 [N, E] of all parts, in order.

        Raises:
            ValueError: a part is missing or damaged.
        """
        found = [self._part(number) for number in range(len(self._tables))]
        return np.concatenate(found) if found else np.zeros((0, self.about["width"]), np.float16)

    def _part(self, number: int) -> np.ndarray:
        path = storage.place(self.folder) / f"img_emb/img_emb_{number}.npy"
        try:
            return _array(path.read_bytes(), (len(self._tables[number]), self.about["width"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); index again") from None


def check_model(folder: str, there: dict[str, Any], about: dict[str, Any]) -> None:
    """Raises ValueError where the index of `folder`, {} for a new one, is another model's."""
    if there and there["model"] != about["model"]:
        raise ValueError(
            f"--out={folder} was made by another model ({there['checkpoint']}); embeddings of two "
            "models do not compare: give a new folder"
        )


def _check(about: dict[str, Any], place: str) -> None:
    """Raises ValueError where index.json lacks what `begin` writes."""
    width = about.get("width")
    texts = all(isinstance(about.get(key), str) for key in ("model", "checkpoint"))
    if not texts or not isinstance(width, int) or not 0 < width <= 65_536:
        raise ValueError(
            f"{place} is damaged: it names no model, checkpoint and width; index again"
        )


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
