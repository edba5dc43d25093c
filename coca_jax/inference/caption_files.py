"""Captions of image files, read ahead in batches, and what a JSONL file already has."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from coca_jax.config.base import plain
from coca_jax.inference import fingerprint, prefetch
from coca_jax.inference.generation import config
from coca_jax.runtime import bounded_json, json_files, storage

if TYPE_CHECKING:
    from coca_jax import inference

_HOW = ".how.json"  # follows the name of a file of captions: the settings that it is made with
OURS = {"image", "caption", "score"}  # what every line has that `caption` wrote, of any version


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
                found = bounded_json.loads(line)
                if not OURS <= found.keys():  # as of a list of pictures, which has captions too
                    raise ValueError
                done.add(found["image"])
            except (ValueError, AttributeError, TypeError):
                raise ValueError(
                    f"--out={path}: line {number} is not a caption; give another file"
                ) from None
            whole += len(line)
    return done, whole


def check_name(out: str) -> None:
    """Raises ValueError for a file whose name promises another format than lines of JSON."""
    suffix = os.path.splitext(out)[1]
    if suffix.lower() not in ("", ".jsonl"):
        raise ValueError(
            f"--out={out}: captions are written as lines of JSON; give a name that ends with "
            f".jsonl, {out.removesuffix(suffix)}.jsonl"
        )


def remember(out: str, checkpoint: str, checksum: str, how: dict[str, Any]) -> None:
    """Writes beside a file of captions what they are made with; how: prompt and settings."""
    header = dict(checkpoint=checkpoint, made_in=os.getcwd(), model=checksum, how=how)
    json_files.write_sealed(f"{out}{_HOW}", header)


def begun_with(out: str) -> dict[str, Any] | None:
    """What `remember` wrote; None where there is nothing."""
    path = storage.place(f"{out}{_HOW}")
    if not path.exists():
        return None
    header = json_files.read_sealed(path)
    texts = all(isinstance(header.get(name), str) for name in ("checkpoint", "made_in", "model"))
    if texts and isinstance(header.get("how"), dict):
        return header
    raise ValueError(f"{path} is damaged: it names no model and settings; delete it")


def base(before: dict[str, Any] | None) -> str:
    """The folder in which relative names of a file of captions begin: where it was begun, or, where
    that is not known, no more or on another machine, the current one. before: see `begun_with`."""
    made = before["made_in"] if before else ""
    return made if os.path.isdir(made) else os.getcwd()


def check_settings(out: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError, naming the first difference, where captions were begun with other
    settings than `now`. A field that a file lacks, since an older version began it, had its default
    value."""
    usual = config.defaults()
    for name, value in now.items():
        begun = before["how"].get(name, usual.get(name, value))
        if plain(begun) != plain(value):  # JSON makes lists of tuples
            raise ValueError(
                f"--out={out} was begun with {name}={begun!r}, not {value!r}; give the same, or "
                "another --out"
            )


def check_model(out: str, before: dict[str, Any], checkpoint: str, checksum: str) -> None:
    """Raises ValueError where captions were begun with another model."""
    if not fingerprint.same(before["model"], checksum):
        raise ValueError(
            f"--out={out} was begun with --checkpoint={before['checkpoint']}, whose weights or "
            f"preprocessing {checkpoint} does not have; give the same, or another --out"
        )


def read_batches(
    model: inference.CoCaModel, paths: Sequence[str], size: int
) -> Iterator[list[tuple[str, np.ndarray | ValueError | OSError]]]:
    """Yields lists of (path, uint8 [S, S, 3], of videos [T, S, S, 3], or why it cannot be read),
    two batches read ahead."""

    return prefetch.batches(paths, model.fit_image, size)


def caption_files(
    model: inference.CoCaModel,
    paths: Sequence[str],
    *,
    batch_size: int = 32,
    prompt: str = "",
    **overrides: Any,
) -> Iterator[dict[str, Any]]:
    """Yields {"image", "caption", "score"} or {"image", "error"} for each path, in order; an error
    names the image.

    overrides: fields of the model's `generation_config` to change. With several captions per image
    also "captions": all of them, as {"caption", "score"}. An
    image's random numbers come from its path: what else is captioned does not change its captions.
    """
    for batch in read_batches(model, paths, batch_size):
        good = [(path, pixels) for path, pixels in batch if isinstance(pixels, np.ndarray)]
        captions: list[list[inference.Caption]] = []
        if good:
            seeds = [zlib.crc32(os.fsencode(path)) for path, _ in good]
            pixels = np.stack([pixels for _, pixels in good])
            captions = model.captions(pixels, prompt=prompt, seeds=seeds, **overrides)
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
