"""Files that evaluations leave in a workdir: eval.json and others whose names begin so."""

from __future__ import annotations

import base64
import contextlib
import heapq
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from coca_jax.data import bounded_json, files, resizing, videos
from coca_jax.evaluators import Predictor
from coca_jax.files import local_files, storage

_THUMBNAIL = 96
STEPS = "eval_steps.json"  # task -> step of the run after which it was scored
CHECKPOINT = "eval_checkpoint.txt"  # beside the scores of a model from elsewhere
_OF_MODELS = ("config.json", "open_clip_config.json")  # one of these is in a model's folder


def save_results(
    workdir: str | os.PathLike[str], values: Mapping[str, float], step: int | None = None
) -> None:
    """Merges name -> value into `workdir`/eval.json; a value that is not finite becomes null.
    step: of the run whose scores they are, by task into eval_steps.json."""
    clean = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
    if step is not None:
        tasks = {key.rpartition("/")[0] for key in clean} - {""}
        _merge(storage.place(workdir) / STEPS, dict.fromkeys(tasks, step), sort=True)
    _merge(storage.place(workdir) / "eval.json", clean, sort=True)


def save_checkpoint(workdir: str, checkpoint: str) -> None:
    """Notes whose scores `workdir` will hold, before the first is there: eval.json says of none
    whose it is. A model's own folder needs no note."""
    if _place(workdir) != _place(checkpoint):
        storage.write_text(storage.place(workdir) / CHECKPOINT, f"{_place(checkpoint)}\n")


def check_checkpoint(workdir: str, checkpoint: str) -> None:
    """Raises ValueError where `workdir` holds the scores of another checkpoint: the one that is
    noted, or in the folder of a run or a model, which notes none, its own."""
    place = storage.place(workdir)
    there = _place(checkpoint)
    if (place / CHECKPOINT).exists():
        there = (place / CHECKPOINT).read_text().strip()
    elif (place / "eval.json").exists() and any((place / one).exists() for one in _OF_MODELS):
        there = _place(workdir)
    if there != _place(checkpoint):
        raise ValueError(f"--out={workdir} holds the scores of {there}; give another --out")


def _place(checkpoint: str) -> str:
    return files.real(checkpoint) if os.path.exists(checkpoint) else checkpoint.rstrip("/")


def kept(path: Any, **needs: type) -> dict[str, Any]:
    """What a file of unfinished work holds; {} where there is none, and where it is damaged, of
    which a warning tells. needs: keys that it must have, and of which type."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    try:
        found = bounded_json.parse(data, len(data))
        for key, kind in needs.items():
            if not isinstance(found.get(key), kind):
                raise ValueError(f"{key} is no {kind.__name__}")
        return found
    except ValueError as error:
        logging.warning("%s is damaged (%s): what it held is computed again", path, error)
        return {}


def save_examples(workdir: str | os.PathLike[str], name: str, examples: Mapping[str, Any]) -> None:
    """Merges an evaluator's `examples` into `workdir`/eval_examples.json under its name."""
    _merge(storage.place(workdir) / "eval_examples.json", {name: examples}, sort=False)


def save_classes(workdir: str | os.PathLike[str], name: str, classes: Mapping[str, Any]) -> None:
    """Merges accuracy by class and confusion into `workdir`/eval_classes.json under a name."""
    _merge(storage.place(workdir) / "eval_classes.json", {name: classes}, sort=False)


class Spread:
    """Keeps `count` items evenly spread over a stream whose length is not known."""

    def __init__(self, count: int):
        self._count, self._seen, self._stride = count, 0, 1
        self._kept: list[Any] = []

    def offer(self, make: Callable[[], Any]) -> None:
        """Passes the next item of the stream, made only if it is kept for now."""
        if self._count and self._seen % self._stride == 0:
            self._kept.append(make())
            if len(self._kept) == 2 * self._count:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._seen += 1

    def items(self) -> list[Any]:
        """The items kept, at most `count`, in their order."""
        number = min(self._count, len(self._kept))
        places = np.linspace(0, len(self._kept) - 1, number) if number else np.zeros(0)
        return [self._kept[int(place)] for place in places]


class Worst:
    """Keeps the `count` items of a stream that are furthest off."""

    def __init__(self, count: int):
        self._count, self._seen = count, 0
        self._kept: list[tuple[float, int, Any]] = []  # a heap, the least bad on top

    def offer(self, badness: float, make: Callable[[], Any]) -> None:
        """Passes the next item, made only if it is kept for now; of equal ones the first stay."""
        self._seen += 1
        if len(self._kept) < self._count:
            heapq.heappush(self._kept, (badness, -self._seen, make()))
        elif self._count and badness > self._kept[0][0]:
            heapq.heapreplace(self._kept, (badness, -self._seen, make()))

    def items(self) -> list[Any]:
        """The items kept, the worst first."""
        return [item for _, _, item in sorted(self._kept, key=lambda one: one[:2], reverse=True)]


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Returns the image, uint8 [h, w, 3], at most 96 pixels a side."""
    if max(image.shape[:2]) <= _THUMBNAIL:
        return np.asarray(image)
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(picture)


def picture(image: Any) -> np.ndarray:
    """Returns a small copy of an image as records hold it, encoded bytes or uint8 [h, w, 3]; of an
    animation or a video file its middle frame."""
    return thumbnail(videos.decode(image, 1)[0])


def seen(image: Any, predict: Predictor) -> np.ndarray:
    """Returns `picture`, without what the model never sees: plain margins, where it cuts them."""
    small = picture(image)
    if predict.resize != "trim":
        return small
    (left,), colour = resizing.cut([small])
    return resizing.framed(left, colour, predict.image_size)


def encode_png(image: np.ndarray) -> str:
    """Returns a small copy of the image as base64 PNG, for a page without files beside it."""
    buffer = io.BytesIO()
    Image.fromarray(thumbnail(image)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _merge(path: Any, values: Mapping[str, Any], *, sort: bool) -> None:
    if storage.is_remote(path):
        alone: Any = contextlib.nullcontext()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        alone = local_files.alone_in(path.parent)
    with alone:  # another evaluation may write its scores there now
        merged = _found(path) | dict(values)
        text = json.dumps(merged, sort_keys=sort, indent=1 if sort else None, allow_nan=False)
        storage.write_text(path, text + "\n")


def _found(path: Any) -> dict[str, Any]:
    """What the file holds; one that is damaged is set aside, so that it ends no run."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    try:
        return bounded_json.parse(data, len(data))
    except ValueError as error:
        aside = path.parent / f"{path.name}.damaged"
        storage.write_bytes(aside, data)
        logging.warning("%s is damaged (%s): set aside as %s and begun anew", path, error, aside)
        return {}
