"""A tar of drawn JPEGs with captions, as input for the benchmarks of recaption and search.

python benchmarks/pictures.py FILE --count=795       # 375 to 640 pixels a side, about 62 kB each
"""

from __future__ import annotations

import argparse
import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

WORDS = "a the old small bright tree house river dog bird on near under with and street".split()


def jpeg(rng: np.random.Generator) -> bytes:
    """Soft colors under some noise, which takes a photograph's bytes and time to decode."""
    height, width = (int(n) for n in rng.integers(375, 641, 2))
    soft = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    pixels = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    noise = rng.normal(0, 6, (height, width, 1)).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write(file: pathlib.Path, count: int, seed: int = 0) -> None:
    """Writes `count` images in webdataset's layout, each with a sentence of 5 to 12 words."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images, texts = np.random.default_rng(2 * seed), np.random.default_rng(2 * seed + 1)
    with tarfile.open(file, "w") as archive:
        for number in range(count):
            sentence = " ".join(texts.choice(WORDS, texts.integers(5, 13)))
            for suffix, data in (("jpg", jpeg(images)), ("txt", sentence.encode())):
                info = tarfile.TarInfo(f"{file.stem}-{number:05d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=500)
    given = parser.parse_args()
    write(given.file, given.count)
