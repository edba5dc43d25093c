"""Captions of image files, read ahead in batches, and what a JSONL file already has."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from coca_jax import storage
from coca_jax.data import bounded_json
from coca_jax.inference import read_ahead

if TYPE_CHECKING:
    from coca_jax import inference


def json_line(result: dict[str, Any]) -> str:
    """A result as one line. A name of a file that is not UTF-8 is escaped, as JSON can, so that
    `read_done` gives it back."""
    text = json.dumps(result, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(result)
    return text


def read_done(path: str) -> tuple[set[str], int]:
    """Images that a JSONL file already holds, and its bytes without a last line cut short by a
    stop; path: a file that may be missing, in a local folder or a bucket.

    Raises ValueError for any other line that is not one of ours.
    """
    done: set[str] = set()
    whole = 0
    place = storage.place(path)
    if not place.exists():
        return done, whole
    if not storage.is_remote(place) and not os.path.isfile(place):
        raise ValueError(f"--out={path} is no file; give one, which may be new")
    with place.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                done.add(bounded_json.loads(line)["image"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"--out={path}: line {number} is not a caption; give another file"
                ) from None
            whole += len(line)
    return done, whole


def read_batches(
    model: inference.CoCaModel, paths: Sequence[str], size: int
) -> Iterator[list[tuple[str, np.ndarray | ValueError | OSError]]]:
    """Yields lists of (path, uint8 [S, S, 3], of videos [T, S, S, 3], or why it cannot be read),
    two batches read ahead."""

    return read_ahead.batches(paths, model.preprocess, size)


def caption_files(
    model: inference.CoCaModel,
    paths: Sequence[str],
    *,
    batch_size: int = 32,
    prompt: str = "",
    **how: Any,
) -> Iterator[dict[str, Any]]:
    """Yields {"image", "caption", "score"} or {"image", "error"} for each path, in order; an error
    names the image.

    With several captions per image also "captions": all of them, as {"caption", "score"}. An
    image's random numbers come from its path: what else is captioned does not change its captions.
    """
    for batch in read_batches(model, paths, batch_size):
        good = [(path, pixels) for path, pixels in batch if isinstance(pixels, np.ndarray)]
        captions: list[list[inference.Caption]] = []
        if good:
            seeds = [zlib.crc32(os.fsencode(path)) for path, _ in good]
            pixels = np.stack([pixels for _, pixels in good])
            captions = model.captions(pixels, prompt, seeds=seeds, **how)
        by_path = dict(zip((path for path, _ in good), captions))
        for path, found in batch:
            if path not in by_path:
                text = " ".join(str(found).split())
                if text in ("", path):  # some file systems tell no more than the name
                    there = "; is it there, does its host answer?" if "://" in path else ""
                    text = f"cannot be read ({type(found).__name__}){there}"
                yield dict(image=path, error=text if path in text else f"{path}: {text}")
                continue
            texts = [dict(caption=c.text, score=round(c.log_prob, 4)) for c in by_path[path]]
            yield dict(image=path, **texts[0]) | (dict(captions=texts) if len(texts) > 1 else {})
