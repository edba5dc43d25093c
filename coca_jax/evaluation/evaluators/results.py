"""Files that evaluations leave in a workdir: eval.json and others whose names begin so."""

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


def read_sealed(path: Any, **needs: type) -> dict[str, Any]:
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
        self._items: list[Any] = []

    def offer(self, make: Callable[[], Any]) -> None:
        """Passes the next item of the stream, made only if it is kept for now."""
        if self._count and self._seen % self._stride == 0:
            self._items.append(make())
            if len(self._items) == 2 * self._count:
                self._items, self._stride = self._items[::2], 2 * self._stride
        self._seen += 1

    def items(self) -> list[Any]:
        """The items kept, at most `count`, in their order."""
        number = min(self._count, len(self._items))
        places = np.linspace(0, len(self._items) - 1, number) if number else np.zeros(0)
        return [self._items[int(place)] for place in places]


class Worst:
    """Keeps the `count` items of a stream that are furthest off."""

    def __init__(self, count: int):
        self._count, self._seen = count, 0
        self._heap: list[tuple[float, int, Any]] = []  # a heap, the least bad on top

    def offer(self, badness: float, make: Callable[[], Any]) -> None:
        """Passes the next item, made only if it is kept for now; of equal ones the first stay."""
        self._seen += 1
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, (badness, -self._seen, make()))
        elif self._count and badness > self._heap[0][0]:
            heapq.heapreplace(self._heap, (badness, -self._seen, make()))

    def items(self) -> list[Any]:
        """The items kept, the worst first."""
        return [item for _, _, item in sorted(self._heap, key=lambda one: one[:2], reverse=True)]


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
    (left,), colour = images.cut([small])
    return images.framed(left, colour, predict.image_size)


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
        alone = storage.alone_in(path.parent)
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


# What a captioner said of each record so far: a file of an evaluation that goes on from it.


class Outputs:
    """What a model said of each record so far, a file from which a later start goes on.

    JSON lines: first what was asked for, then for each record in order its key, its caption and
    the log likelihood (nats) and number of tokens of each of its references.

    Args:
      path: of the file; its folder is made when missing.
      request: what the outputs depend on. A file made for another request is begun anew; a last
        line that was cut short is dropped, and a damaged one with all behind it, with a warning.
      write: does it on one process; every process reads the file when this is made.
    """

    def __init__(self, path: str | os.PathLike[str], request: Mapping[str, Any], *, write: Writing):
        self._path, self._write = storage.place(path), write
        self._first = json.dumps(dict(request=request), sort_keys=True, default=list) + "\n"
        self._found: list[dict[str, Any]] = []
        data = self._path.read_bytes() if self._path.exists() else b""
        if data.startswith(first := self._first.encode()):
            # Not splitlines: captions may hold other separators. What is behind the last is cut.
            for number, line in enumerate(data[len(first) :].split(b"\n")[:-1], 2):
                try:
                    self._found.append(_output(line))
                except ValueError as error:
                    message = "%s, line %d, is damaged (%s): captions from there on are made anew"
                    logging.warning(message, self._path, number, error)
                    break
        self._taken = 0
        self._file: growing_file.Growing | None = None

    def take(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Returns what the file holds of the records that come next: of all, the first, or none."""
        found: list[dict[str, Any]] = []
        for record, one in zip(records, self._found[self._taken :]):
            if one["key"] != str(record.get("key", "")):  # other data than it was made from
                del self._found[self._taken + len(found) :]
                break
            found.append(one)
        self._taken += len(found)
        return found

    def add(self, outputs: Sequence[Mapping[str, Any]]) -> None:
        """Appends the outputs of the records that `take` did not have."""
        self._write(lambda: self._add(outputs))

    def _add(self, outputs: Sequence[Mapping[str, Any]]) -> None:
        if self._file is None:
            begin = (self._first + _lines(self._found[: self._taken])).encode()
            storage.write_bytes(self._path, begin)
            self._file = growing_file.Growing(self._path, keep=len(begin))
        self._file.write(_lines(outputs).encode())

    def close(self) -> None:
        """Returns when the file holds all of it."""
        if self._file is not None:
            self._write(self._file.close)


def _output(line: bytes) -> dict[str, Any]:
    """Of one record. Raises ValueError for what `add` has not written."""
    found = bounded_json.parse(line, len(line))
    if "key" not in found:
        raise ValueError("no key")
    return found


def _lines(outputs: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in outputs)


# A map of pictures: their embeddings on the two axes along which they differ most.


POINTS = 240  # of a map; more would hide each other
SIZE = 40  # pixels of a side of a thumbnail
_COLUMNS = 16


class PictureMap:
    """Collects pictures evenly spread over a stream, for a map of them.

    Args:
      count: the most that are kept; 0: none.
    """

    def __init__(self, count: int = POINTS):
        self._spread = Spread(count)

    def add(
        self,
        images: Sequence[Any],
        embeddings: np.ndarray,
        texts: Sequence[str],
        right: Sequence[bool],
    ) -> None:
        """Takes images as records hold them, their embeddings float [N, E], what they show, and
        whether the model found it."""
        for image, row, text, good in zip(images, embeddings, texts, right):
            self._spread.offer(functools.partial(_thumbnail_row, image, row, text, good))

    def found(self) -> dict[str, Any]:
        """dict(points, texts, right, sheet, columns, size, share) for the report; {} of fewer than
        three pictures, or of pictures that are all the same to the model.

        points: [x, y] of each, 0 to 1000, along the first two principal components, drawn to one
        scale; share: of the variance that each of both axes holds. sheet: base64 JPEG of the
        thumbnails, `columns` a row, each `size` pixels a side.
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
    """The first two principal components (Pearson 1901) of float [N, E], N and E at least 2: places
    [N, 2], and the share of the variance of each axis [2], zeros where nothing varies. The sign of
    an axis is that which makes its largest place positive."""
    left, sizes, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    places = left[:, :2] * sizes[:2]
    places = places * np.where(places.max(0) >= -places.min(0), 1, -1)
    whole = float((sizes**2).sum())
    # What is left of equal rows is rounding.
    varies = whole > 1e-12 * max(float((rows**2).sum()), 1e-30)
    return places, sizes[:2] ** 2 / whole if varies else np.zeros(2)


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


# What the report shows of a retrieval: queries of both directions with the best that was found.


BEST = 5


def examples(
    images: np.ndarray,
    rows: Sequence[np.ndarray],
    texts: Sequence[str],
    embeddings: np.ndarray,
    matches: np.ndarray,
    count: int,
) -> dict[str, Any]:
    """`count` images, spread over the kept ones, with the best texts, and a text of each with the
    best of the kept images. A right one that is not among the best follows them.

    images: embeddings [I, D]. kept: pictures of the first of them, uint8 [H, W, 3] each.
    embeddings: of the texts, [T, D]. matches: image and text of each pair, int64 [C, 2].
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
    """(number, dict(score, correct, rank)) of the best, rank 1 first, and of the best right one."""
    best = np.argsort(-scores, kind="stable")[:BEST].tolist()
    ranked = list(zip(best, range(1, BEST + 1)))
    if not set(best) & set(right):
        first = max(right, key=lambda number: float(scores[number]))
        ranked.append((first, int((scores >= scores[first]).sum())))  # as ties are counted
    return [
        (number, dict(score=float(scores[number]), correct=number in right, rank=rank))
        for number, rank in ranked
    ]
