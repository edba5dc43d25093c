"""Small prepared data whose pictures say which they are, for tests of batches."""

import json

import numpy as np
from PIL import Image

from coca_jax.data.prepare import prepare
from coca_jax.recipes import base

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def picture(index, side=20):
    """A picture that says which one it is: its index in the brightness of a corner."""
    pixels = np.full((side, side, 3), list(COLOURS.values())[index % 3], np.uint8)
    pixels[: side // 2, : side // 2] = index % 256
    return pixels


def write_folder(path, count):
    path.mkdir(parents=True)
    lines = []
    for index in range(count):
        name = f"{index:04d}.png"
        Image.fromarray(picture(index)).save(path / name)
        colour = list(COLOURS)[index % 3]
        row = dict(file_name=name, text=[f"picture {index}", f"number {index}"])
        lines.append(row | dict(label=[colour, "square"], group=index % 2))
    (path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_data(root):
    """Prepared data a, b and c of 23, 17 and 40 pictures, with what they were made of in raw."""
    for name, count in (("a", 23), ("b", 17), ("c", 40)):
        write_folder(root / "raw" / name, count)
        prepare("imagefolder", str(root / "raw" / name), str(root / name), progress=False)
    return root


def data_config(*entries, batch=8, **data_keys):
    config = base.get_config()
    config.batch_size = batch
    config.model.image_size, config.model.patch_size = 16, 8
    config.model.text.vocab_size, config.model.text.max_len = 400, 32
    config.data.update(data_keys)
    config.data.sources = entries
    return config


def three_sources(data, where=None, **data_keys):
    """Of what `write_data` made: captions twice as often as labels, and each text of c by itself.
    where: of c."""
    return data_config(
        dict(path=str(data / "a"), kind="caption", weight=2.0),
        dict(path=str(data / "b"), kind="label"),
        dict(path=str(data / "c"), kind="caption", captions="all", where=where or {}),
        augment="drawing",
        **data_keys,
    )


def take(batches, count):
    return [next(batches) for _ in range(count)]


def equal(a, b):
    return all(np.array_equal(a[key], b[key]) for key in a)


def damage(path):
    """A PNG whose header is right and whose pixels are not."""
    content = bytearray(path.read_bytes())
    middle = content.index(b"IDAT") + 8
    content[middle : middle + 12] = bytes(12)
    path.write_bytes(content)
