"""Images and videos as people have them -> pixels as the model takes them."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, KeysView, Sequence, ValuesView
from typing import Any, cast

import numpy as np
from PIL import Image

from coca_jax.config import base, shapes
from coca_jax.config.shapes import Size
from coca_jax.data import image_files, images, videos
from coca_jax.data import images as image_data
from coca_jax.data import navit as native_data
from coca_jax.inference.devices import Devices
from coca_jax.runtime import machine, storage
from coca_jax.runtime import progress as bars


class ImageReader:
    """Reads and resizes as in evaluation.

    Args:
        size: S x T, of the model's images.
        resize: 'squash', 'crop' or 'trim', how others come to that size; those of it stay as they
            are, but with 'trim' only arrays, which `preprocess` may have made.
        num_frames: T, with which all images are taken for videos; 0: images.
        batch_size: images, or frames, at a time.
        devices: of the model; a process reads the rows of its own alone.
        native: patch size and patches at most, of images that keep their aspect ratio.
    """

    def __init__(
        self,
        size: Size,
        resize: str,
        num_frames: int,
        batch_size: int,
        devices: Devices,
        native: tuple[int, int] | None = None,
    ) -> None:
        self._native = native
        self._size, self._resize, self._num_frames = size, resize, num_frames
        self.batch_size, self._devices = batch_size, devices

    def batches(
        self, images: Any, progress: bool, num_frames: int = 0, *, even: bool = False
    ) -> Iterator[np.ndarray]:
        """uint8 [b, S, T, 3], b even where asked, of videos [b, F, S, T, 3]; the next batch is
        read by threads while one is used."""
        frames = num_frames or self._num_frames
        images = self.listed(images, frames)
        size = max(self.batch_size // max(frames, 1), 1)
        size += size % 2 if even else 0
        one = self._by_place(images, frames, even)
        ahead: collections.deque[tuple[int, Iterator[np.ndarray]]] = collections.deque()
        with (
            concurrent.futures.ThreadPoolExecutor(machine.count()) as pool,
            bars.Bar(len(images), "images", shown=progress) as bar,
        ):
            for start in range(0, len(images) + size, size):
                part = images[start : start + size]
                # Pairs are padded as pairs: every process reads all of them.
                if self._devices.several_processes and not even:
                    own = self._devices.own_rows(len(part))
                    part = [image if mine else _ELSEWHERE for image, mine in zip(part, own)]
                ahead.append((len(part), pool.map(one, part, itertools.count(start))))
                if start:
                    count, pixels = ahead.popleft()
                    yield np.stack(list(pixels))
                    bar.update(count)

    def read(self, images: Any) -> np.ndarray:
        """All images at once: uint8 [N, S, T, 3], videos [N, F, S, T, 3]."""
        images = self.listed(images)
        shape = ((self._num_frames,) if self._num_frames else ()) + shapes.pair(self._size)
        if not len(images):
            return np.zeros((0, *shape, 3), np.uint8)
        one = self._by_place(images, self._num_frames, False)
        with concurrent.futures.ThreadPoolExecutor(machine.count()) as pool:
            return np.stack(list(pool.map(one, images, itertools.count())))

    def _by_place(
        self, images: Sequence, frames: int, pairs: bool
    ) -> Callable[[Any, int], np.ndarray]:
        """`preprocess` of an image and its place in a list, which the error names where the image
        has no path. A picture of PIL that is listed twice is read by one thread at a time: it is
        decoded in place."""
        given = [id(x) for x in images if isinstance(x, Image.Image)]
        locks = {one: threading.Lock() for one, n in collections.Counter(given).items() if n > 1}

        def read(image: Any, place: int) -> np.ndarray:
            try:
                with locks.get(id(image), contextlib.nullcontext()):
                    return self.preprocess(image, frames)
            except ValueError as error:
                if len(images) == 1 or isinstance(image, (str, os.PathLike)):
                    raise
                which = f"images[{place // 2}][{place % 2}]" if pairs else f"images[{place}]"
                raise ValueError(f"{which}: {error}") from None

        return read

    def listed(self, images: Any, num_frames: int = 0) -> Sequence:
        """`as_list`, for which images that `preprocess` has packed, [N, ...], are N as well."""
        if self._native and native_data.is_packed(images, *self._native):
            return list(images)
        return as_list(images, bool(num_frames or self._num_frames))

    def preprocess(self, image: Any, num_frames: int = 0) -> np.ndarray:
        """One image -> uint8 [S, T, 3], one video -> [F, S, T, 3]; in its own aspect ratio packed,
        [N, P * P * 3 + 4], see data/navit.py.

        num_frames: T; 0: the reader's. Raises ValueError: cannot be decoded.
        """
        if isinstance(image, str):
            image = storage.from_home(storage.plain_path(image))
        if self._native:
            return self._packed(image, num_frames or self._num_frames, *self._native)
        frames, size = num_frames or self._num_frames, shapes.pair(self._size)
        if image is _ELSEWHERE:
            return np.zeros(((frames,) if frames else ()) + (*size, 3), np.uint8)
        pictures = list(videos.decode(image, frames)) if frames else [image_data.decode(image)]
        trim = self._resize == "trim"
        if pictures[0].shape[:2] == size and not (trim and not isinstance(image, np.ndarray)):
            fitted = pictures
        elif trim:
            fitted = images.trim(pictures, size)
        else:
            fitted = [images.preprocess_eval(one, size, self._resize) for one in pictures]
        return np.stack(fitted) if frames else fitted[0]

    def _packed(self, image: Any, frames: int, patch_size: int, most: int) -> np.ndarray:
        if frames:
            raise ValueError("this model takes images of any shape (resize='native'), no videos")
        if image is _ELSEWHERE:
            return np.zeros((most, shapes.width(patch_size)), np.uint8)
        if native_data.is_packed(image, patch_size, most):
            return image
        return native_data.fitted(image_data.decode(image), patch_size, most)


_ELSEWHERE = object()  # in place of an image that another process decodes


def as_list(images: Any, clips: bool = False) -> Sequence:
    """Images as a sequence: one path, PIL image, encoded image, open file or array [h, w(, c)]
    becomes a list of one, a folder the images in it and below; an iterator, the values of a dict or
    a column of paths (an array [N] of texts or objects) a list of what it gives; arrays
    [N, h, w, c] and lists stay.

    Raises ValueError for anything else, FileNotFoundError for a path that does not exist.

    clips: they are videos, whose arrays have one axis more.
    """
    if isinstance(images, (str, os.PathLike)):
        if not os.fspath(images):
            raise ValueError(f"images={images!r}: give the path or URL of an image or a folder")
        images = storage.from_home(storage.plain_path(os.fspath(images)))
        return image_files.find([os.fspath(images)], video=clips)
    if isinstance(images, (bytes, bytearray, memoryview, Image.Image)) or hasattr(images, "read"):
        return [images]
    if hasattr(images, "ndim"):
        if images.ndim == 1 and getattr(images.dtype, "kind", "") in ("U", "O"):
            return list(images)
        if not 2 <= images.ndim <= 4 + clips:
            raise ValueError(f"image array of shape {images.shape}; give [h, w, 3] or [N, h, w, 3]")
        array = np.asarray(images)
        return cast(Sequence, array) if images.ndim == 4 + clips else [array]
    if isinstance(images, (Iterator, KeysView, ValuesView)):
        return list(images)
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"images of type {type(images).__name__}; give a list, array or path")
    return images


def check_batch_size(batch_size: int) -> int:
    """Returns it; raises ValueError for what is not a number of images."""
    if not base.is_whole(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: give a whole number of images, at least 1")
    return int(batch_size)


def check_frames(num_frames: int) -> int:
    """Returns it; raises ValueError for what is not a number of frames."""
    if not base.is_whole(num_frames) or num_frames < 0:
        raise ValueError(f"num_frames={num_frames!r}; give the frames of a video, or 0 for images")
    return int(num_frames)
