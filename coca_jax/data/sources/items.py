"""What every importer works with: the options, the units of work, and the items they yield."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from coca_jax.data.sources import files, formats
from coca_jax.data.sources.references import UNKNOWN, Span

# Files that an importer leaves open for the unit that follows in them; None outside of
# `resuming_reads`.
open_readers: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "open_readers", default=None
)


@contextlib.contextmanager
def resuming_reads() -> Iterator[None]:
    """Inside, reading a unit resumes where the unit before it ended in the same file, unless the
    file has changed: a parquet row group, which pandas makes of a million rows, is read in full for
    its first row."""
    held: dict[str, Any] = {}
    token = open_readers.set(held)
    try:
        yield
    finally:
        open_readers.reset(token)
        for reader in held.values():
            reader.close()


@dataclasses.dataclass(frozen=True)
class Options:
    """How to read and what to keep; together with the input it fixes the output, byte for byte.

    Attributes:
        text_field, label_field, image_field: names of fields or columns; '': the format's usual.
            image_field 'left,right': examples are pairs of images.
        class_names: names of integer labels, in order.
        where: fields an example must have, as (name, allowed values).
        check: read and decode each image. Without it a copy reads their headers alone, and an index
            (in_place) none of them: they are checked when training first reads them.
        min_side, max_aspect: of images, in pixels and long side over short; 0: any.
        max_pixels: of an image; more is taken for a decompression bomb.
        max_image_bytes: of an encoded image.
        min_text, max_text: length of a caption in characters; longer ones count as damage.
        require: 'any', 'text' or 'label': what an example must have besides its image.
        max_side: images larger than this are shrunk and encoded again; 0: bytes are copied.
        sample: share of the examples to keep, chosen by their keys.
        holdout: share of the images that is kept apart, chosen by their bytes: equal images are on
            the same side.
        held_out: take those that are kept apart, not the others.
        seed: of the sample.
        dedup: 'none', 'content' (images of equal bytes) or 'perceptual' (that look the same too).
        distance: bits of 256 in which images that look the same may differ.
        exclude: paths of evaluation images, none of which is to be trained on.
        yields_to: (field, values) of the examples of other splits, in order, that keep their images
            where `dedup` finds the same among those of this split.
        allow_paths: folders and URLs from which rows may name image files, besides the input's own.
        in_place: write references to the images' bytes in place of the bytes.
    """

    text_field: str = ""
    label_field: str = ""
    image_field: str = ""
    class_names: tuple[str, ...] = ()
    where: tuple[tuple[str, tuple[str, ...]], ...] = ()
    check: bool = True
    min_side: int = 1
    max_aspect: float = 0.0
    max_pixels: int = files.MAX_PIXELS
    max_image_bytes: int = 64 << 20
    min_text: int = 1
    max_text: int = 10_000
    require: str = "any"
    max_side: int = 0
    sample: float = 1.0
    holdout: float = 0.0
    held_out: bool = False
    seed: int = 0
    dedup: str = "none"
    distance: int = 6
    exclude: tuple[str, ...] = ()
    yields_to: tuple[tuple[str, tuple[str, ...]], ...] = ()
    allow_paths: tuple[str, ...] = ()
    in_place: bool = False

    @property
    def unread(self) -> bool:
        """Whether images are not read, where their places can be told without that."""
        return self.in_place and not self.check


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of the input that one process reads in one go.

    Attributes:
        path: a file.
        start, stop: which of its rows (or bytes, as the format likes); stop 0: to the end.
        rows: how many items to expect; 0: not known.
        root: the folder below which its rows may name files; '': the file's own.
        names: of a folder, the files in it that are its rows.
        offset: byte of a file at which its rows begin; 0: they are counted from the beginning.
        line: number of lines of the file before `start`, where that is a byte.
    """

    path: str
    start: int = 0
    stop: int = 0
    rows: int = 0
    root: str = ""
    names: Sequence[str] = ()
    offset: int = 0
    line: int = 0


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was drawn of data before, one of the other: how many holdouts, and the seeds of samples.
    What is drawn next does not fall on the same side again."""

    holdouts: int = 0
    seeds: tuple[int, ...] = ()


@dataclasses.dataclass
class Item:
    """An example as found. `problem` says why it cannot be used, for the quarantine list; `span`
    and `second_span` where its images lie, where that can be said; `drawn` what it is left of."""

    key: str
    image: bytes = b""
    texts: Sequence[str] = ()
    labels: Sequence[str] = ()
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""
    detail: str = ""
    second: bytes = b""  # the other image of a pair
    span: Span | None = None
    second_span: Span | None = None
    drawn: Drawn = Drawn()


class Rows(NamedTuple):
    """Examples of an index that are sound as far as they were read, column by column; of each its key,
    texts, labels, further fields as JSON, and the reference to its image."""

    keys: list[str]
    texts: list[list[str]]
    labels: list[tuple[str, ...]]
    extras: list[str]
    images: list[bytes]


def split_units(path: str, rows: int, rows_per_unit: int, root: str = "") -> list[Unit]:
    """Cuts rows of a file into units."""
    return [
        Unit(path, start, min(start + rows_per_unit, rows), min(rows_per_unit, rows - start), root)
        for start in range(0, rows, rows_per_unit)
    ]


def named_units(folder: str, names: Sequence[str], rows_per_unit: int, root: str) -> list[Unit]:
    """Cuts the files of a folder into units that name theirs: none has to list the folder again."""
    units = split_units(folder, len(names), rows_per_unit, root)
    return [dataclasses.replace(u, names=tuple(names[u.start : u.stop])) for u in units]


def whole_files(units: Sequence[Unit]) -> list[Unit]:
    """One unit of each file that units are parts of, in their order."""
    found: dict[str, Unit] = {}
    named: dict[str, list[str]] = {}
    for unit in units:
        found[unit.path] = dataclasses.replace(found.get(unit.path, unit), stop=unit.stop, rows=0)
        named.setdefault(unit.path, []).extend(unit.names)
    return [dataclasses.replace(unit, names=tuple(named[path])) for path, unit in found.items()]


def guarded(key: str, make: Callable[[], Item]) -> Item:
    """The item that `make` gives. Whatever a stranger's row makes it raise is that row's problem:
    one bad row never ends an import."""
    try:
        return make()
    except Exception as error:
        return Item(key, problem="bad_record", detail=f"{type(error).__name__}: {error}")


def load_image(item: Item, folder: str, name: Any, unit: Unit, options: Options) -> Item:
    """Reads the file that a row names into its item, or says in the item why it may not. With
    `options.unread` only the size of a local one is read."""
    roots = (unit.root or folder, *options.allow_paths)
    try:
        if options.unread and (place := _regular_file(folder, name, roots)):
            item.span = Span(place[0], place[1], 0, place[1], crc=UNKNOWN)
            return item
        path = formats.resolve(folder, name, roots)
        item.image = files.read_bounded(path, options.max_image_bytes)
        item.span = Span(path, len(item.image), 0, len(item.image))
    except formats.Outside as error:
        item.problem, item.detail = "outside_input", str(error)
    except files.TooLarge as error:
        item.problem, item.detail = "image_too_big", str(error)
    except Exception as error:  # file systems have types of their own
        item.problem, item.detail = "missing_image", f"{type(error).__name__}: {error}"
    return item


def _regular_file(folder: str, name: Any, roots: Sequence[str]) -> tuple[str, int] | None:
    """The path and size of a local file below one of the roots, without asking for each folder
    above it once more; None for a link, for what is not there, and for an empty or remote file."""
    if not isinstance(name, str) or files.is_remote(folder) or files.is_remote(name):
        return None
    path = os.path.join(folder, name)
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return None
    above, last = os.path.split(path)
    place = os.path.join(_real_folder(above), last)
    below = any(place.startswith(_real_folder(root).rstrip("/") + "/") for root in roots)
    regular = stat.S_ISREG(found.st_mode) and found.st_size > 0
    return (place, found.st_size) if regular and below else None


@functools.lru_cache(maxsize=4096)
def _real_folder(path: str) -> str:
    return files.real(path)
