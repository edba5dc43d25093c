"""Images with their texts in files beside them, as img2dataset's output `files` and many tools that
tune models have it: 000000012.jpg, 000000012.txt, 000000012.json. Read as the members of a tar are.
"""

from __future__ import annotations

import functools
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping

from coca_jax.data import files, named_files
from coca_jax.data.formats import MEDIA, SIDECARS
from coca_jax.importers import lines, tar_members, webdataset
from coca_jax.importers.items import Item, Options, Unit, guarded, load_image, split_units

ROWS_PER_UNIT = 2048
PATTERNS = (*(f"*{s}" for s in MEDIA), *(f"*{s.upper()}" for s in MEDIA))  # of its images


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of a folder: ranges of its list of images, by name.

    Raises:
        FileNotFoundError: no image.
        ValueError: pairs are asked for.
    """
    if "," in options.image_field:
        raise ValueError(f"--image_field={options.image_field}: a file is one image, not a pair")
    root = named_files.root_of(path)
    folders = Counter(posixpath.dirname(file) for file in files.find(path, PATTERNS, split))
    counts = sorted(folders.items())
    return [u for folder, n in counts for u in split_units(folder, n, ROWS_PER_UNIT, root)]


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a range of the images of a folder, by name."""
    system, plain = files.filesystem(unit.path)
    names = [posixpath.basename(name.rstrip("/")) for name in system.ls(plain, detail=False)]
    images = sorted(name for name in names if name.lower().endswith(MEDIA))
    there = {_lower_suffix(name): name for name in sorted(names)}
    within = posixpath.relpath(plain, files.filesystem(unit.root)[1])
    for name in images[unit.start : unit.stop]:
        key = posixpath.normpath(posixpath.join(within, posixpath.splitext(name)[0]))
        yield guarded(key, lambda: _item(key, name, there, unit, options))  # noqa: B023


def _lower_suffix(name: str) -> str:
    """'a.B.TXT' -> 'a.B.txt': cameras and old systems write suffixes in capitals."""
    stem, suffix = posixpath.splitext(name)
    return stem + suffix.lower()


def _item(key: str, name: str, there: Mapping[str, str], unit: Unit, options: Options) -> Item:
    """An image with what lies beside it. Raises OSError, ValueError for a text that may not be
    read. there: the files of the folder, by their names with small suffixes."""
    image = load_image(Item(key), unit.path, name, unit, options)
    if image.problem:
        return image
    stem, suffix = posixpath.splitext(name)
    group = webdataset.Group(key, options)
    member = tar_members.Member(name, len(image.image), lambda: image.image, -1)
    group.add(suffix[1:].lower(), member)
    for beside in SIDECARS:
        if stem + beside in there:
            try:
                roots = (unit.root, *options.allow_paths)
                path = named_files.resolve(unit.path, there[stem + beside], roots)
            except named_files.Outside as error:
                return Item(key, problem="outside_input", detail=str(error))
            read_text = functools.partial(files.read_bounded, path, lines.MAX_ROW_BYTES)
            group.add(beside[1:], tar_members.Member(path, files.size(path), read_text, -1))
    if group.problem:
        return Item(key, problem=group.problem, detail=group.detail)
    item = webdataset.item(key, group, options)
    item.span = image.span
    return item
