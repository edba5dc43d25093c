"""How many frames a GIF has, from its blocks, without decoding any."""

from __future__ import annotations

_EXTENSION, _FRAME, _TABLE = 0x21, 0x2C, 0x80


def count_frames(data: bytes, most: int) -> int:
    """Frames of a GIF, counted until there are more than `most` or the file ends, well or not.

    Source: GIF89a specification, 1990, sections 17 to 27: a header of 13 bytes and a colour table;
    then extensions (two bytes) and images (ten bytes and a colour table, a code size), each ending
    in sub-blocks, a length before each and 0 behind the last.
    """
    at, count = 13 + _table(data, 10), 0
    while at < len(data) and count <= most:
        if data[at] == _FRAME:
            count += 1
            at += 10 + _table(data, at + 9) + 1
        elif data[at] == _EXTENSION:
            at += 2
        else:  # the trailer, or padding that readers step over
            at += 1
            continue
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return count


def _table(data: bytes, at: int) -> int:
    """Bytes of the colour table that the flags at `at` announce."""
    flags = data[at] if at < len(data) else 0
    return 3 << (flags & 7) + 1 if flags & _TABLE else 0
