"""Reads and writes the result files of evaluations in a workdir: eval.json, eval_*.json."""

from __future__ import annotations

import base64
import contextlib
import functools
import heapq
import io
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from coca_jax.data import images, videos
from coca_jax.data.sources import files
from coca_jax.evaluation.evaluators import Predictor, Record
from coca_jax.evaluation.evaluators.base import Writing
from coca_jax.runtime import bounded_json, growing_file, storage

_THUMBNAIL = 96
STEPS = "eval_steps.json"  # {task: step of the run at which it was scored}
CHECKPOINT = "eval_checkpoint.txt"  # names the model if it is outside this workdir
_MODEL_FILES = ("config.json", "open_clip_config.json")  # a model's folder contains one of these


def save_results(
    workdir: str | os.PathLike[str], values: Mapping[str, float], step: int | None = None
) -> None:
    """Merges {name: value} into `workdir`/eval.json; a value that is not finite becomes null.
    step: step of the run, stored per task in eval_steps.json."""
    clean = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
    if step is not None:
        tasks = {key.rpartition("/")[0] for key in clean} - {""}
        _merge(storage.place(workdir) / STEPS, dict.fromkeys(tasks, step), sort=True)
    _merge(storage.place(workdir) / "eval.json", clean, sort=True)


def save_checkpoint(workdir: str, checkpoint: str) -> None:
    """Records which checkpoint the scores in `workdir` belong to, unless it is in `workdir`. Call
    this before the first score is written."""
    if _place(workdir) != _place(checkpoint):
        storage.write_text(storage.place(workdir) / CHECKPOINT, f"{_place(checkpoint)}\n")


def check_checkpoint(workdir: str, checkpoint: str) -> None:
    """Raises ValueError if `workdir` contains the scores of another checkpoint."""
    place = storage.place(workdir)
    owner = _place(checkpoint)
    if (place / CHECKPOINT).exists():
        owner = (place / CHECKPOINT).read_text().strip()
    elif (place / "eval.json").exists() and any((place / name).exists() for name in _MODEL_FILES):
        owner = _place(workdir)
    if owner != _place(checkpoint):
        raise ValueError(f"--out={workdir}: contains the scores of {owner}. Use another --out.")


def _place(checkpoint: str) -> str:
    return files.real(checkpoint) if os.path.exists(checkpoint) else checkpoint.rstrip("/")


def read_sealed(path: Any, **needs: type) -> dict[str, Any]:
    """Reads a file of unfinished work; {} if it is missing, or damaged (with a warning). needs:
    required keys and their types."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    try:
        found = bounded_json.parse(data, len(data))
        for key, kind in needs.items():
            if not isinstance(found.get(key), kind):
                raise ValueError(f"{key} is not a {kind.__name__}")
        return found
    except ValueError as error:
        logging.warning("%s: damaged (%s). Its results are recomputed.", path, error)
        return {}


def save_examples(workdir: str | os.PathLike[str], name: str, examples: Mapping[str, Any]) -> None:
    """Merges an evaluator's `examples` into `workdir`/eval_examples.json under its name."""
    _merge(storage.place(workdir) / "eval_examples.json", {name: examples}, sort=False)


def save_classes(workdir: str | os.PathLike[str], name: str, classes: Mapping[str, Any]) -> None:
    """Merges per-class accuracy and confusion into `workdir`/eval_classes.json under a name."""
    _merge(storage.place(workdir) / "eval_classes.json", {name: classes}, sort=False)


class Spread:
    """Samples `count` items evenly from a stream of unknown length."""

    def __init__(self, count: int):
        self._count, self._seen, self._stride = count, 0, 1
        self._items: list[Any] = []

    def offer(self, make: Callable[[], Any]) -> None:
        """Offers the next item of the stream; `make` is called only if the item is stored."""
        if self._count and self._seen % self._stride == 0:
            self._items.append(make())
            # Full: drop every other item and double the stride.
            if len(self._items) == 2 * self._count:
                self._items, self._stride = self._items[::2], 2 * self._stride
        self._seen += 1

    def items(self) -> list[Any]:
        """At most `count` stored items, in stream order."""
        number = min(self._count, len(self._items))
        places = np.linspace(0, len(self._items) - 1, number) if number else np.zeros(0)
        return [self._items[int(place)] for place in places]


class Worst:
    """Stores the `count` worst items of a stream."""

    def __init__(self, count: int):
        self._count, self._seen = count, 0
        self._heap: list[tuple[float, int, Any]] = []  # min-heap by badness

    def offer(self, badness: float, make: Callable[[], Any]) -> None:
        """Offers the next item; `make` is called only if it is stored. Earlier items win ties."""
        self._seen += 1
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, (badness, -self._seen, make()))
        elif self._count and badness > self._heap[0][0]:
            heapq.heapreplace(self._heap, (badness, -self._seen, make()))

    def items(self) -> list[Any]:
        """The stored items, worst first."""
        return [item for _, _, item in sorted(self._heap, key=lambda one: one[:2], reverse=True)]


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Shrinks an image, uint8 [h, w, 3], to at most 96 pixels per side."""
    if max(image.shape[:2]) <= _THUMBNAIL:
        return np.asarray(image)
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(picture)


def picture(image: Any) -> np.ndarray:
    """Returns a thumbnail of an image (encoded bytes or uint8 [h, w, 3]), or of the middle frame of
    an animation or video."""
    return thumbnail(videos.decode(image, 1)[0])


def seen(image: Any, predict: Predictor) -> np.ndarray:
    """Returns the thumbnail, without plain margins if the model trims them."""
    small = picture(image)
    if predict.resize != "trim":
        return small
    (left,), colour = images.cut([small])
    return images.framed(left, colour, predict.image_size)


def encode_png(image: np.ndarray) -> str:
    """Returns a thumbnail as base64 PNG, to embed in a page."""
    buffer = io.BytesIO()
    Image.fromarray(thumbnail(image)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _merge(path: Any, values: Mapping[str, Any], *, sort: bool) -> None:
    if storage.is_remote(path):
        alone: Any = contextlib.nullcontext()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        alone = storage.alone_in(path.parent)
    with alone:  # another evaluation may be writing to the same file
        merged = _read(path) | dict(values)
        text = json.dumps(merged, sort_keys=sort, indent=1 if sort else None, allow_nan=False)
        storage.write_text(path, text + "\n")


def _read(path: Any) -> dict[str, Any]:
    """Reads a file; renames a damaged one and returns {}, so that the run continues."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    try:
        return bounded_json.parse(data, len(data))
    except ValueError as error:
        aside = path.parent / f"{path.name}.damaged"
        storage.write_bytes(aside, data)
        logging.warning("%s: damaged (%s). Moved to %s; started a new file.", path, error, aside)
        return {}


class Outputs:
    """File with the model outputs of an evaluation so far, from which an interrupted one resumes.

    JSON lines: first the request, then for each record in order its key, its caption, and the log
    likelihood (nats) and number of tokens of each of its references.

    Args:
      path: path of the file; its folder is created if missing.
      request: what the outputs depend on. A file with another request is replaced. A truncated last
        line is dropped; a damaged line is dropped with all later ones, with a warning.
      write: writes on process 0. Every process reads the file in the constructor.
    """

    def __init__(self, path: str | os.PathLike[str], request: Mapping[str, Any], *, write: Writing):
        self._path, self._write = storage.place(path), write
        self._first = json.dumps(dict(request=request), sort_keys=True, default=list) + "\n"
        self._found: list[dict[str, Any]] = []
        data = self._path.read_bytes() if self._path.exists() else b""
        if data.startswith(first := self._first.encode()):
            # Not splitlines: captions may contain other line separators. The part after the last
            # newline is a truncated line.
            for number, line in enumerate(data[len(first) :].split(b"\n")[:-1], 2):
                try:
                    self._found.append(_output(line))
                except ValueError as error:
                    message = "%s, line %d: damaged (%s). Captions are regenerated from there."
                    logging.warning(message, self._path, number, error)
                    break
        self._taken = 0
        self._file: growing_file.Growing | None = None

    def take(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Returns the stored outputs of the next records: for all, the first few, or none."""
        found: list[dict[str, Any]] = []
        for record, output in zip(records, self._found[self._taken :]):
            if output["key"] != str(record.get("key", "")):  # the data has changed
                del self._found[self._taken + len(found) :]
                break
            found.append(output)
        self._taken += len(found)
        return found

    def add(self, outputs: Sequence[Mapping[str, Any]]) -> None:
        """Appends the outputs of the records that `take` did not return."""
        self._write(lambda: self._add(outputs))

    def _add(self, outputs: Sequence[Mapping[str, Any]]) -> None:
        if self._file is None:
            start = (self._first + _lines(self._found[: self._taken])).encode()
            storage.write_bytes(self._path, start)
            self._file = growing_file.Growing(self._path, keep=len(start))
        self._file.write(_lines(outputs).encode())

    def close(self) -> None:
        """Waits until everything is written."""
        if self._file is not None:
            self._write(self._file.close)


def _output(line: bytes) -> dict[str, Any]:
    """Parses the output of one record. Raises ValueError for a damaged line."""
    found = bounded_json.parse(line, len(line))
    if "key" not in found:
        raise ValueError("no key")
    return found


def _lines(outputs: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in outputs)


# Embedding map: images on the first two principal components of their embeddings.


POINTS = 240  # images in a map; more would overlap
SIZE = 40  # side of a thumbnail in pixels
_COLUMNS = 16


class PictureMap:
    """Samples at most `count` images evenly from a stream for an embedding map."""

    def __init__(self, count: int = POINTS):
        self._spread = Spread(count)

    def add(
        self,
        images: Sequence[Any],
        embeddings: np.ndarray,
        texts: Sequence[str],
        right: Sequence[bool],
    ) -> None:
        """Offers N images from records, with their embeddings float [N, E], their texts, and
        whether the model's answer is correct."""
        for image, row, text, good in zip(images, embeddings, texts, right):
            self._spread.offer(functools.partial(_thumbnail_row, image, row, text, good))

    def found(self) -> dict[str, Any]:
        """Returns dict(points, texts, right, sheet, columns, size, share) for the report; {} for
        fewer than three images or identical embeddings.

        points: [x, y] of each image on the first two principal components, scaled equally to 0 to
        1000; share: fraction of the variance per axis. sheet: base64 JPEG with the thumbnails,
        `columns` per row, each `size` pixels per side.
        """
        items = self._spread.items()
        if len(items) < 3:
            return {}
        pictures, rows, texts, right = zip(*items)
        places, share = principal(np.stack(rows).astype(np.float64))
        if not share[0] > 0:
            return {}
        low, high = places.min(0), places.max(0)
        scaled = 500 + 1000 * (places - (low + high) / 2) / (high - low).max()
        return dict(
            points=scaled.round().astype(int).tolist(),
            texts=list(texts),
            right=[bool(good) for good in right],
            sheet=_sheet(pictures),
            columns=_COLUMNS,
            size=SIZE,
            share=[round(float(s), 4) for s in share],
        )


def _thumbnail_row(image: Any, row: np.ndarray, text: str, good: bool) -> tuple[Any, ...]:
    return picture(image), np.array(row), text, good


def principal(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Projects float [N, E] (N, E >= 2) on the first two principal components. Returns coordinates
    [N, 2] and the fraction of the variance of each axis [2], zeros if nothing varies."""
    left, sizes, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    places = left[:, :2] * sizes[:2]
    # An SVD leaves the signs open: make the largest coordinate of each axis positive.
    places = places * np.where(places.max(0) >= -places.min(0), 1, -1)
    total = float((sizes**2).sum())
    # Equal rows leave only rounding errors.
    varies = total > 1e-12 * max(float((rows**2).sum()), 1e-30)
    return places, sizes[:2] ** 2 / total if varies else np.zeros(2)


def _sheet(pictures: Sequence[np.ndarray]) -> str:
    lines = -(-len(pictures) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * SIZE, lines * SIZE), "white")
    for number, pixels in enumerate(pictures):
        small = Image.fromarray(pixels).convert("RGB")
        small.thumbnail((SIZE, SIZE))
        line, column = divmod(number, _COLUMNS)
        x, y = column * SIZE + (SIZE - small.width) // 2, line * SIZE + (SIZE - small.height) // 2
        sheet.paste(small, (x, y))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


BEST = 5  # hits per query in the report


def examples(
    images: np.ndarray,
    rows: Sequence[np.ndarray],
    texts: Sequence[str],
    embeddings: np.ndarray,
    matches: np.ndarray,
    count: int,
) -> dict[str, Any]:
    """Retrieval queries for the report: `count` images with their best texts, and one text of each
    with its best images. If no best hit is correct, the best correct one follows them.

    Args:
        images: image embeddings [I, D].
        rows: thumbnails of the first images, uint8 [H, W, 3] each. Only these are shown.
        texts: T texts.
        embeddings: text embeddings [T, D].
        matches: int64 [C, 2], image and text index of each pair.
        count: number of queries.
    """
    of_image: dict[int, set[int]] = {}
    for i, t in matches[matches[:, 0] < len(rows)].tolist():
        of_image.setdefault(i, set()).add(t)
    items, text_items = [], []
    for i in np.unique(np.linspace(0, len(rows) - 1, count).astype(int)).tolist():
        hits = _hits(embeddings @ images[i], of_image[i])
        found: list[dict[str, Any]] = [dict(text=texts[t], **hit) for t, hit in hits]
        truth = [texts[t] for t in sorted(of_image[i])]
        items.append(dict(image=encode_png(rows[i]), truth=truth, texts=found))
        query = min(of_image[i])
        owners = [j for j, own in of_image.items() if query in own]
        hits = _hits(images[: len(rows)] @ embeddings[query], owners)
        found = [dict(image=encode_png(rows[j]), **hit) for j, hit in hits]
        text_items.append(dict(text=texts[query], images=found))
    searched = f"{len(rows):,} of {len(images):,} images"
    return dict(kind="retrieval", items=items, text_items=text_items, searched=searched)


def _hits(scores: np.ndarray, right: Collection[int]) -> list[tuple[int, dict[str, Any]]]:
    """(index, dict(score, correct, rank)) of the best candidates, and of the best correct one."""
    best = np.argsort(-scores, kind="stable")[:BEST].tolist()
    ranked = list(zip(best, range(1, BEST + 1)))
    if not set(best) & set(right):
        first = max(right, key=lambda number: float(scores[number]))
        ranked.append((first, int((scores >= scores[first]).sum())))  # ties rank above it
    return [
        (number, dict(score=float(scores[number]), correct=number in right, rank=rank))
        for number, rank in ranked
    ]
