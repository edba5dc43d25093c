"""The members of a tar file, read forwards, with a bound on whatever a header can ask for."""

from __future__ import annotations

import bz2
import gzip
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

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
        self._file, self.packed, self._position = file, packed, 0
        self.allowed = MAX_HEADER
        self.last = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.allowed:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADER} bytes")
        self.allowed -= size
        self.last = self._file.read(size)
        self._position += len(self.last)
        return self.last

    def seek(self, position: int) -> None:
        skip = position - self._position
        if skip < 0 or (self.packed and skip > MAX_SKIPPED):
            raise tarfile.ReadError(f"a member of {skip} bytes")
        if self.packed:
            while skip > 0 and (block := self._file.read(min(skip, _BLOCK))):
                skip -= len(block)
                self._position += len(block)
        else:
            self._file.seek(position)
            self._position = position


class _Header(tarfile.TarInfo):
    """Takes what is needed from the header of a plain file, in a sixth of the time; tarfile's own
    reading does all others, and those that are damaged."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """Raises what tarfile raises."""
        name, size, sum_, end = buf[:100], buf[124:135], buf[148:154], buf[135:136]
        plain = len(buf) == tarfile.BLOCKSIZE and buf[156:157] == tarfile.REGTYPE and not buf[345]
        if plain and size.isdigit() and sum_.isdigit() and end in b"\0 " and buf[154:156] == b"\0 ":
            try:
                if int(sum_, 8) == 256 + sum(buf) - sum(buf[148:156]):
                    found = cls(name.partition(b"\0")[0].decode(encoding, errors))
                    found.size = int(size, 8)
                    return found
            except ValueError:  # digits 8 and 9
                pass
        return super().frombuf(buf, encoding, errors)  # type: ignore[return-value]


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
    with tarfile.TarFile(fileobj=stream, tarinfo=_Header) as archive:  # type: ignore[arg-type]
        while (member := archive.next()) is not None:
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
