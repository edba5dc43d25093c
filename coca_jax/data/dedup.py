"""Duplicates among images: by their bytes, by how they look, and against evaluation images."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from coca_jax.data import images, videos
from coca_jax.data.filters import open_source
from coca_jax.data.sources import files, formats, manifest
from coca_jax.data.sources.source import Source

_EVALUATED, _SAME, _NEAR = REASONS = ("in_evaluation", "duplicate_image", "near_duplicate")
SIDE = 16  # of the difference hash: SIDE x SIDE bits
BITS = SIDE * SIDE
_CONTENT = 16  # bytes of a content
_COMPARED = 1024  # rows that are compared each with each
_LEAST_BITS = 8  # of a band


def content_hash(data: bytes) -> bytes:
    """16 bytes that tell encoded images apart."""
    return hashlib.blake2b(data, digest_size=_CONTENT).digest()


def look(image: np.ndarray) -> np.ndarray:
    """A difference hash: is each cell brighter than its right neighbour? uint8 [BITS / 8].

    Small changes of size, compression and colour change few bits. The cells' mean brightness is
    compared with a small margin, so that flat areas do not turn noise into bits.
    """
    gray = Image.fromarray(image).convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    cells = np.asarray(gray, np.int16)
    return np.packbits(cells[:, :-1] > cells[:, 1:] + 2)


def fingerprint(data: bytes, second: bytes = b"") -> tuple[str, str]:
    """Content and look of an encoded image, or of a video's middle frame, in hexadecimal; of a pair
    those of both, one behind the other."""
    both = [_fingerprint(one) for one in (data, second) if one]
    return "".join(content for content, _ in both), "".join(look for _, look in both)


def _fingerprint(data: bytes) -> tuple[str, str]:
    if images.is_video_file(data):
        return content_hash(data).hex(), look(videos.decode(data, 1)[0]).tobytes().hex()
    image = images.open_image(data)
    if image.format == "JPEG":
        image.draft("RGB", (128, 128))
    return content_hash(data).hex(), look(images.decode(image)).tobytes().hex()


def to_exclude(path: str) -> list[tuple[str, str]]:
    """(content, look) of each evaluation image: of a prepared folder (all its splits), or of image
    files. What cannot be decoded cannot be evaluated on and is left out; a warning counts it and
    names the first.

    Raises:
        FileNotFoundError: nothing there.
    """
    found, left = [], []
    for name, data in _evaluation_images(path):
        try:
            found.append(_fingerprint(data()))
        except Exception as error:  # file systems and decoders raise all sorts
            left.append(f"{name} ({type(error).__name__}: {error})")
    if left:
        logging.warning(
            "--exclude=%s: %d of %d images cannot be decoded and keep nothing out, the first %s",
            *(path, len(left), len(left) + len(found), left[0]),
        )
    return found


def check_excluded(paths: Sequence[str]) -> None:
    """Raises FileNotFoundError for the first of them in which `to_exclude` would find no images, and
    ValueError for one file that is not an image."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            first = next(_evaluation_images(path), None)
            if first is not None and first[0] == path:
                _check_decodes(*first)
            if first is not None:
                continue
        raise FileNotFoundError(
            f"--exclude={path}: there are no images; give a prepared folder or image files"
        )


def _check_decodes(path: str, data: Callable[[], bytes]) -> None:
    try:
        _fingerprint(data())
    except Exception as error:  # file systems and decoders raise all sorts
        raise ValueError(
            f"--exclude={path}: {error}; give a prepared folder or image files"
        ) from None


def _evaluation_images(path: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    prepared = manifest.read(path)
    if prepared is None:
        for file in files.find(path, formats.IMAGES):
            yield file, functools.partial(files.read_bounded, file)
        return
    for split in prepared["splits"]:
        source: Source = open_source({"path": path, "split": split})
        for record in source:
            for image in filter(None, (record.image, record.second)):
                yield record.key, functools.partial(bytes, image)


def decide(
    found: Sequence[Sequence[Any]], mode: str, distance: int, exclude: Sequence[tuple[str, str]]
) -> dict[tuple[int, int], str]:
    """Which images go, the first of its kind staying. A pair goes where both of its images are
    those of another, or one of them is of an evaluation.

    Args:
        found: (shard, number in it, key, content, look) of each image or pair, in their order.
        mode: 'none', 'content' (equal bytes) or 'perceptual' (and equal looks).
        distance: bits of BITS in which two equal looks may differ; of two pairs those of both.
        exclude: (content, look) of evaluation images; they count whatever the mode.

    Returns:
        (shard, number) -> 'reason: the key that it repeats'.
    """
    drop: dict[tuple[int, int], str] = {}
    barred = {content for content, _ in exclude}
    first: dict[str, str] = {}
    for shard, number, key, content, _ in found:
        if not barred.isdisjoint(_each(content, _CONTENT)):
            drop[shard, number] = f"{_EVALUATED}: the same bytes"
        elif mode != "none" and content in first:
            drop[shard, number] = f"{_SAME}: {first[content]}"
        else:
            first.setdefault(content, key)
    rest = [f for f in found if (f[0], f[1]) not in drop]
    if rest and exclude:
        single = [(f, look) for f in rest for look in _each(f[4], BITS // 8)]
        looks = _looks([look for _, look in exclude] + [look for _, look in single])
        for row in _near(looks, len(exclude), distance, False):
            shard, number = single[row - len(exclude)][0][:2]
            drop[shard, number] = f"{_EVALUATED}: looks the same"
        rest = [f for f in rest if (f[0], f[1]) not in drop]
    for size in sorted({len(f[4]) for f in rest} if mode == "perceptual" else ()):
        alike = [f for f in rest if len(f[4]) == size]  # images, or pairs
        for row, other in _near(_looks([f[4] for f in alike]), 0, distance, True).items():
            shard, number = alike[row][:2]
            drop[shard, number] = f"{_NEAR}: {alike[other][2]}"
    return drop


def _each(hexadecimal: str, size: int) -> list[str]:
    """The parts of `size` bytes."""
    return [hexadecimal[n : n + 2 * size] for n in range(0, len(hexadecimal), 2 * size)]


def _looks(hexadecimal: Sequence[str]) -> np.ndarray:
    """uint8 [n, bytes of each]."""
    joined = bytes.fromhex("".join(hexadecimal))
    return np.frombuffer(joined, np.uint8).reshape(len(hexadecimal), -1)


def _near(looks: np.ndarray, fixed: int, distance: int, among: bool) -> dict[int, int]:
    """Rows within `distance` bits of an earlier row that stays: row -> such a row.

    Args:
        looks: uint8 [n, bytes of each]; the first `fixed` rows always stay.
        among: compare the other rows with one another as well.
    """
    first, same = np.unique(_values(looks), return_index=True, return_inverse=True)[1:]
    rows = np.sort(first)  # of equal looks the first stands for all
    found = list(_groups(np.unpackbits(looks, axis=1), rows, distance, fixed, among))
    result: dict[int, int] = {}
    if found:
        words = looks.view(np.uint64)
        members = np.concatenate(found)
        starts = np.cumsum([0, *(len(group) for group in found)])
        of_row = np.argsort(members, kind="stable")
        groups = np.searchsorted(starts, of_row, side="right") - 1
        survivors = [
            np.empty(len(group), np.int64) for group in found
        ]  # the rows that stay, of each
        counts = [0] * len(found)
        edges = np.flatnonzero(np.diff(members[of_row])) + 1
        for place in np.split(np.arange(len(members)), edges):
            row, here = int(members[of_row[place[0]]]), groups[place].tolist()
            if row >= fixed:
                others = np.concatenate([survivors[group][: counts[group]] for group in here])
                apart = np.bitwise_count(words[others] ^ words[row]).sum(axis=1, dtype=np.int64)
                if near := others[apart <= distance].tolist():
                    result[row] = min(near)
                    continue
                if not among:
                    continue
            for group in here:
                survivors[group][counts[group]] = row
                counts[group] += 1
    for row, one in enumerate(first[same.reshape(-1)].tolist()):
        if row >= fixed and row != one and (among or one < fixed or one in result):
            result[row] = result.get(one, one)
    return result


def _groups(
    bits: np.ndarray, rows: np.ndarray, distance: int, fixed: int, among: bool
) -> Iterator[np.ndarray]:
    """Sets of rows, ascending, such that any two within `distance` bits of each other share one.

    Two rows that differ in at most d bits agree in one of d + 1 bands of bits, so only rows that
    agree in a band are compared; many that do, as flat pictures, by the bands of the bits that are
    left, as long as that leaves less to compare. Bands of few bits keep little apart, so do bits
    that hardly differ, as those of a ground that all pictures share: each band gets as many of
    those as of the others.
    """
    left = [(rows, np.arange(bits.shape[1]), 1.0)]
    while left:
        rows, columns, spread = left.pop()
        if len(rows) < 2 or not (rows[0] < fixed <= rows[-1] if not among else rows[-1] >= fixed):
            continue  # nothing that can go
        if len(rows) <= _COMPARED or len(columns) < _LEAST_BITS * (distance + 1):
            yield rows
            continue
        parts = _parts(bits, rows, columns, distance)
        sizes = np.array([len(part) for part, _ in parts], np.float64)
        spread *= sizes.sum() / len(rows)
        if spread > (distance + 1) ** 2 or np.square(sizes).sum() >= float(len(rows)) ** 2:
            yield rows  # in parts there would be more to hold, or to compare
            continue
        left += [(part, others, spread) for part, others in parts]


def _parts(
    bits: np.ndarray, rows: np.ndarray, columns: np.ndarray, distance: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows that agree in a band, at least two, with the columns that are left, of each band."""
    sided = np.abs(bits[np.ix_(rows, columns)].mean(0, dtype=np.float64) - 0.5)
    ranked = columns[np.argsort(sided, kind="stable")]
    found = []
    for band in (ranked[first :: distance + 1] for first in range(distance + 1)):
        values = _values(np.packbits(bits[np.ix_(rows, band)], axis=1))
        order = np.argsort(values, kind="stable")
        edges = np.flatnonzero(values[order][1:] != values[order][:-1]) + 1
        starts, ends = np.r_[0, edges], np.r_[edges, len(order)]
        others = np.setdiff1d(columns, band)
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1]):
            found.append((rows[order[start:end]], others))
    return found


def _values(packed: np.ndarray) -> np.ndarray:
    """Rows of bytes as one value each."""
    packed = np.ascontiguousarray(packed)
    return packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]


# Which records are of one image: a list may name an image once a caption or question.


def content_digest(image: Any) -> bytes:
    """Tells images by content: encoded bytes, or an array."""
    return content_hash(image.tobytes() if isinstance(image, np.ndarray) else bytes(image))


def firsts(digests: Iterable[bytes]) -> np.ndarray:
    """The place of the first with the same digest as each, int [N]."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(one, place) for place, one in enumerate(digests)], np.int64)


def numbered(digests: Iterable[bytes]) -> np.ndarray:
    """Which image each digest is of, int [N]: 0, 1, ... as they first occur."""
    return np.unique(firsts(digests), return_inverse=True)[1].astype(np.int64)
