"""What the benchmark measures: the data sets and the rows that are trained on each."""

from __future__ import annotations

import dataclasses
import os

from coca_jax.config import Config, typed
from coca_jax.training import recipes


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set: the recipe that says its sources and tasks, the minutes of CPU that a row has,
    the scores that are shown (keys of eval.json), and sizes of the models in PyTorch."""

    recipe: str
    minutes: float
    shown: tuple[str, ...]
    width: int
    heads: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A program and its recipe. torch: whether torch_row.py runs it; the rest is what that does.

    layers: image, text, multimodal. drawing: our augmentation, not open_clip's. stem: a light
    ConvNet in place of the patches. muon, positives, compact: Muon for the matrices, equal texts as
    positives, a vocabulary of the ids that occur.
    """

    about: str
    torch: bool = True
    captions: bool = True
    layers: tuple[int, int, int] = (4, 2, 1)
    drawing: bool = False
    stem: bool = False
    muon: bool = False
    positives: bool = False
    compact: bool = False


DATA = {
    "scenes": Data(
        "demo",
        3.0,
        (
            "zero_shot/scenes_heldout/top1",
            "retrieval/scenes_heldout/image_to_text_r1",
            "retrieval/scenes_heldout/text_to_image_r1",
            "captioning/scenes_test/exact_match",
        ),
        128,
        4,
        32,
    ),
    "emoji": Data(
        "emoji",
        3.0,
        (
            "retrieval/emoji_openmoji/image_to_text_r1",
            "retrieval/emoji_openmoji/text_to_image_r1",
            "captioning/emoji_openmoji/exact_match",
        ),
        160,
        4,
        128,
    ),
    "fashion_mnist": Data("fashion_mnist", 1.0, ("zero_shot/fashion_mnist/top1",), 96, 3, 64),
}

ROWS = {
    "coca_jax": Row("this program by its recipe for the data set", torch=False),
    "open_clip_coca": Row("open_clip's CoCa, its training transform, AdamW, captioning x 2"),
    "open_clip_clip": Row("open_clip's CLIP of the same towers: no captions", captions=False),
    "torch_reference": Row(
        "open_clip's CoCa class with our augmentation, Muon, equal texts positive, a light ConvNet "
        "before one layer, and the ids that occur as vocabulary; margins stay",
        layers=(1, 2, 1),
        drawing=True,
        stem=True,
        muon=True,
        positives=True,
        compact=True,
    ),
}


def config_of(data: str, folder: str, steps: int, seed: int) -> Config:
    """The recipe of a data set, its data in `folder`/<name>, for so many steps.

    Raises ValueError for data that there are not.
    """
    if data not in DATA:
        raise ValueError(f"--data={data}: choose one of {', '.join(DATA)}")
    config = typed(recipes.load(DATA[data].recipe))

    def moved(entry: dict) -> dict:
        path = entry.get("path", "")
        return dict(entry, path=os.path.join(folder, os.path.basename(path))) if path else entry

    sources = tuple(moved(entry.to_dict()) for entry in config.data.sources)
    tasks = []
    for task in config.eval.tasks:
        named = [key for key in ("data", "candidates", "querybank") if key in task]
        parts = {key: moved(dict(task[key])) for key in named}
        tasks.append(dict(task) | parts)
    warmup = min(config.optimizer.warmup_steps, max(steps // 10, 0))
    return config.change(
        {
            "steps": steps,
            "seed": seed,
            "data.sources": sources,
            "eval.tasks": tuple(tasks),
            "optimizer.warmup_steps": warmup,
            "checkpoint.every_steps": 1_000_000,
            "log.trackers": (),
        }
    )
