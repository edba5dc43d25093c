"""Small tars of pictures, and both ways to prepare them: a copy and an index."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from coca_jax.data import filters
from coca_jax.data.prepare import prepare
from coca_jax.data.sources import array_record
from coca_jax.data.sources.items import Options

KEPT = ("count", "with_text", "with_label", "read", "quarantined", "filtered")


def picture(seed, side=20):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side, side)).save(out, "JPEG")
    return out.getvalue()


def write_tar(path, first, count, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for n in range(first, first + count):
            told = json.dumps(dict(url=f"http://x/{n}", width=20)).encode()
            for suffix, data in (("jpg", picture(n)), ("txt", f"no. {n}".encode()), ("json", told)):
                info = tarfile.TarInfo(f"{n:06d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def make(format, input, out, *, in_place, **options):
    options = Options(in_place=in_place, **options)
    return prepare(format, str(input), str(out), options=options, processes=1, progress=False)


def both(format, input, out, split="train", **options):
    """The sources of a copy and of an index, whose accounts must agree."""
    for name in ("copy", "index"):
        make(format, input, out / name, in_place=name == "index", **options)
    told = [array_record.read_manifest(str(out / name)) for name in ("copy", "index")]
    assert [told[0]["splits"][split][key] for key in KEPT] == [
        told[1]["splits"][split][key] for key in KEPT
    ]
    assert told[0]["class_names"] == told[1]["class_names"]
    left_out = [
        (out / name / f"{split}-quarantine.jsonl").read_text() for name in ("copy", "index")
    ]
    assert left_out[0] == left_out[1]
    return [filters.open_source(str(out / name), split) for name in ("copy", "index")]
