"""Sets of suites, one of their files damaged."""

from __future__ import annotations

import io
import json
import pathlib
import random
import shutil
import tarfile

import mutate
import numpy as np

from coca_jax.suites import folders, tables
from kinds import Kind, encoded

PAIR = {"filename": "a.png", "caption": "a cat", "negative_caption": "a dog"}


def _tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _files() -> dict[str, bytes]:
    """A set of each layout below one folder."""
    array = io.BytesIO()
    np.save(array, np.array([2, 7]))
    picture = encoded("PNG")
    groups = {"s0.png": picture, "s0.cls": b"1", "s0.npy": array.getvalue()}
    groups |= {"s1.png": picture, "s1.cls": b"0", "s1.json": b'{"region": "Asia"}'}
    texts = {"s0.png": picture, "s0.txt": b"a cat\na pet\n", "s1.png": picture}
    texts["s1.json"] = b'{"captions": ["a dog", "another"]}'
    return {
        "classes/test/0.tar": _tar(groups),
        "captions/test/0.tar": _tar(texts),
        "pairs/swap.json": json.dumps({"0": PAIR}).encode(),
        "tasks.yml": b"classes:\n  name: Classes\n  main_metric: acc1\ncaptions: {}\n",
        "classes/test/nshards.txt": b"1\n",
        "classes/classnames.txt": b"cat\ndog\n",
        "classes/zeroshot_classification_templates.txt": b"a photo of a {c}.\n",
        "captions/test/nshards.txt": b"1\n",
        "captions/dataset_type.txt": b"retrieval\n",
        "pairs/a.png": picture,
    }


NAMES = (*_files(),)


def seeds() -> list[bytes]:
    """Each file but the picture, its number before it."""
    return [bytes([n]) + data for n, data in enumerate(_files().values()) if NAMES[n][-3:] != "png"]


def damage(rng: random.Random, seed: bytes) -> bytes:
    """Bytes at random, or other values in JSON."""
    if NAMES[seed[0]].endswith(".json") and rng.random() < 0.8:
        return seed[:1] + mutate.text_of(rng, mutate.tree(rng, json.loads(seed[1:])))
    return seed[:1] + mutate.data(rng, seed[1:], 4)


def run(path: pathlib.Path) -> str:
    """The tasks of the list, and how many examples each set has."""
    root = path.with_name("sets")
    shutil.rmtree(root, ignore_errors=True)
    data = path.read_bytes()
    for number, (name, good) in enumerate(_files().items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data[1:] if number == data[0] % len(NAMES) else good)
    found, missing = tables.tasks(str(root / "tasks.yml"), str(root))
    told = [f"{task.title} {task.metric} {task.folder.kind}" for task in found]
    counts = [sum(1 for _ in task.folder.examples()) for task in found]
    pairs = folders.read(str(root / "pairs"))
    counts.append(sum(1 for _ in pairs.examples()))
    return f"{told} {counts} {missing}"


KINDS = {"suites": Kind(seeds, damage, run)}
