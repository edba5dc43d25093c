"""WebDataset: tar files whose members that share a name make one example."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator

from coca_jax.data import files, videos
from coca_jax.importers.items import (
    LABEL_FIELDS,
    TEXT_FIELDS,
    Item,
    Options,
    Unit,
    names,
    strings,
    take,
)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "img", "image")
MEDIA_SUFFIXES = IMAGE_SUFFIXES + videos.SUFFIXES
PATTERNS = ("*.tar", "*.tar.gz", "*.tgz")  # of its files


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of a WebDataset: its tar files.

    Raises:
        FileNotFoundError: no tar file.
    """
    return [Unit(file) for file in files.find(path, PATTERNS, split)]


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a tar file, in its order. A damaged archive ends with one problem item."""
    base = posixpath.basename(unit.path)
    seen: set[str] = set()
    group, members = "", {}  # type: str, dict[str, bytes]

    def finish() -> Iterator[Item]:
        if members:
            item = _item(f"{base}/{group}", members, options)
            if group in seen:
                item.problem, item.detail = "duplicate_key", "a second example with this key"
            seen.add(group)
            yield item

    try:
        with files.open_binary(unit.path) as handle:
            with tarfile.open(fileobj=handle, mode="r|*") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    folder, last = posixpath.split(name)
                    stem, dot, suffix = last.partition(".")
                    if not member.isfile() or not dot or not stem:
                        continue
                    key = posixpath.join(folder, stem)
                    suffix = suffix.lower()
                    if key != group or suffix in members:
                        yield from finish()
                        group, members = key, {}
                    file = archive.extractfile(member)
                    data = file.read() if file else b""
                    if len(data) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    members[suffix] = data
    except (tarfile.TarError, OSError, EOFError) as error:
        # What came before is whole; the example that was being read is not.
        key = f"{base}/{group}" if group else base
        yield Item(key, problem="damaged_archive", detail=str(error))
        return
    yield from finish()


def _item(key: str, members: dict[str, bytes], options: Options) -> Item:
    item = Item(key)
    first, _, second = options.image_field.partition(",")
    suffix = first or next((s for s in MEDIA_SUFFIXES if s in members), "")
    if suffix not in members or (second and second not in members):
        item.problem, item.detail = "missing_image", f"members {sorted(members)}"
        return item
    item.image, item.second = members[suffix], members[second] if second else b""
    try:
        fields = json.loads(members["json"].decode()) if "json" in members else {}
        if not isinstance(fields, dict):
            raise ValueError("the .json member is not an object")
        text = members["txt"].decode() if "txt" in members and not options.text_field else None
        label = members["cls"].decode() if "cls" in members and not options.label_field else None
    except UnicodeDecodeError as error:
        item.problem, item.detail = "bad_utf8", str(error)
        return item
    except ValueError as error:
        item.problem, item.detail = "bad_json", str(error)
        return item
    found = take(fields, options.text_field, TEXT_FIELDS)
    item.texts = strings(text.strip() if text is not None else found)
    try:
        found = take(fields, options.label_field, LABEL_FIELDS)
        item.labels = names(label.strip() if label is not None else found, options.class_names)
    except ValueError as error:
        item.problem, item.detail = "bad_label", str(error)
    item.extra = fields
    return item
