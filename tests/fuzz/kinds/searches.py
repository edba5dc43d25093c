"""The folders of `search index`, one of their files damaged."""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
import shutil

import mutate
import numpy as np

from coca_jax.apps.search.index import Index
from coca_jax.apps.search.parts import Parts, Row
from coca_jax.runtime import json_files
from kinds import Kind

FILES = ("index.json", "img_emb/img_emb_0.npy", "metadata/metadata_0.jsonl")
WIDTH = 4


def _good() -> pathlib.Path:
    """The folder of a small index, made where it is not there."""
    folder = pathlib.Path("index").absolute()
    if not folder.exists():
        parts = Parts(str(folder))
        parts.begin(dict(version=1, model="0" * 64, checkpoint="runs/demo", width=WIDTH))
        rng = np.random.default_rng(0)
        for number in range(2):
            rows = [Row(f"{number}{row}.png", f"caption {row}", (9, row)) for row in range(5)]
            embeddings = rng.standard_normal((5, WIDTH))
            parts.write(f"group {number}", embeddings, rows, {"bad.png": "why"}, last=True)
        parts.write("", np.zeros((0, WIDTH)), [], {}, True, [3])
    return folder


def seeds() -> list[bytes]:
    """Each file, its number before it."""
    return [bytes([number]) + (_good() / name).read_bytes() for number, name in enumerate(FILES)]


def damage(rng: random.Random, seed: bytes) -> bytes:
    """Bytes at random; of JSON other values, sealed or not; of arrays another shape or type."""
    data = seed[1:]
    if seed[0] == 0 and rng.random() < 0.8:
        tree = mutate.tree(rng, json.loads(data))
        if isinstance(tree, dict) and rng.random() < 0.7:
            tree.pop(json_files.SEAL_KEY, None)
        return seed[:1] + mutate.text_of(rng, tree)
    if seed[0] == 1 and rng.random() < 0.5:
        size = rng.choice((*mutate.NUMBERS, 5))
        old, new = b"(5, 4), }", f"({size}, {rng.choice((4, 0, size))}), }}".encode()
        return seed[:1] + data.replace(old + b" " * max(len(new) - len(old), 0), new, 1)
    return seed[:1] + mutate.data(rng, data, 4)


def read(path: pathlib.Path) -> str:
    """The index, and what is nearest to a picture in it."""
    folder = path.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_good(), folder)
    data = path.read_bytes()
    (folder / FILES[data[0] % len(FILES)]).write_bytes(data[1:])
    index = Index(str(folder))
    said = f"{index.names} {index.captions} {index.embeddings.tobytes()!r} {index.about}"
    return f"index: {hashlib.blake2b(said.encode('utf-8', 'replace'), digest_size=6).hexdigest()}"


KINDS = {"searches": Kind(seeds, damage, read)}
