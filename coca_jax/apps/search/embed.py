"""Embeds pictures into the parts of an index."""

from __future__ import annotations

import dataclasses
import itertools
import os
import posixpath
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from coca_jax.apps.search.parts import Parts, Row
from coca_jax.data import image_files
from coca_jax.data.sources import files, formats, image_folder, lists, registry
from coca_jax.data.sources.fields import printable
from coca_jax.data.sources.items import Item, Options, Unit
from coca_jax.inference import prefetch
from coca_jax.runtime import storage

if typing.TYPE_CHECKING:
    from coca_jax.inference.model import CoCaModel


# The pictures to embed, wherever they lie: files in folders, tars, parquet, lists.


PART = 1024  # pictures a part of an index: what a stop loses at most
State = Literal["new", "failed", "done"]  # of a file: not in the index, not read so far, in it
_OPTIONS = Options(check=False)
_LISTS = ("csv", "jsonl", "json")  # formats whose rows name files


@dataclasses.dataclass(frozen=True)
class Picture:
    """name: tells it from all others, a path where it is a file. image: a path or the encoded
    bytes. problem: why there is none. stamp: `local_files.stamp`, taken before it is read."""

    name: str
    image: str | bytes
    caption: str = ""
    problem: str = ""
    stamp: tuple[int, int] | None = None


class File(NamedTuple):
    """A picture that is a file. problem: why it is not to be read, or why a row names none."""

    name: str
    caption: str = ""
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Group:
    """Pictures that are read one after the other, by one process.

    Attributes:
        key: the same at the next start; '' for files, which are told by their names.
        count: how many to expect; 0: not known.
        files: those of a folder, or that lists name.
        unit, format: of everything else, its part and how it is read.
    """

    key: str
    count: int = 0
    files: tuple[File, ...] = ()
    unit: Unit | None = None
    format: str = ""

    def read(self) -> Iterator[Picture]:
        """The pictures, in order."""
        if self.unit is None:
            return (
                Picture(printable(name), name, caption, problem, storage.stamp(name))
                for name, caption, problem in self.files
            )
        path = self.unit.path
        items = registry.find(self.format).read(self.unit, _OPTIONS)
        return (_picture(path, item) for item in items)


def groups(
    path: str,
    state: Callable[[str, str], State],
    part: int = PART,
    allow_paths: Sequence[str] = (),
) -> list[Group]:
    """The pictures at a path (folder, tar, glob, parquet, list, prepared data, 'tfds:NAME').

    state: of a file with a caption; what is done is left out, and what failed comes last, in groups
    of its own: a run that was ended in between goes on as if it had not been. part: files a group.
    allow_paths: folders and URLs from which rows of lists may name pictures, besides the list's
    own.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no picture.
    """
    format = _format(path)
    if format in ("imagefolder", "sidecars"):
        captions = _captions(path, format)
        found = image_files.find([path])
        named = (File(name, captions.get(storage.whole_path(name), "")) for name in found)
        return _of_files(named, state, part)
    if format in _LISTS:
        return _of_files(_listed(path, format, allow_paths), state, part)
    input = path.removeprefix("tfds:") if format == "tfds" else path
    module = registry.find(format)
    splits = module.splits(input) if format == "prepared" else [""]
    units = [unit for split in splits for unit in module.plan(input, split, _OPTIONS)]
    return [
        Group(f"{unit.path}:{unit.start}-{unit.stop}", unit.rows, unit=unit, format=format)
        for unit in units
    ]


def place(path: str) -> str:
    """The folder in and below which the pictures at a path may lie; of what is neither a folder nor
    a list the path itself. Raises what `groups` raises."""
    if files.is_remote(path) or os.path.isdir(path) or _format(path) not in _LISTS:
        return path
    return formats.root_of(path)


def _format(path: str) -> str:
    named = files.exists(path) and path.lower().endswith(formats.MEDIA)
    return "imagefolder" if named else formats.guess(path)


def _of_files(found: Iterable[File], state: Callable[[str, str], State], part: int) -> list[Group]:
    by_state: dict[State, list[File]] = dict(new=[], failed=[], done=[])
    for one in found:
        by_state[state(one.name, one.caption)].append(one)
    cut = [
        tuple(some[start : start + part])
        for some in (by_state["new"], by_state["failed"])
        for start in range(0, len(some), part)
    ]
    return [Group("", len(some), some) for some in cut]


def _listed(path: str, format: str, allow_paths: Sequence[str]) -> Iterator[File]:
    """What the rows of lists name, as a folder of the same files would be read."""
    module = registry.find(format)
    for unit in module.plan(path, "", _OPTIONS):
        for row in module.located(unit, _OPTIONS):
            yield _file(row, unit, allow_paths)


def _file(row: lists.Located, unit: Unit, allow_paths: Sequence[str]) -> File:
    item = row.item
    if item.problem:
        name = _spelled(files.join(posixpath.dirname(unit.path), item.key), unit.root)
        return File(name, problem=f"{item.problem} ({item.detail})")
    name = _spelled(formats.path_of(row.folder, row.name), unit.root)
    try:
        formats.resolve("", name, [unit.root, *allow_paths])
    except ValueError as error:
        return File(name, problem=str(error))
    return File(name, _caption(item))


def _spelled(path: str, root: str) -> str:
    """A path as that of a file in the folder `root`, which may be relative to the current one."""
    if files.is_remote(path):
        return path
    within = os.path.relpath(storage.whole_path(path), storage.whole_path(root))
    return os.path.normpath(os.path.join(root, within))


def _captions(path: str, format: str) -> dict[str, str]:
    """What the metadata of a folder of pictures, the names of its folders or the files beside them
    say of each, by whole paths: those of units are absolute, however the folder is spelled."""
    if files.exists(path) and path.lower().endswith(formats.MEDIA):
        return {}
    options = Options()
    found: dict[str, tuple[str, bool]] = {}  # a caption, and whether it is a text
    for unit in image_folder.plan(path, "", options) if format == "imagefolder" else ():
        for one in image_folder.located(unit, options):
            if isinstance(one.name, str) and one.name:
                whole = storage.whole_path(files.join(one.folder, one.name))
                found[whole] = _caption(one.item), bool(one.item.texts)
    # In a bucket they are a request for each picture in every run.
    if not files.is_remote(path) and (format == "sidecars" or formats.beside(path)):
        for name, item in image_folder.sidecar_texts(
            image_folder.plan_sidecars(path, "", options), options
        ):
            before, is_text = found.get(whole := storage.whole_path(name), ("", False))
            if not is_text and (item.texts or not before):  # labels do not rename a class folder
                found[whole] = _caption(item), bool(item.texts)
    return {whole: caption for whole, (caption, _) in found.items()}


def _caption(item: Item) -> str:
    """Its first text or its labels, which may be the name of a folder that is no UTF-8, or hold
    half of a character that a list has by its number."""
    return printable(next(itertools.chain(item.texts, [", ".join(item.labels)]), ""))


def _picture(path: str, item: Item) -> Picture:
    name = item.key if item.key.startswith(path) else f"{path}#{item.key}"
    problem = f"{item.problem} ({item.detail})" if item.problem else ""
    return Picture(printable(name), item.image, _caption(item), problem)


VERSION = 1  # of the folder's layout


def about(model: CoCaModel, checkpoint: str) -> dict[str, Any]:
    """The contents of index.json."""
    info = dict(version=VERSION, model=model.checksum(), checkpoint=checkpoint)
    sizes = model.config.model
    return info | dict(width=sizes.embed_dim, dtype=sizes.dtype, made_in=os.getcwd())


def add(
    model: CoCaModel,
    group: Group,
    parts: Parts,
    batch_size: int,
    part: int,
    say: Callable[[str], None],
    report: Callable[[int], Any],
) -> None:
    """Embeds the pictures of a group that `parts` does not hold. part: pictures a part; say: told
    of pictures that cannot be read; report: given the numbers of pictures done."""
    done = parts.done(group.key)
    report(done.pictures)
    if done.whole:
        return
    for chunk, last in _chunks(itertools.islice(group.read(), done.pictures, None), part):
        _add_part(model, group, chunk, last, parts, batch_size, say)
        report(len(chunk))


def _add_part(
    model: CoCaModel,
    group: Group,
    chunk: list[Picture],
    last: bool,
    parts: Parts,
    batch_size: int,
    say: Callable[[str], None],
) -> None:
    rows, found, skipped = [], [np.zeros((0, parts.about["width"]), np.float32)], {}

    def read(picture: Picture) -> np.ndarray:
        if picture.problem:
            raise ValueError(picture.problem)
        return model.fit_image(picture.image)

    for batch in prefetch.batches(chunk, read, batch_size):
        good = [(picture, x) for picture, x in batch if isinstance(x, np.ndarray)]
        for picture, why in batch:
            if not isinstance(why, np.ndarray):
                text = " ".join(str(why).split())
                skipped[picture.name] = text
                say(f"skipped {text if picture.name in text else f'{picture.name}: {text}'}")
        if good:
            found.append(model.encode_image(np.stack([x for _, x in good])))
            rows += [Row(one.name, one.caption, one.stamp) for one, _ in good]
    parts.write(group.key, np.concatenate(found), rows, skipped, last)


def _chunks(items: Iterator[Picture], size: int) -> Iterator[tuple[list[Picture], bool]]:
    """Lists of `size`, and whether each is the last; one empty list where there is nothing."""
    chunk = list(itertools.islice(items, size))
    while True:
        following = list(itertools.islice(items, 1))
        yield chunk, not following
        if not following:
            return
        chunk = following + list(itertools.islice(items, size - 1))
