"""Pictures of a request, within bounds, as the model takes them; pictures of an index, smaller."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from starlette.datastructures import UploadFile

from coca_jax.data import images, videos
from coca_jax.machine import cores
from coca_jax.serving.refusals import check_room

# Pictures that are decoded at a time at most: each takes some 7 bytes a pixel, however few bytes
# its file has.
MOST = 8
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request. megabytes: of all that it sends; pixels: of a picture, or of a frame of a
    clip; images: pictures of one request; seconds: for sending them."""

    megabytes: int = 32
    pixels: int = 50_000_000
    images: int = 16
    seconds: int = 60

    @property
    def bytes(self) -> int:
        """Of the body."""
        return self.megabytes << 20


class Decoder:
    """The threads that decode pictures, one a core and MOST at most; other pictures wait.

    depth: pictures that may wait; more are refused, see `check_room`.
    """

    def __init__(self, depth: int):
        self._threads = min(cores.count(), MOST)
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "decoder")
        self._depth, self._open = depth, 0

    @property
    def waiting(self) -> int:
        """Pictures that wait."""
        return max(self._open - self._threads, 0)

    async def run(self, calls: Sequence[Callable[[], _T]]) -> list[_T]:
        """What each call gives, which decodes a picture. Raises what a call does, and Refused
        when too many wait."""
        check_room(len(calls), self._open, self._depth + self._threads)
        self._open += len(calls)
        loop = asyncio.get_running_loop()
        try:  # one by one, so that no request of many pictures holds up the others
            return [await loop.run_in_executor(self._pool, call) for call in calls]
        finally:
            self._open -= len(calls)


async def read(
    model: Any, files: Sequence[UploadFile], limits: Limits, decoder: Decoder
) -> list[np.ndarray]:
    """What `model.fit_image` makes of each file. Raises ValueError for one that is no picture or
    has too many pixels, Refused when too many wait."""
    calls = [
        functools.partial(
            _read, model, file, limits.pixels, f"picture {n} of {len(files)}: " * (len(files) > 1)
        )
        for n, file in enumerate(files, 1)
    ]
    return await decoder.run(calls)


def _read(model: Any, file: UploadFile, pixels: int, which: str) -> np.ndarray:
    data = file.file.read()  # here: no picture that waits is in memory beside its file
    try:
        return _preprocess(model, data, pixels)
    except ValueError as error:
        raise ValueError(f"{which}{error}") from None


def _preprocess(model: Any, data: bytes, pixels: int) -> np.ndarray:
    if not data:
        raise ValueError("an empty file; choose a picture")
    if model.num_frames:  # looks at the frames' size before it decodes all of them
        _, height, width = videos.sniff(data, pixels)
        if height * width > pixels:
            raise ValueError(f"too many pixels: {width} x {height}, limit {pixels}")
    else:
        images.open_image(data, pixels)
    return model.fit_image(data)


def smaller(index: Any, row: int, side: int) -> bytes:
    """A picture of a searching.index.Index as a JPEG whose longer side is at most `side`.

    Raises ValueError, OSError: it cannot be read any more, has changed, or lies in an archive.
    """
    return _smaller(*index.file(row), side)


@functools.lru_cache(maxsize=512)
def _smaller(path: str, stamp: tuple[int, int] | None, side: int) -> bytes:
    """stamp: of the file now, so that none of an earlier one is kept."""
    picture = Image.fromarray(images.decode(path))
    picture.thumbnail((side, side))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return out.getvalue()
