"""Folders of images: one folder per class, or a metadata.jsonl or metadata.csv (HF imagefolder), or a
text file beside each image (sidecars).

Sidecars are what img2dataset's output `files` and tools that fine-tune models write: 000000012.jpg,
000000012.txt, 000000012.json. They are read as the members of a tar are, but each line of a text is a
caption.
"""

from __future__ import annotations

import collections
import functools
import itertools
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from coca_jax.data.sources import files, formats, lists, tars
from coca_jax.data.sources.fields import names
from coca_jax.data.sources.formats import MEDIA, METADATA, SIDECARS, TEXTS
from coca_jax.data.sources.items import (
    Item,
    Options,
    Unit,
    guarded,
    load_image,
    named_units,
)
from coca_jax.data.sources.registry import Format
from coca_jax.runtime import storage


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of an imagefolder: ranges of its metadata, or of its list of images.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
        ValueError: two files of metadata in one folder, or fields are named that there are not;
            or the folders are splits, and none or several of them are this one.
    """
    if not files.is_remote(path) and not files.exists(path):
        raise FileNotFoundError(f"{path}: no such folder")
    system, plain = files.filesystem(path)
    if system.isfile(plain):
        raise ValueError(f"{path} is one file; --format=imagefolder reads a folder of pictures")
    root = _folder_of(path, split)
    found = _metadata(root)
    if found:
        return lists.plan_metadata(path, found, options)
    _refuse_fields(path, options)
    plain = files.filesystem(root)[1]
    found = _images(root)
    if files.is_remote(root):  # a local name may have '::', which stands for another thing in URLs
        found = [files.filesystem(path)[1] for path in found]
    start = plain.rstrip("/") + "/"
    listed = [
        p[len(start) :] if p.startswith(start) else posixpath.relpath(p, plain) for p in found
    ]
    return named_units(root, listed, lists.ROWS_PER_UNIT, formats.root_of(path))


def _refuse_fields(path: str, options: Options) -> None:
    """Raises ValueError where options name fields of pictures that have only their folders."""
    fields = ("text_field", "label_field", "image_field")
    named = next((field for field in fields if getattr(options, field)), "")
    if not named:
        return
    raise ValueError(
        f"--{named}={getattr(options, named)}: {path} is read by its folder names, without fields. "
        "Add metadata.csv with the columns file_name, text, or give a table with --input=FILE."
    )


def splits(path: str) -> list[str]:
    """The splits of an imagefolder that has a folder for each, else []: 'train', 'test' and
    'validation', 'valid', 'val' or 'dev', as it says."""
    return sorted(_split_folders(path))


def _folder_of(path: str, split: str) -> str:
    """The folder with the images of a split; the whole for '', and where no folder is a split.

    Raises ValueError where folders are splits, and none or several of them are this one.
    """
    folders = _split_folders(path) if split else {}
    wanted = files.SPLITS.get(split.lower())
    names = [split] if split in folders else [n for n in folders if files.SPLITS[n] == wanted]
    same = sorted(folder for name in names for folder in folders[name])
    if len(same) == 1:
        return same[0]
    inner = files.join(path, split)
    if split and not wanted and files.exists(inner):
        return inner
    if folders:
        both = " and ".join(map(posixpath.basename, same))
        why = f"both {both}" if same else f"none of {', '.join(sorted(folders))}"
        fix = "" if len(names) == 1 else "--split one of them, or "  # which one name does not tell
        raise ValueError(
            f"{path}: the split {split!r} is {why}, which are its folders; give {fix}the folder to "
            "read as --input"
        )
    return path


def _split_folders(path: str, *, wrapped: bool = False) -> dict[str, list[str]]:
    """Split -> its folders, by their names in any case; {} where there are none. Of several, as
    "train" beside "Training", it is not known which is meant.

    A folder is no split where other folders of images stand beside it: then it is a class, such as
    "train" among vehicles. Metadata that stands above the folders alone names the images of them
    all and leaves them one split. The folders may lie in a single one that holds everything.

    wrapped: `path` is such a folder, and not the input.
    """
    system, plain = files.filesystem(path)
    if not system.isdir(plain):
        return {}
    entries = {posixpath.basename(e["name"].rstrip("/")): e for e in system.ls(plain, detail=True)}
    names = sorted(n for n in entries if not files.is_hidden(n))
    inside = [name for name in names if entries[name]["type"] == "directory"]
    found = [name for name in inside if name.lower() in files.SPLITS]
    rest = (n for n in inside if n not in found and _has_media(files.join(path, n)))
    others = list(itertools.islice(rest, 2))
    above = bool({*METADATA} & {*names})
    if not found and not wrapped and not above and len(others) == 1:
        alone = not any(name.lower().endswith(MEDIA) for name in names)
        return _split_folders(files.join(path, others[0]), wrapped=True) if alone else {}
    folders = {name: files.join(path, name) for name in found}
    if others or (above and not any(map(_metadata, folders.values()))):
        return {}
    by_split: dict[str, list[str]] = {}
    for name, folder in folders.items():
        by_split.setdefault(_own_name(name), []).append(folder)
    return by_split


def _own_name(folder: str) -> str:
    """What a folder calls its split, validation by any of its names."""
    name = folder.lower()
    return name if name in files.VALIDATION else files.SPLITS[name]


def _has_media(folder: str) -> bool:
    return any(name.lower().endswith(MEDIA) for names in files.walk(folder) for name in names)


def _metadata(root: str) -> list[str]:
    """The metadata files of a folder, at its top or below."""
    patterns = tuple(pattern for name in METADATA for pattern in (name, f"*/{name}"))
    try:
        found = files.find(root, patterns)
    except FileNotFoundError:
        return []
    found.sort(key=lambda one: METADATA.index(posixpath.basename(one).lower()))
    first: dict[str, str] = {}
    for one in found:
        folder = posixpath.dirname(one)
        if first.setdefault(folder, one) != one:
            both = f"{posixpath.basename(first[folder])} and {posixpath.basename(one)}"
            raise ValueError(
                f"{folder} has both {both}, which would give each picture twice; remove one, or "
                f"give the one to read, --input={one}"
            )
    return found


def _images(root: str) -> list[str]:
    return files.find(root, formats.IMAGES)


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a unit, in the order of the metadata."""
    for found in located(unit, options):
        yield found.load(unit, options)


def located(unit: Unit, options: Options) -> Iterator[lists.Located]:
    """The items of a unit without their images."""
    kind = unit.path.lower()
    if kind.endswith(".jsonl"):
        yield from lists.line_located(unit, options)
    elif kind.endswith(".csv"):
        yield from lists.csv_located(unit, options)
    else:
        folder = files.absolute(unit.path)
        for name in unit.names:
            item, label = Item(name), posixpath.dirname(name).replace("_", " ").replace("/", ", ")
            try:
                item.labels = names(label, options.class_names)
            except ValueError as error:
                item.problem, item.detail = "bad_label", str(error)
            yield lists.Located(item, unit.path, files.join(folder, name))


# Images with texts beside them.


def plan_sidecars(path: str, split: str, options: Options) -> list[Unit]:
    """Units of a folder: its images by their names, those of each folder in it for themselves.

    Raises:
        FileNotFoundError: no image.
        ValueError: pairs are asked for.
    """
    if "," in options.image_field:
        raise ValueError(f"--image_field={options.image_field}: a file is one image, not a pair")
    root = formats.root_of(path)
    _listed.cache_clear()  # of a bucket nothing else tells that a folder has changed
    images = files.find(_folder_of(path, split), formats.IMAGES)
    found = sorted(map(posixpath.split, images))
    units = []
    for folder, inside in itertools.groupby(found, lambda file: file[0]):
        # The names and not their number: a split or a pattern need not have all of a folder.
        units += named_units(folder, [name for _, name in inside], lists.ROWS_PER_UNIT, root)
    return units


def read_sidecars(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of the images that a unit names, in their order."""
    there, shared = _listing(unit)
    plain = files.filesystem(unit.path)[1]
    within = posixpath.relpath(plain, files.filesystem(unit.root)[1])
    for name in unit.names:
        stem = posixpath.splitext(name)[0]
        key = posixpath.normpath(posixpath.join(within, name if stem in shared else stem))
        yield guarded(key, lambda: _item(key, name, there, unit, options))  # noqa: B023


def sidecar_texts(units: Iterable[Unit], options: Options) -> Iterator[tuple[str, Item]]:
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
            read_text = functools.partial(files.read_bounded, path, lists.MAX_ROW_BYTES)
            group.add(kind, tars.Member(path, files.size(path), read_text, -1))
    if group.problem:
        return Item(key, problem=group.problem, detail=group.detail)
    item = tars.item(key, group, options)
    if "txt" in group.data and not options.text_field:
        # A caption a line, as CUB and Flowers have them; in a tar it is one, as open_clip reads it.
        found = (line.strip() for text in item.texts for line in text.split("\n"))
        item.texts = [line for line in found if line]
    return item


FORMATS = (
    Format("imagefolder", plan, read, formats.IMAGES, 0, splits=splits, located=located),
    Format("sidecars", plan_sidecars, read_sidecars, formats.IMAGES, 0, splits=splits),
)
