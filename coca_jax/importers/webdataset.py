"""WebDataset: tar files whose members that share a name make one example."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from coca_jax.data import bounded_json, files, formats, images, videos
from coca_jax.data.references import Span
from coca_jax.importers import lines, tar_members
from coca_jax.importers.items import (
    CHATS,
    LABEL_FIELDS,
    TEXT_FIELDS,
    Item,
    Options,
    Unit,
    guarded,
    names,
    strings,
    take,
)

IMAGE_SUFFIXES = (*(suffix[1:] for suffix in images.SUFFIXES), "img", "image")
MEDIA_SUFFIXES = IMAGE_SUFFIXES + videos.SUFFIXES
PATTERNS = formats.PATTERNS["webdataset"]
TEXT_SUFFIXES = ("txt", "cls", "json")


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of a WebDataset: its tar files.

    Raises:
        FileNotFoundError: no tar file.
    """
    return [Unit(file) for file in files.find(path, PATTERNS, split)]


class Group:
    """The members of one example, as far as they are of use."""

    def __init__(self, key: str, options: Options):
        self.key, self.data = key, {}  # type: str, dict[str, bytes]
        self.starts: dict[str, int] = {}
        self._wanted = (*MEDIA_SUFFIXES, *TEXT_SUFFIXES, *options.image_field.split(","))
        self._room = 2 * options.max_image_bytes
        self.problem = self.detail = ""

    def add(self, suffix: str, member: tar_members.Member) -> None:
        if suffix not in self._wanted:
            self.data[suffix] = b""
            return
        most = lines.MAX_ROW_BYTES if suffix in TEXT_SUFFIXES else self._room
        if member.size > most:
            text = suffix in TEXT_SUFFIXES
            self.problem = "text_too_long" if text else "image_too_big"
            self.detail = f".{suffix} of {member.size} bytes"
            self.data[suffix] = b""
            return
        self.data[suffix] = member.read()
        self.starts[suffix] = member.start
        self._room -= member.size

    def span(self, suffix: str, path: str, file_bytes: int) -> Span | None:
        """Where a member lies in the archive; None where it cannot be read there."""
        start = self.starts.get(suffix, -1)
        if start < 0:
            return None
        return Span(path, file_bytes, start, len(self.data[suffix]))


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a tar file, in its order. A damaged archive ends with one problem item."""
    base = posixpath.basename(unit.path)
    seen: set[str] = set()
    group, file_bytes = Group("", options), 0

    def finish() -> Iterator[Item]:
        if group.data:
            key = f"{base}/{group.key}"
            if group.problem:
                found = Item(key, problem=group.problem, detail=group.detail)
            else:
                found = guarded(key, lambda: item(key, group, options, unit.path, file_bytes))
            if group.key in seen:
                lost = "; the members of a key must stand together, as `tar --sort=name` puts them"
                lost = lost if found.problem == "missing_image" else ""
                found.problem = "duplicate_key"
                found.detail = f"a second example with this key{lost}"
            seen.add(group.key)
            yield found

    try:
        with files.open_binary(unit.path) as handle:
            file_bytes = handle.seek(0, 2)
            handle.seek(0)
            for member in tar_members.members(handle):
                folder, last = posixpath.split(member.name.removeprefix("./"))
                stem, dot, suffix = last.partition(".")
                if not dot or not stem or files.is_hidden(folder):
                    continue
                key, suffix = posixpath.join(folder, stem), suffix.lower()
                if key != group.key or suffix in group.data:
                    yield from finish()
                    group = Group(key, options)
                group.add(suffix, member)
            yield from finish()
            group = Group("", options)
    except Exception as error:  # damage makes tarfile and zlib raise all sorts
        # What came before is whole; the example that was being read is not.
        if isinstance(error, tar_members.BadEnd):
            yield from finish()
            group = Group("", options)
        key = f"{base}/{group.key}" if group.key else base
        detail = f"{type(error).__name__}: {error}"
        yield Item(key, problem="damaged_archive", detail=detail)


def item(key: str, group: Group, options: Options, path: str = "", file_bytes: int = 0) -> Item:
    """The item of the members of an example, of an archive at `path`."""
    found, members = Item(key), group.data
    first, _, second = options.image_field.partition(",")
    suffix = first or next((s for s in MEDIA_SUFFIXES if s in members), "")
    if suffix not in members or (second and second not in members):
        found.problem, found.detail = "missing_image", f"members {sorted(members)}"
        return found
    found.image, found.second = members[suffix], members[second] if second else b""
    found.span = group.span(suffix, path, file_bytes)
    found.second_span = group.span(second, path, file_bytes)
    try:
        fields = bounded_json.parse(members["json"]) if "json" in members else {}
        text = None if options.text_field else _text(members, "txt")
        label = None if options.label_field else _text(members, "cls")
    except UnicodeDecodeError as error:
        found.problem, found.detail = "bad_utf8", str(error)
        return found
    except ValueError as error:
        found.problem, found.detail = "bad_json", str(error)
        return found
    made = fields.get("recaption")
    if not text and not (isinstance(made, dict) and "captions" in made):
        text = None  # of `recaption` alone an empty member says that no text is kept
    taken = take(fields, options.text_field, (*TEXT_FIELDS, *CHATS))
    found.texts = strings(taken if text is None else text)
    try:
        taken = take(fields, options.label_field, LABEL_FIELDS)
        found.labels = names(label or taken, options.class_names)
    except ValueError as error:
        found.problem, found.detail = "bad_label", str(error)
    found.extra = fields
    return found


def _text(members: dict[str, bytes], suffix: str) -> str | None:
    return files.decode_text(members[suffix]).strip() if suffix in members else None
