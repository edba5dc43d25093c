"""Pictures of a request, within bounds, as the model takes them; pictures of an index, smaller."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from coca_jax.data import images, videos
from coca_jax.serving.refusals import Refused


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


async def read(model: Any, files: Sequence[UploadFile], limits: Limits) -> list[np.ndarray]:
    """What `model.preprocess` makes of each file. Raises Refused, 400, for one that is no picture
    or has too many pixels."""
    found = []
    for number, file in enumerate(files, 1):
        data = await file.read()
        try:
            found.append(await run_in_threadpool(_preprocess, model, data, limits.pixels))
        except ValueError as error:
            which = f"picture {number} of {len(files)}: " if len(files) > 1 else ""
            raise Refused(400, f"{which}{error}") from None
    return found


def _preprocess(model: Any, data: bytes, pixels: int) -> np.ndarray:
    if not data:
        raise ValueError("an empty file; choose a picture")
    if model.num_frames:  # looks at the frames' size before it decodes all of them
        _, height, width = videos.sniff(data, pixels)
        if height * width > pixels:
            raise ValueError(f"too many pixels: {width} x {height}, limit {pixels}")
    else:
        images.open_image(data, pixels)
    return model.preprocess(data)


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
