"""Small pictures and tars, and the command that imports them, for tests of prepare."""

import hashlib
import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image

from coca_jax.cli import prepare
from coca_jax.data.sources.items import Options


def draw(seed, size=(40, 30)):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def encode(seed, format="JPEG", size=(40, 30)):
    out = io.BytesIO()
    draw(seed, size).save(out, format)
    return out.getvalue()


def import_data(format, input, out, **options):
    split = options.pop("split", "train")
    keys = {k: options.pop(k) for k in ("shard_count", "processes", "overwrite") if k in options}
    keys.setdefault("processes", 1)
    return prepare.prepare(
        format,
        str(input),
        str(out),
        split=split,
        options=Options(**options),
        progress=False,
        **keys,
    )


def add_member(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_tar(path, count, start=0):
    with tarfile.open(path, "w") as archive:
        for index in range(start, start + count):
            add_member(archive, f"{index:05d}.jpg", encode(index))
            add_member(archive, f"{index:05d}.txt", f"caption {index}".encode())
            add_member(archive, f"{index:05d}.json", json.dumps({"width": index}).encode())


def reasons_of(out, split="train"):
    lines = (pathlib.Path(out) / f"{split}-quarantine.jsonl").read_text().splitlines()
    return {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}


def digests_of(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(pathlib.Path(folder).rglob("*"))
        if p.is_file()
    }
