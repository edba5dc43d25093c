"""Duplicates among images: by their bytes, by how they look, and against evaluation images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from coca_jax.data import files, images, manifest, videos
from coca_jax.data.random_access import Source
from coca_jax.data.sources import open_source

SIDE = 16  # of the difference hash: SIDE x SIDE bits
BITS = SIDE * SIDE
_REPRESENTATIVES = 64  # compared with in one bucket; more of them are all alike


def content_hash(data: bytes) -> bytes:
    """16 bytes that tell encoded images apart."""
    return hashlib.blake2b(data, digest_size=16).digest()


def look(image: np.ndarray) -> np.ndarray:
    """A difference hash: is each cell brighter than its right neighbour? uint8 [BITS / 8].

    Small changes of size, compression and colour change few bits. The cells' mean brightness is
    compared with a small margin, so that flat areas do not turn noise into bits.
    """
    gray = Image.fromarray(image).convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    cells = np.asarray(gray, np.int16)
    return np.packbits(cells[:, :-1] > cells[:, 1:] + 2)


def fingerprint(data: bytes) -> tuple[str, str]:
    """Content and look of an encoded image, or of a video's middle frame, in hexadecimal."""
    if images.is_video_file(data):
        return content_hash(data).hex(), look(videos.decode(data, 1)[0]).tobytes().hex()
    image = images.open_image(data)
    if image.format == "JPEG":
        image.draft("RGB", (128, 128))
    return content_hash(data).hex(), look(images.decode(image)).tobytes().hex()


def evaluation_images(path: str) -> Iterator[bytes]:
    """Encoded images to keep out of training: a prepared folder (all its splits), or image files.

    Raises:
        FileNotFoundError: nothing there.
    """
    prepared = manifest.read(path)
    if prepared is not None:
        for split in prepared["splits"]:
            found: Source = open_source({"path": path, "split": split})
            yield from (record.image for record in found)
        return
    for file in files.find(path, tuple(f"*{suffix}" for suffix in images.SUFFIXES)):
        try:
            yield files.read_bounded(file)
        except (OSError, ValueError):
            continue  # what cannot be read cannot be evaluated on


def decide(
    found: Sequence[Sequence[Any]], mode: str, distance: int, exclude: Sequence[tuple[str, str]]
) -> dict[tuple[int, int], str]:
    """Which images go, the first of its kind staying.

    Args:
        found: (shard, number in it, key, content, look) of each image, in their order.
        mode: 'none', 'content' (equal bytes) or 'perceptual' (and equal looks).
        distance: bits of BITS in which two equal looks may differ.
        exclude: (content, look) of evaluation images; they count whatever the mode.

    Returns:
        (shard, number) -> 'reason: the key that it repeats'.
    """
    drop: dict[tuple[int, int], str] = {}
    barred = {content for content, _ in exclude}
    first: dict[str, str] = {}
    for shard, number, key, content, _ in found:
        if content in barred:
            drop[shard, number] = "in_evaluation: the same bytes"
        elif mode != "none" and content in first:
            drop[shard, number] = f"duplicate_image: {first[content]}"
        else:
            first.setdefault(content, key)
    rest = [f for f in found if (f[0], f[1]) not in drop]
    if rest and (exclude or mode == "perceptual"):
        looks = _looks([look for _, look in exclude] + [f[4] for f in rest])
        names = ["" for _ in exclude] + [f[2] for f in rest]
        for row, other in _near(looks, len(exclude), distance, mode == "perceptual").items():
            shard, number = rest[row - len(exclude)][:2]
            drop[shard, number] = (
                "in_evaluation: looks the same"
                if other < len(exclude)
                else f"near_duplicate: {names[other]}"
            )
    return drop


def _looks(hexadecimal: Sequence[str]) -> np.ndarray:
    joined = bytes.fromhex("".join(hexadecimal))
    return np.frombuffer(joined, np.uint8).reshape(-1, BITS // 8)


def _near(looks: np.ndarray, fixed: int, distance: int, among: bool) -> dict[int, int]:
    """Rows within `distance` bits of an earlier row that stays: row -> that row.

    Two rows that differ in at most d bits agree in one of d + 1 bands of bits, so only rows that
    share a band are compared.

    Args:
        looks: uint8 [n, BITS / 8]; the first `fixed` rows always stay.
        among: compare the other rows with one another as well.
    """
    bits = np.unpackbits(looks, axis=1)
    candidates: set[tuple[int, int]] = set()
    for band in np.array_split(np.arange(BITS), distance + 1):
        packed = np.ascontiguousarray(np.packbits(bits[:, band], axis=1))
        values = packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]
        order = np.argsort(values, kind="stable")
        edges = np.flatnonzero(values[order][1:] != values[order][:-1]) + 1
        for group in np.split(order, edges):
            if len(group) < 2:
                continue
            kept: list[int] = []
            for row in group.tolist():  # ascending, as the sort is stable
                usable = kept if among else [k for k in kept if k < fixed]
                near = [
                    other
                    for other in usable
                    if row >= fixed and int(np.count_nonzero(bits[row] != bits[other])) <= distance
                ]
                candidates.update((row, other) for other in near)
                if not near and len(kept) < _REPRESENTATIVES:
                    kept.append(row)
    result: dict[int, int] = {}
    for row, other in sorted(candidates):  # an earlier row that goes itself does not count
        if row not in result and other not in result:
            result[row] = other
    return result
