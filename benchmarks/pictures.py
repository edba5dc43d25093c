"""Pictures that are drawn for a benchmark: JPEGs of the usual small size, or two shapes to name.

python benchmarks/pictures.py jpegs FOLDER --count=2000      # 375 to 640 pixels a side, ~62 kB
python benchmarks/pictures.py captions FOLDER --count=500    # two shapes, a sentence each
python benchmarks/pictures.py labels FOLDER --count=500      # two of a colour, in its folder
python benchmarks/pictures.py tar FILE --count=795           # JPEGs with a sentence each
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import shutil
import tarfile
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("left of", "right of", "above", "below")
WORDS = "a the old small bright tree house river dog bird on near under with and street".split()


def jpeg(rng: np.random.Generator) -> bytes:
    """Soft colours under some noise, which takes a photograph's bytes and time to decode."""
    height, width = (int(n) for n in rng.integers(375, 641, 2))
    soft = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    pixels = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    noise = rng.normal(0, 6, (height, width, 1)).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def sentence(rng: np.random.Generator) -> str:
    """Five to twelve words."""
    return " ".join(rng.choice(WORDS, rng.integers(5, 13)))


def sentences(count: int) -> list[str]:
    rng = np.random.default_rng(1)
    return [sentence(rng) for _ in range(count)]


def shapes(rng: np.random.Generator, *, alike: bool = False) -> tuple[Image.Image, str, str]:
    """(picture of 96 pixels, its caption, the colour of the first shape). alike: of both."""
    image = Image.new("RGB", (96, 96), "white")
    draw, colours = ImageDraw.Draw(image), rng.choice(COLOURS, 2)
    kinds, place = rng.choice(SHAPES, 2), rng.choice(PLACES)
    colours = colours[[0, 0]] if alike else colours
    x, y = {"left of": (24, 48), "right of": (72, 48), "above": (48, 24), "below": (48, 72)}[place]
    for kind, colour, (a, b) in zip(kinds, colours, ((x, y), (96 - x, 96 - y)), strict=True):
        r = int(rng.integers(12, 20))
        box = (a - r, b - r, a + r, b + r)
        if kind == "circle":
            draw.ellipse(box, fill=colour)
        elif kind == "square":
            draw.rectangle(box, fill=colour)
        elif kind == "triangle":
            draw.polygon([(a, b - r), (a - r, b + r), (a + r, b + r)], fill=colour)
        else:
            draw.line(box, fill=colour, width=7)
            draw.line((a - r, b + r, a + r, b - r), fill=colour, width=7)
    return image, f"a {colours[0]} {kinds[0]} {place} a {colours[1]} {kinds[1]}", colours[0]


def jpegs(count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    return (jpeg(rng) for _ in range(count))


def draw_jpegs(folder: pathlib.Path, count: int) -> None:
    """With metadata.jsonl, as `prepare --format=imagefolder` reads it."""
    rng, lines = np.random.default_rng(1), []
    for number, data in enumerate(jpegs(count)):
        name = f"{number:05d}.jpg"
        (folder / name).write_bytes(data)
        lines.append(json.dumps(dict(file_name=name, text=sentence(rng))))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def draw_captions(folder: pathlib.Path, count: int) -> None:
    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        image, text, _ = shapes(rng)
        image.save(folder / f"{number:05d}.png")
        lines.append(json.dumps(dict(file_name=f"{number:05d}.png", text=text)))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def draw_labels(folder: pathlib.Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        image, _, colour = shapes(rng, alike=True)  # else none could tell the folder by the picture
        (folder / colour).mkdir(exist_ok=True)
        image.save(folder / colour / f"{number:05d}.png")


def draw_tar(file: pathlib.Path, count: int) -> None:
    """As webdataset has it."""
    rng = np.random.default_rng(1)
    with tarfile.open(file, "w") as archive:
        for number, data in enumerate(jpegs(count)):
            for suffix, content in (("jpg", data), ("txt", sentence(rng).encode())):
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


DRAWN = dict(jpegs=draw_jpegs, captions=draw_captions, labels=draw_labels)
FILES = dict(jpegs="*.jpg", captions="*.png", labels="*/*.png")


def there(kind: str, place: pathlib.Path) -> int:
    """How many pictures of that kind lie in the folder or the tar."""
    if kind != "tar":
        return len(list(place.glob(FILES[kind])))
    with tarfile.open(place) as archive:
        return sum(name.endswith(".jpg") for name in archive.getnames())


def drawn(kind: str, place: pathlib.Path, count: int) -> pathlib.Path:
    """The folder, or the tar, which is drawn unless it is there whole.

    Raises ValueError where something else is there.
    """
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        if (found := there(kind, place)) != count:
            raise ValueError(
                f"{place} has {found} pictures of the kind {kind}, not {count}: remove it, or name "
                "another place"
            )
        return place
    half = place.with_name(f"{place.name}.half")
    shutil.rmtree(half, ignore_errors=True)  # it may have been for more pictures
    if kind == "tar":
        half.parent.mkdir(parents=True, exist_ok=True)
        draw_tar(half, count)
    else:
        half.mkdir(parents=True, exist_ok=True)
        DRAWN[kind](half, count)
    half.rename(place)
    return place


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=(*DRAWN, "tar"))
    parser.add_argument("place", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=500)
    given = parser.parse_args()
    try:
        print(drawn(given.kind, given.place, given.count))
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
