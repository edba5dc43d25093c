"""The largest difference between our figures of five sets and CLIP_benchmark's own, of one model.

    python benchmarks/suite_peer.py CHECKPOINT

Writes the sets, for its run alone, in CLIP_benchmark's layout, of pictures that pictures.py draws:
the first shape's colour and its kind (400 test pictures each), which colours there are (400 with
several labels each), and pictures with one caption (130) and three (89). Both programs score them,
ours by `--suite`, CLIP_benchmark with our model through its adapter; the last line is JSON: the
largest difference, and of how many figures. Its linear probe, which asks for a GPU, is compared in
tests/test_suites.py. Needs the extra 'clip_benchmark'.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from typing import Any

import numpy as np
import pictures
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEMPLATES = ("a {c}", "a drawing of a {c}", "something {c}")
Drawn = tuple[Image.Image, str]


def pack(folder: pathlib.Path, examples: list[dict[str, bytes]]) -> None:
    """Two shards of them, as webdataset has it."""
    (folder / "test").mkdir()
    (folder / "test/nshards.txt").write_text("2\n")
    for shard in range(2):
        with tarfile.open(folder / f"test/{shard}.tar", "w") as archive:
            for number in range(shard, len(examples), 2):
                for suffix, content in examples[number].items():
                    info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def label(folder: pathlib.Path, names: tuple[str, ...]) -> None:
    """The files of a set of classes."""
    folder.mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


def write_classes(folder: pathlib.Path, names: tuple[str, ...], word: int, seed: int) -> None:
    """Classes by the word of the caption at that place."""
    label(folder, names)
    rng, examples = np.random.default_rng(seed), []
    for _ in range(400):
        image, text, _ = pictures.shapes(rng)
        number = names.index(text.split()[word])
        examples.append(dict(png=png(image), cls=str(number).encode()))
    pack(folder, examples)


def write_several(folder: pathlib.Path) -> None:
    """Each picture's colours, one or two."""
    label(folder, pictures.COLOURS)
    (folder / "dataset_type.txt").write_text("multilabel\n")
    rng, examples = np.random.default_rng(2), []
    for _ in range(400):
        image, text, _ = pictures.shapes(rng)
        file = io.BytesIO()
        np.save(file, np.array([colour in text.split() for colour in pictures.COLOURS], np.int64))
        examples.append(dict(png=png(image), npy=file.getvalue()))
    pack(folder, examples)


def write_captions(folder: pathlib.Path, count: int, each: int) -> None:
    """Pictures with as many captions each, no two alike: between equal ones either answer is right,
    and which of them is taken is left to rounding."""
    folder.mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    rng, examples = np.random.default_rng(3 + each), {}
    while len(examples) < count:
        image, text, _ = pictures.shapes(rng)
        texts = [text, f"a drawing: {text}", f"{text}, on white"][:each]
        examples[text] = dict(png=png(image), txt="\n".join(texts).encode())
    pack(folder, [*examples.values()])


def write(root: pathlib.Path) -> None:
    """The five sets, into a new folder."""
    write_classes(root / "colours", pictures.COLOURS, 1, 0)
    write_classes(root / "shapes", pictures.SHAPES, 2, 1)
    write_several(root / "several")
    write_captions(root / "captions", 130, 1)
    write_captions(root / "three_captions", 89, 3)


def run(*words: str) -> None:
    """A module of Python; what it says goes to standard error."""
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    more = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-m", *words], env=os.environ | more, check=True, stdout=2)


def theirs(checkpoint: str, root: pathlib.Path, name: str, task: str, out: pathlib.Path) -> Any:
    """{figure: value} of a set by CLIP_benchmark."""
    file = out / f"{name}_{task}.json"
    run(
        *("coca_jax.evaluation.clip_benchmark", "eval", "--model_type=coca_jax"),
        *(f"--model={checkpoint}", "--pretrained=captions", f"--dataset=wds/{name}"),
        *(f"--dataset_root={root / name}", f"--task={task}", "--no_amp", "--num_workers=0"),
        *("--recall_k", "1", "5", "10", f"--output={file}"),
    )
    return json.loads(file.read_text())["metrics"]


def differences(checkpoint: str, folder: pathlib.Path) -> dict[tuple[str, str], float]:
    """{(figure, set): how far ours is from theirs}; folder: an empty one."""
    root, out = folder / "sets", folder / "scores"
    write(root)
    flags = ("--suite=clip_benchmark", f"--root={root}", f"--out={out}")
    run("coca_jax", "evaluate", f"--checkpoint={checkpoint}", *flags)
    ours = json.loads((out / "eval.json").read_text())
    found = {}
    for one in sorted(root.iterdir()):
        labels = (one / "classnames.txt").exists()
        task = "zeroshot_classification" if labels else "zeroshot_retrieval"
        for figure, value in theirs(checkpoint, root, one.name, task, out).items():
            if not math.isnan(value):  # as the best five of four classes
                found[figure, one.name] = abs(ours[f"suite/{one.name}/{figure}"] - value)
    return found


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    checkpoint = parser.parse_args().checkpoint
    with tempfile.TemporaryDirectory() as folder:
        found = differences(checkpoint, pathlib.Path(folder))
    print(json.dumps(dict(difference=max(found.values()), figures=len(found))))


if __name__ == "__main__":
    main()
