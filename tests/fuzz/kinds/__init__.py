"""The kinds of input. A kind gives good files, damages them, and reads the result as users do."""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import pathlib
import random
from collections.abc import Callable

import numpy as np

# Kinds by the module that has them, as module.KINDS[name].
NAMES = {
    "images": "media", "animations": "media", "videos": "media",
    "tars": "tables", "parquet": "tables", "jsonl": "tables", "csv": "tables",
    "tars_in_place": "tables", "parquet_in_place": "tables", "references": "tables",
    "json": "tables", "sidecars": "tables",
    "safetensors": "weights", "torch": "weights", "tokenizers": "weights", "open_clip": "weights",
    "exports": "weights",
    "overrides": "settings", "configs": "settings", "shards": "settings", "manifests": "settings",
    "indexes": "settings", "captions": "settings", "reports": "settings",
    "searches": "searches",
    "towers": "scores",
    "broken": "broken",  # a reader with every fault, to see that each is found
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        seeds: makes the good files, the same ones in every process.
        mutate: a damaged file, from one of them.
        run: reads a file, twice the same; a text that tells all of what was found.
        mib: the memory that reading may take, above what the process had with good files.
    """

    seeds: Callable[[], list[bytes]]
    mutate: Callable[[random.Random, bytes], bytes]
    run: Callable[[pathlib.Path], str]
    mib: int = 256


def load(name: str) -> Kind:
    """A kind by its name."""
    return importlib.import_module(f"kinds.{NAMES[name]}").KINDS[name]


def surroundings(folder: pathlib.Path) -> None:
    """What lies in the worker's folder, for inputs to name."""
    (folder / "a.png").write_bytes(encoded("PNG"))
    (folder / "b.jpg").write_bytes(encoded("JPEG"))
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to("/etc/passwd")


def pixels(seed: int = 1, height: int = 24, width: int = 20, channels: int = 3) -> np.ndarray:
    """A picture, uint8 [height, width, channels]: blocks of colour with noise."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, channels))
    fine = rough.repeat(4, 0).repeat(4, 1)[:height, :width]
    return np.clip(fine + rng.integers(-9, 9, fine.shape), 0, 255).astype(np.uint8)


def encoded(format: str, image: np.ndarray | None = None, **options: object) -> bytes:
    """A small picture in a format of PIL's."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels() if image is None else image).save(out, format, **options)
    return out.getvalue()
