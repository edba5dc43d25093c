"""The pictures to embed, wherever they lie: files in folders, tars, parquet, lists."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

from coca_jax import local_files
from coca_jax.data import files, formats, image_files
from coca_jax.importers import imagefolder, shards
from coca_jax.importers.items import Item, Options, Unit, printable

PART = 1024  # pictures a part of an index: what a stop loses at most
State = Literal["new", "failed", "done"]  # of a file: not in the index, not read so far, in it
_OPTIONS = Options(verify=False)


@dataclasses.dataclass(frozen=True)
class Picture:
    """name: tells it from all others, a path where it is a file. image: a path or the encoded
    bytes. problem: why there is none. stamp: `local_files.stamp`, taken before it is read."""

    name: str
    image: str | bytes
    caption: str = ""
    problem: str = ""
    stamp: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Pictures that are read one after the other, by one process.

    Attributes:
        key: the same at the next start; '' for files, which are told by their names.
        count: how many to expect; 0: not known.
        files: (path, caption) of each file.
        unit, format: of what is no folder of files, its part and how it is read.
    """

    key: str
    count: int = 0
    files: tuple[tuple[str, str], ...] = ()
    unit: Unit | None = None
    format: str = ""

    def read(self) -> Iterator[Picture]:
        """The pictures, in order."""
        if self.unit is None:
            return (
                Picture(printable(name), name, caption, stamp=local_files.stamp(name))
                for name, caption in self.files
            )
        path = self.unit.path
        items = shards.importer(self.format).read(self.unit, _OPTIONS)
        return (_picture(path, item) for item in items)


def groups(path: str, state: Callable[[str, str], State], part: int = PART) -> list[Group]:
    """The pictures at a path (folder, tar, glob, parquet, list, prepared data, 'tfds:NAME').

    state: of a file with a caption; what is done is left out, and what failed comes last, in groups
    of its own: a run that was ended in between goes on as if it had not been. part: files a group.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no picture.
    """
    if files.exists(path) and path.lower().endswith(formats.MEDIA):
        format = "imagefolder"
    else:
        format = formats.guess(path)
    if format in ("imagefolder", "sidecars"):
        captions = _captions(path)
        told: dict[State, list[tuple[str, str]]] = dict(new=[], failed=[], done=[])
        for name in image_files.find([path]):
            caption = captions.get(local_files.whole_path(name), "")
            told[state(name, caption)].append((name, caption))
        cut = [
            tuple(some[start : start + part])
            for some in (told["new"], told["failed"])
            for start in range(0, len(some), part)
        ]
        return [Group("", len(some), some) for some in cut]
    input = path.removeprefix("tfds:") if format == "tfds" else path
    module = shards.importer(format)
    splits = module.splits(input) if format == "prepared" else [""]
    units = [unit for split in splits for unit in module.plan(input, split, _OPTIONS)]
    return [
        Group(f"{unit.path}:{unit.start}-{unit.stop}", unit.rows, unit=unit, format=format)
        for unit in units
    ]


def _captions(path: str) -> dict[str, str]:
    """What the metadata of a folder of pictures, or the names of its folders, say of each, by
    whole paths: those that metadata name are absolute, however the folder is spelled."""
    if files.exists(path) and path.lower().endswith(formats.MEDIA):
        return {}
    options, found = Options(), {}
    for unit in imagefolder.plan(path, "", options):
        for one in imagefolder.located(unit, options):
            if isinstance(one.name, str) and one.name:
                whole = local_files.whole_path(files.join(one.folder, one.name))
                found[whole] = _caption(one.item)
    return found


def _caption(item: Item) -> str:
    return next(itertools.chain(item.texts, [", ".join(item.labels)]), "")


def _picture(path: str, item: Item) -> Picture:
    name = item.key if item.key.startswith(path) else f"{path}#{item.key}"
    problem = f"{item.problem} ({item.detail})" if item.problem else ""
    return Picture(printable(name), item.image, _caption(item), problem)
