"""WebDataset: tar files whose members that share a name make one example."""

from __future__ import annotations

import bz2
import gzip
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from coca_jax.data.sources import files, references
from coca_jax.data.sources.fields import (
    CHATS,
    LABEL_FIELDS,
    TEXT_FIELDS,
    names,
    plain_json,
    printable,
    strings,
    take,
)
from coca_jax.data.sources.items import Item, Options, Rows, Unit, guarded
from coca_jax.data.sources.references import UNKNOWN, Span
from coca_jax.data.sources.registry import Format
from coca_jax.runtime import bounded_json

# The members of a tar file, read forwards, with a bound on whatever a header can ask for.


MAX_HEADER = 1 << 20  # bytes of all headers of a member; a long name or attributes take few
MAX_SKIPPED = 256 << 20  # bytes that are unpacked only to get past them
_BLOCK = 1 << 20


class Member(NamedTuple):
    """A regular file in an archive. `read` gives its bytes; only before the next member. `start` is
    where they begin in the archive's file; -1: they do not stand there as they are."""

    name: str
    size: int
    read: Callable[[], bytes]
    start: int


class BadEnd(tarfile.ReadError):
    """The members are whole, but what follows the last one is not the end of an archive."""


class _Forward:
    """What tarfile reads from: no way back, and no more at once than is allowed for."""

    def __init__(self, file: Any, packed: bool):
        self.file, self.packed, self._position = file, packed, 0
        self.allowed = MAX_HEADER
        self.last = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.allowed:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADER} bytes")
        self.allowed -= size
        self.last = self.file.read(size)
        self._position += len(self.last)
        return self.last

    def seek_to(self, position: int) -> None:
        """To a place in a file that is not packed, where another reader has been."""
        self.file.seek(position)
        self._position = position

    def seek(self, position: int) -> None:
        skip = position - self._position
        if skip < 0 or (self.packed and skip > MAX_SKIPPED):
            raise tarfile.ReadError(f"a member of {skip} bytes")
        if self.packed:
            while skip > 0 and (block := self.file.read(min(skip, _BLOCK))):
                skip -= len(block)
                self._position += len(block)
        else:
            self.file.seek(position)
            self._position = position


_TIMES = re.compile(rb"(?:\d+ (?:[amc]time|[ug]id|[ug]name)=[^\n=]*\n)+")
_ADLER = 65521  # zlib's checksum begins with the sum of the bytes, modulo this prime, and one


def _plain_header(block: bytes) -> tuple[str, int, bytes] | None:
    """(name, size, type) of the header of a plain file, or of what is said of the next one, in a
    tenth of tarfile's time; None of all others, and of those that are damaged."""
    kind, size, checksum = block[156:157], block[124:135], block[148:154]
    if len(block) < tarfile.BLOCKSIZE or kind not in b"0x" or block[345]:
        return None
    if not (size.isdigit() and checksum.isdigit() and block[135:136] in b"\0 "):
        return None
    try:
        sum_of_all = int(checksum, 8) - 256 + sum(block[148:156]) + 1
        if (zlib.adler32(block) & 0xFFFF) != sum_of_all % _ADLER or block[154:156] != b"\0 ":
            return None
        name = block[: block.find(b"\0", 0, 100)] if b"\0" in block[:100] else block[:100]
        return name.decode("utf-8", "surrogateescape"), int(size, 8), kind
    except ValueError:  # digits 8 and 9
        return None


def _plain_members(stream: _Forward) -> Iterator[Member]:
    """The members of a file that is not packed, up to the first header that tarfile has to read,
    where the stream stands then."""
    file, position, start, kind_before = stream.file, 0, 0, b"x"
    file = getattr(file, "f", file)  # of fsspec, which stands between for each call
    while True:
        file.seek(position)
        header = _plain_header(file.read(tarfile.BLOCKSIZE))
        if header is None:
            break
        name, size, kind = header
        if kind == b"x":  # as tarfile writes before each file: its times to the nanosecond
            if kind_before == b"x" and start != position or size > MAX_HEADER:
                break
            if not _TIMES.fullmatch(file.read(size)):
                break
        else:

            def read(place: int = position + tarfile.BLOCKSIZE, size: int = size) -> bytes:
                file.seek(place)
                data = file.read(size)
                if len(data) < size:
                    raise tarfile.ReadError("unexpected end of data")
                return data

            yield Member(name, size, read, position + tarfile.BLOCKSIZE)
        position += tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if kind != b"x":
            start = position
        kind_before = kind
    stream.seek_to(start)


def is_packed(head: bytes) -> bool:
    """Whether the first six bytes are those of a compressed file."""
    return head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))


def members(file: BinaryIO) -> Iterator[Member]:
    """The regular files of a tar, tar.gz or tar.bz2, in its order.

    Raises:
        BadEnd: it does not end as an archive ends.
        tarfile.TarError, OSError, EOFError, zlib.error and whatever else a damaged archive makes
        those modules raise; what came before is whole.
    """
    magic = file.read(6)
    file.seek(0)
    if magic[:2] == b"\x1f\x8b":
        stream = _Forward(gzip.GzipFile(fileobj=file), packed=True)
    elif magic[:3] == b"BZh":
        stream = _Forward(bz2.BZ2File(file), packed=True)
    elif magic == b"\xfd7zXZ\0":
        raise tarfile.ReadError("a tar.xz; unpack it to .tar first")
    else:
        stream = _Forward(file, packed=False)
        yield from _plain_members(stream)
    with tarfile.TarFile(fileobj=stream) as archive:  # type: ignore[arg-type]
        first = archive.firstmember  # type: ignore[attr-defined]
        for member in iter(archive.next, None) if first is not None else ():
            archive.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            archive.pax_headers = {}

            def read(member: tarfile.TarInfo = member) -> bytes:
                stream.allowed = member.size + 2 * tarfile.BLOCKSIZE
                if member.issparse() or not member.isreg():
                    extracted = archive.extractfile(member)
                    data = extracted.read() if extracted else b""
                else:
                    stream.seek(member.offset_data)
                    data = stream.read(member.size)
                if len(data) < member.size:
                    raise tarfile.ReadError("unexpected end of data")
                return data

            if member.isfile():
                plain = not stream.packed and not member.issparse()
                yield Member(member.name, member.size, read, member.offset_data if plain else -1)
            stream.allowed = MAX_HEADER
        # tarfile ends without a word at a header that is none.
        if stream.last.strip(b"\0"):
            raise BadEnd(f"no header at byte {stream.tell() - len(stream.last)}")
        if not stream.last:
            raise BadEnd("no end mark: the archive may be cut short")
        stream.allowed = MAX_HEADER
        if stream.read(1 << 16).strip(b"\0"):
            raise BadEnd("more data behind the archive's end mark")


IMAGE_SUFFIXES = (*(suffix[1:] for suffix in files.IMAGE_SUFFIXES), "img", "image")
MEDIA_SUFFIXES = IMAGE_SUFFIXES + files.VIDEO_SUFFIXES
PATTERNS = ("*.tar", "*.tar.gz", "*.tgz")
_MEDIA = frozenset(MEDIA_SUFFIXES)
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
        self.sizes: dict[str, int] = {}
        self._unread = _MEDIA.union(options.image_field.split(",")) if options.unread else ()
        self._wanted = (*MEDIA_SUFFIXES, *TEXT_SUFFIXES, *options.image_field.split(","))
        self._room = 2 * options.max_image_bytes
        self.problem = self.detail = ""

    def add(self, suffix: str, member: Member) -> None:
        if suffix not in self._wanted:
            self.data[suffix] = b""
            return
        most = bounded_json.MAX_BYTES if suffix in TEXT_SUFFIXES else self._room
        if member.size > most:
            text = suffix in TEXT_SUFFIXES
            self.problem = "text_too_long" if text else "image_too_big"
            self.detail = f".{suffix} of {member.size} bytes"
            self.data[suffix] = b""
            return
        unread = member.start >= 0 and suffix in self._unread and member.size > 0
        self.data[suffix] = b"" if unread else member.read()
        self.starts[suffix], self.sizes[suffix] = member.start, member.size
        self._room -= member.size

    def span(self, suffix: str, path: str, file_bytes: int) -> Span | None:
        """Where a member lies in the archive; None where it cannot be read there."""
        start = self.starts.get(suffix, -1)
        if start < 0:
            return None
        crc = UNKNOWN if self.sizes[suffix] > len(self.data[suffix]) else -1
        return Span(path, file_bytes, start, self.sizes[suffix], crc=crc)


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a tar file, in its order. A damaged archive ends with one problem item."""
    yield from _read(unit, options, lambda key, group, file_bytes: None)


_ROWS = 1024  # that are given at once


def index_rows(unit: Unit, options: Options, root: str) -> Iterator[Item | Rows]:
    """`read` of an index without checks, in which sound examples come many at once: the members of
    one as an item by itself take twice the time. root: below which the index names files."""
    span = Span(unit.path, (1 << 52) + 1, (1 << 51) + 1, (1 << 50) + 1, crc=UNKNOWN)
    marks = ",".join(map(str, span[1:4])).encode()
    before, behind = references.dump(span, b"", root).split(marks)

    def row(key: str, group: Group, file_bytes: int) -> _Row | None:
        place = b"%b%d,%%d,%%d%b" % (before.replace(b"%", b"%%"), file_bytes, behind)
        return _row(key, group, options, place)

    pending: list[_Row] = []
    for found in _read(unit, options, row):
        if isinstance(found, Item):
            if pending:
                yield Rows(*map(list, zip(*pending)))  # type: ignore[arg-type]
                pending = []
            yield found
        else:
            pending.append(found)
            if len(pending) == _ROWS:
                yield Rows(*map(list, zip(*pending)))  # type: ignore[arg-type]
                pending = []
    if pending:
        yield Rows(*map(list, zip(*pending)))  # type: ignore[arg-type]


_Row: TypeAlias = tuple[str, list[str], tuple[str, ...], str, bytes]


def _row(key: str, group: Group, options: Options, place: bytes) -> _Row | None:
    """What `Rows` has of an example whose image is not read; None of one that `item` has to look
    at: without a text, with labels of its own, with something odd."""
    members = group.data
    suffixes = [suffix for suffix in members if suffix in _MEDIA]
    named = options.text_field or options.label_field or options.image_field
    if group.problem or named or len(suffixes) != 1 or "txt" not in members or "cls" in members:
        return None
    suffix = suffixes[0]
    start, size = group.starts[suffix], group.sizes[suffix]
    if members[suffix] or start < 0 or not 0 < size <= options.max_image_bytes:
        return None
    try:
        text = " ".join(files.decode_text(members["txt"]).split())
        fields = bounded_json.parse(members["json"]) if "json" in members else {}
    except ValueError:
        return None
    if not max(options.min_text, 1) <= len(text) <= options.max_text or "\ufffd" in text:
        return None
    extra = "{}"
    if fields:
        if fields.keys() & {"recaption", *LABEL_FIELDS}:
            return None
        take(fields, "", (*TEXT_FIELDS, *CHATS))
        extra = plain_json(fields)
    if options.require == "label":
        return None
    return printable(key), [text], (), extra, place % (start, size)


def _read(
    unit: Unit, options: Options, row: Callable[[str, Group, int], _Row | None]
) -> Iterator[Any]:
    """The examples of a tar file: what `row` says of one, or its item where that is nothing."""
    base = posixpath.basename(unit.path)
    seen: set[str] = set()
    group, file_bytes = Group("", options), 0

    def finish() -> Iterator[Any]:
        if group.data:
            key = f"{base}/{group.key}"
            if group.key not in seen and (sound := row(key, group, file_bytes)):
                seen.add(group.key)
                yield sound
                return
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
            for member in members(handle):
                name = member.name.removeprefix("./")
                folder, last = posixpath.split(name) if "/" in name else ("", name)
                stem, dot, suffix = last.partition(".")
                if not dot or not stem or (folder and files.is_hidden(folder)):
                    continue
                key, suffix = posixpath.join(folder, stem) if folder else stem, suffix.lower()
                if key != group.key or suffix in group.data:
                    yield from finish()
                    group = Group(key, options)
                if member.start >= 0 and member.start + member.size > file_bytes:
                    raise tarfile.ReadError("unexpected end of data")
                group.add(suffix, member)
            yield from finish()
            group = Group("", options)
    except Exception as error:  # damage makes tarfile and zlib raise all sorts
        # What came before is whole; the example that was being read is not.
        if isinstance(error, BadEnd):
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


def _obstacle(units: Sequence[Unit]) -> str:
    """Why archives can't be read in place: they are compressed; '' if they are not."""
    named = next((unit.path for unit in units if not unit.path.lower().endswith(".tar")), "")
    if units and not named:
        with files.open_binary(units[0].path) as file:
            named = units[0].path if is_packed(file.read(6)) else ""
    return f"{named} is compressed and cannot be read in place" if named else ""


# img2dataset leaves parquet lists next to its tars, which are read first.
FORMATS = (
    Format("webdataset", plan, read, PATTERNS, 1, obstacle=_obstacle, index_rows=index_rows),
)
