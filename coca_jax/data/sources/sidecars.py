"""Images with their texts in files beside them, as img2dataset's output `files` and many tools that
tune models have it: 000000012.jpg, 000000012.txt, 000000012.json. Read as the members of a tar are,
but for texts of several lines, each of which is a caption.
"""

from __future__ import annotations

import collections
import functools
import itertools
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from coca_jax.data.sources import files, formats, rows, tars
from coca_jax.data.sources.formats import SIDECARS, TEXTS
from coca_jax.data.sources.items import Item, Options, Unit, guarded, load_image, named_units
from coca_jax.runtime import storage

ROWS_PER_UNIT = 2048
PATTERNS = formats.PATTERNS["sidecars"]


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of a folder: its images by their names, those of each folder in it for themselves.

    Raises:
        FileNotFoundError: no image.
        ValueError: pairs are asked for.
    """
    if "," in options.image_field:
        raise ValueError(f"--image_field={options.image_field}: a file is one image, not a pair")
    root = formats.root_of(path)
    _listed.cache_clear()  # of a bucket nothing else tells that a folder has changed
    found = sorted(map(posixpath.split, files.find(path, PATTERNS, split, all_told=True)))
    units = []
    for folder, inside in itertools.groupby(found, lambda file: file[0]):
        # The names and not their number: a split or a pattern need not have all of a folder.
        units += named_units(folder, [name for _, name in inside], ROWS_PER_UNIT, root)
    return units


def splits(path: str) -> list[str]:
    """The splits that the names of the images tell; [] unless each tells one: a picture of a
    'steam train' tells none of the others."""
    return files.splits_told(path, PATTERNS, all_told=True)


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of the images that a unit names, in their order."""
    there, shared = _listing(unit)
    plain = files.filesystem(unit.path)[1]
    within = posixpath.relpath(plain, files.filesystem(unit.root)[1])
    for name in unit.names:
        stem = posixpath.splitext(name)[0]
        key = posixpath.normpath(posixpath.join(within, name if stem in shared else stem))
        yield guarded(key, lambda: _item(key, name, there, unit, options))  # noqa: B023


def texts(units: Iterable[Unit], options: Options) -> Iterator[tuple[str, Item]]:
    """The path of each image of some units that has a text beside it, and that: an item whose image
    is not read. A folder is listed once, whose images are in many units."""
    folder, there, stems = "", {}, set()
    for unit in units:
        if unit.path != folder:
            folder, there = unit.path, _listing(unit).there
            stems = {posixpath.splitext(name)[0] for name in there if name.endswith(SIDECARS)}
        for name in unit.names:
            if posixpath.splitext(name)[0] in stems:
                path = files.join(unit.path, name)
                yield path, guarded(path, lambda: _beside(path, name, b"", there, unit, options))  # noqa: B023


def with_texts(unit: Unit) -> Iterator[str]:
    """The images that a unit names, each before the files of its name beside it that are read."""
    there = _listing(unit).there
    for name in unit.names:
        yield name
        stem = posixpath.splitext(name)[0]
        yield from (there[stem + suffix] for suffix in SIDECARS if stem + suffix in there)


class _Listing(NamedTuple):
    """there: the files of a folder, by their names with small suffixes. shared: names without their
    suffix that several of its pictures have: 'a.jpg' and 'a.png' are two examples, and the key of
    each says which."""

    there: dict[str, str]
    shared: frozenset[str]


def _listing(unit: Unit) -> _Listing:
    """Of a unit's folder, listed once: one with a million files takes seconds, and has hundreds of
    units."""
    return _listed(unit.path, storage.stamp(unit.path))


@functools.lru_cache(maxsize=1)
def _listed(folder: str, stamp: tuple[int, int] | None) -> _Listing:
    """stamp: another one where the folder, a local one, has other files than before."""
    names = files.listing(folder)
    pictures = [name for name in names if name.lower().endswith(formats.MEDIA)]
    taken = collections.Counter([*pictures, *(posixpath.splitext(name)[0] for name in pictures)])
    shared = frozenset(name for name, count in taken.items() if count > 1)
    return _Listing({_lower_suffix(name): name for name in names}, shared)


def _lower_suffix(name: str) -> str:
    """'a.B.TXT' -> 'a.B.txt': cameras and old systems write suffixes in capitals."""
    stem, suffix = posixpath.splitext(name)
    return stem + suffix.lower()


def _item(key: str, name: str, there: Mapping[str, str], unit: Unit, options: Options) -> Item:
    """An image with what lies beside it. there: `_listing`. Raises what `_beside` raises."""
    image = load_image(Item(key), unit.path, name, unit, options)
    if image.problem:
        return image
    item = _beside(key, name, image.image, there, unit, options)
    item.span = image.span
    return item


def _beside(
    key: str, name: str, image: bytes, there: Mapping[str, str], unit: Unit, options: Options
) -> Item:
    """The item of an image. Raises OSError, ValueError for a text that may not be read."""
    stem, suffix = posixpath.splitext(name)
    group = tars.Group(key, options)
    member = tars.Member(name, len(image), lambda: image, -1)
    group.add(suffix[1:].lower(), member)
    for beside in SIDECARS:
        kind = "txt" if beside in TEXTS else beside[1:]
        empty = not group.data.get(kind, b"").strip()  # such a text hides no other
        if stem + beside in there and empty:
            try:
                roots = (unit.root, *options.allow_paths)
                path = formats.resolve(unit.path, there[stem + beside], roots)
            except formats.Outside as error:
                return Item(key, problem="outside_input", detail=str(error))
            read_text = functools.partial(files.read_bounded, path, rows.MAX_ROW_BYTES)
            group.add(kind, tars.Member(path, files.size(path), read_text, -1))
    if group.problem:
        return Item(key, problem=group.problem, detail=group.detail)
    item = tars.item(key, group, options)
    if "txt" in group.data and not options.text_field:
        # A caption a line, as CUB and Flowers have them; in a tar it is one, as open_clip reads it.
        found = (line.strip() for text in item.texts for line in text.split("\n"))
        item.texts = [line for line in found if line]
    return item
