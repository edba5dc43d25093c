"""Damage of every sort, drawn by a random.Random: to bytes, to JSON, to the parts of a file."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 254, 255, 256, 512, 1000, 4096,
           32767, 32768, 65535, 65536, 1 << 20, 1 << 24, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
           1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
DEEP = 3000
PATHS = ("../private.png", "/etc/passwd", "/dev/zero", "pipe.png", "folder", "http://10.0.0.1/x",
         "file:///etc/passwd", "s3://bucket/key", "nonsense://x", "a\0b", "a" * 5000,
         "link.png")  # fmt: skip
TEXTS = ("", " ", "x", "x" * 70_000, "half \ud83d", "\0", "\ufeff", "\u202e", "a\nb", "%s", "'",
         '"', "<|endoftext|>", "-1", "1e999", "0x10", "NaN", *PATHS)  # fmt: skip
LEAVES = (None, True, False, -1, 0, 1, 2, 0.5, -0.5, 1e308, -1e308, float("nan"),
          float("inf"), 1 << 31, 1 << 63, -(1 << 63), 10**30, [], {}, [[]], [None], {"": None},
          *TEXTS)  # fmt: skip


def data(rng: random.Random, seed: bytes, most: int = 8) -> bytes:
    """Bytes with 1 to `most` faults; headers, where files tell their sizes, more often."""
    out = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3, most))):
        _one_fault(rng, out)
    return bytes(out)


def _one_fault(rng: random.Random, out: bytearray) -> None:
    if not out:
        out += rng.randbytes(rng.randint(1, 64))
        return
    place = rng.randrange(min(len(out), rng.choice((16, 64, 256, len(out)))))
    if rng.random() < 0.1:
        place = len(out) - 1 - place  # footers
    length = min(rng.choice((1, 2, 4, 8, 16, 100, 1000)), len(out) - place)
    kind = rng.randrange(10)
    if kind <= 1:
        out[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        out[place] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif kind <= 4:
        size = rng.choice("HIQ")
        value = rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(size))
        number = struct.pack(rng.choice("<>") + size, value)
        out[place : place + len(number)] = number
    elif kind == 5:
        del out[place:]
    elif kind == 6:
        del out[place : place + length]
    elif kind == 7:
        other = rng.randrange(len(out))
        out[place:place] = out[other : other + length]
    elif kind == 8:
        out[place : place + length] = bytes(length)
    else:
        out[place:place] = rng.randbytes(length)


def tree(rng: random.Random, value: Any, most: int = 3) -> Any:
    """JSON values with 1 to `most` faults: other values, types, keys, or depth."""
    root = [json.loads(json.dumps(value))]
    for _ in range(rng.randint(1, most)):
        places = list(_places(root))
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind <= 3:
            holder[key] = copy.deepcopy(rng.choice(LEAVES))
        elif kind == 4 and holder is not root:
            del holder[key]
        elif kind == 5:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}
        elif kind == 6:
            other, name = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[name]))
        elif isinstance(holder[key], (int, float)):
            factor = rng.choice((-1, 0, 0.5, 2, 1000, 1e9))
            holder[key] = type(holder[key])(holder[key] * factor) if holder[key] == 1 else factor
        elif isinstance(holder[key], dict):
            holder[key][rng.choice(TEXTS)] = copy.deepcopy(rng.choice(LEAVES))
        elif isinstance(holder[key], list):
            holder[key] = holder[key] * rng.choice((0, 2, 50))
        else:
            holder[key] = rng.choice(TEXTS)
    return root[0] if root else None


def _places(value: Any) -> Any:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in list(inner):
        yield value, key
        if isinstance(one, (dict, list)):
            yield from _places(one)


def text_of(rng: random.Random, value: Any) -> bytes:
    """A JSON value written down, at times with faults that JSON itself has not."""
    written = json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    kind = rng.randrange(20)
    if kind == 0:
        return b"[" * DEEP + written + b"]" * DEEP
    if kind == 1:
        return data(rng, written, 3)
    if kind == 2:
        return b"\xef\xbb\xbf" + written
    if kind == 3:
        return written.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32")))
    return written


def png(rng: random.Random, seed: bytes) -> bytes:
    """A PNG with a damaged chunk whose checksum is right, so that readers go on."""
    chunks, at = [], 8
    while at + 12 <= len(seed):
        size = int.from_bytes(seed[at : at + 4], "big")
        chunks.append([seed[at + 4 : at + 8], seed[at + 8 : at + 8 + size]])
        at += 12 + size
    if not chunks:
        return data(rng, seed)
    for _ in range(rng.randint(1, 3)):
        chunk = rng.choice(chunks)
        kind = rng.randrange(5)
        if kind == 0 and chunk[0] == b"IDAT" and rng.random() < 0.5:
            chunk[1] = zlib.compress(bytes(rng.choice((0, 1, 100, 1 << 22))))
        elif kind <= 2:
            chunk[1] = data(rng, chunk[1], 3)
        elif kind == 3:
            chunks.insert(rng.randrange(len(chunks)), list(rng.choice(chunks)))
        else:
            names = (b"IHDR", b"PLTE", b"IDAT", b"acTL", b"fcTL", b"fdAT", b"tRNS", b"eXIf",
                     b"iCCP", b"zTXt", b"iTXt", b"IEND")  # fmt: skip
            chunk[0] = rng.choice(names)
    body = b"".join(
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks
    )
    return seed[:8] + body
