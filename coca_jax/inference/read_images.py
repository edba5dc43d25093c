"""Images and videos as people have them -> pixels as the model takes them."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import tqdm
from PIL import Image

from coca_jax.data import image_files, videos
from coca_jax.data import images as image_data
from coca_jax.inference.devices import Devices


class ImageReader:
    """Reads and resizes as in evaluation.

    Args:
        size: S, of the model's images.
        resize: 'squash' or 'crop', how others come to that size; those of it stay as they are.
        num_frames: T, with which all images are taken for videos; 0: images.
        batch_size: images, or frames, at a time.
        devices: of the model; a process reads the rows of its own alone.
    """

    def __init__(
        self, size: int, resize: str, num_frames: int, batch_size: int, devices: Devices
    ) -> None:
        self._size, self._resize, self._num_frames = size, resize, num_frames
        self._batch_size, self._devices = batch_size, devices

    def batches(
        self, images: Any, progress: bool, num_frames: int = 0, *, even: bool = False
    ) -> Iterator[np.ndarray]:
        """uint8 [b, S, S, 3], b even where asked, of videos [b, T, S, S, 3]; the next batch is
        read by threads while one is used."""
        frames = num_frames or self._num_frames
        images = as_list(images, bool(frames))
        size = max(self._batch_size // max(frames, 1), 1)
        size += size % 2 if even else 0
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

            def read(start: int) -> list[concurrent.futures.Future]:
                part = images[start : start + size]
                # Pairs are padded as pairs: every process reads all of them.
                rows = self._devices.bucket(len(part))
                own = np.ones(len(part), bool) if even else self._devices.own_rows(rows)
                return [
                    pool.submit(self.preprocess if mine else self._blank, image, frames)
                    for image, mine in zip(part, own)
                ]

            now = read(0)
            starts = range(0, len(images), size)
            for start, batch in zip(starts, in_batches(images, size, progress, "image")):
                following = read(start + len(batch))
                yield np.stack([item.result() for item in now])
                now = following

    def preprocess(self, image: Any, num_frames: int = 0) -> np.ndarray:
        """One image -> uint8 [S, S, 3], one video -> [T, S, S, 3].

        num_frames: T; 0: the reader's. Raises ValueError: cannot be decoded.
        """
        frames = num_frames or self._num_frames
        if frames:
            return np.stack([self._fit(frame) for frame in videos.decode(image, frames)])
        return self._fit(image_data.decode(image))

    def _fit(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[:2] == (self._size, self._size):
            return pixels
        return image_data.preprocess_eval(pixels, self._size, self._resize)

    def _blank(self, image: Any, frames: int) -> np.ndarray:
        """In place of an image or video that another process decodes."""
        clip = (frames,) if frames else ()
        return np.zeros((*clip, self._size, self._size, 3), np.uint8)


def as_list(images: Any, clips: bool = False) -> Sequence:
    """Images as a sequence: one path, PIL image, encoded image or array [h, w(, c)] becomes a list
    of one, a folder the images in it and below; arrays [N, h, w, c] and lists stay.

    Raises ValueError for anything else, FileNotFoundError for a path that does not exist.

    clips: they are videos, whose arrays have one axis more.
    """
    if isinstance(images, (str, os.PathLike)):
        return image_files.find([os.fspath(images)], video=clips)
    if isinstance(images, (bytes, bytearray, memoryview, Image.Image)):
        return [images]
    if hasattr(images, "ndim"):
        if not 2 <= images.ndim <= 4 + clips:
            raise ValueError(f"image array of shape {images.shape}; give [h, w, 3] or [N, h, w, 3]")
        array = np.asarray(images)
        return cast(Sequence, array) if images.ndim == 4 + clips else [array]
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"images of type {type(images).__name__}; give a list, array or path")
    return images


def check_frames(num_frames: int) -> int:
    """Returns it; raises ValueError for what is not a number of frames."""
    if not isinstance(num_frames, int) or num_frames < 0:
        raise ValueError(f"num_frames={num_frames!r}; give the frames of a video, or 0 for images")
    return num_frames


def in_batches(items: Sequence, size: int, progress: bool, unit: str) -> Iterator[Sequence]:
    """Items in batches of `size`, in order, under a bar where `progress` asks for one."""
    with tqdm.tqdm(total=len(items), unit=unit, disable=not progress) as bar:
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            yield batch
            bar.update(len(batch))
