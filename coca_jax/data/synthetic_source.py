"""The embedded data set as a source: scenes that are drawn as they are read."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from coca_jax.config import Entry
from coca_jax.data import images, supervision
from coca_jax.data.scenes.drawing import SCENERY, SIDE, draw, render
from coca_jax.data.scenes.language import full_caption, label_names, noisy_caption
from coca_jax.data.scenes.world import SPLIT_SIZES, Draws, draw_scene, hash_uniform, stream
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.source import Indices, Source


def open_entry(entry: Entry, split: str) -> Source:
    """An entry dict(builtin='scenes', objects=...) of config.data.sources (0.1 ms a scene).

    Raises:
        ValueError: another name, or a split, kind, scenery or number of objects that scenes do not
            have.
    """
    name = entry.builtin
    if name != "scenes":
        raise ValueError(f"data source builtin={name!r}: there is 'scenes'")
    kind, objects = entry.kind, entry.objects
    drawn = Scenes(split, kind, objects, entry.scenery)

    def record(scene: Mapping[str, Any]) -> Record:
        return Record(
            image=images.encode_bmp(scene["image"]),
            texts=(scene["text"],) if scene["text"] else (),
            labels=tuple(scene["labels"] or ()),
            key=scene["key"],
            extra=json.dumps({"scene": scene["scene"]}),
        )

    def read(indices: Indices) -> list[Record]:
        return [record(scene) for scene in drawn.read(indices)]

    def read_texts(indices: Indices) -> list[Record]:
        return [
            Record(
                *(b"", (t["text"],) if t["text"] else (), tuple(t["labels"] or ())),
                *(t["key"], json.dumps({"scene": t["scene"]})),
            )
            for t in drawn.read_texts(indices)
        ]

    return Source(
        f"{name} [{split}]",
        len(drawn),
        read,
        read_texts,
        every=("text", "label", drawn.kind.wanted),
        fingerprint=f"scenes {split} {kind} {sorted(set(objects))} {len(drawn)}"
        + ("" if entry.scenery == "plain" else f" {entry.scenery}"),
    )


# Random access to the records of a split, and pictures of it as files.


class Scenes:
    """Random access to one split; see the module for what the splits hold.

    Args:
      split: 'train', 'test' (like training) or 'heldout' (compositions that training never shows).
      kind: 'caption' (one to four objects and an alt-text) or 'label' (one object and its names).
      objects: how many objects a caption scene may have; all four counts by default.
      scenery: 'plain' (four backgrounds that have a name), 'varied' (others too, in changing
        light) or 'unseen' (only others, which 'varied' never shows; not for training). The scenes
        and texts of an index are the same in all three, but that captions name no background
        without a name.

    A record is a dict: `image` uint8 [64, 64, 3]; `text`, one noisy alt-text (in the evaluation
    splits the full caption), None for labels; `labels`, names or None; `key`; `scene`, the
    attributes. Raises ValueError for an unknown split, kind or count, and IndexError by index.
    """

    def __init__(
        self,
        split: str = "train",
        kind: str = "caption",
        objects: Iterable[int] = (1, 2, 3, 4),
        scenery: str = "plain",
    ):
        if split not in SPLIT_SIZES:
            raise ValueError(f"split is {split!r}; use one of {', '.join(SPLIT_SIZES)}")
        drawn = [name for name, one in supervision.KINDS.items() if one.drawn]
        if kind not in drawn:
            *names, last = map(repr, drawn)
            raise ValueError(
                f"builtin='scenes' draws nothing for kind={kind!r}, but for {', '.join(names)} or "
                f"{last}; give data of your own"
            )
        self.kind = supervision.KINDS[kind]
        if scenery not in SCENERY:
            raise ValueError(f"scenery is {scenery!r}; use one of {', '.join(SCENERY)}")
        if scenery == "unseen" and split == "train":
            raise ValueError("scenery='unseen' is for evaluation alone; train on 'varied'")
        objects = tuple(sorted(set(objects)))
        if not objects or not set(objects) <= {1, 2, 3, 4}:
            raise ValueError(f"objects is {objects}; use counts from 1 to 4")
        self.split, self._labelled = split, self.kind.drawn == "names"
        shares = {1: 0.4, 2: 0.25, 3: 0.2, 4: 0.15}
        counts = (1,) if self._labelled else objects
        self._counts = tuple((shares[n], n) for n in counts)
        name = f"{kind}-{''.join(map(str, counts))}"
        self._name = f"scenes/{split}/{name}"
        self._scenery = scenery
        parts = ("scene", "ink", "text", "scenery")
        self._streams = [stream("scenes-2", split, name, part) for part in parts]

    def __len__(self) -> int:
        return SPLIT_SIZES[self.split]

    def _draws(self, indices: np.ndarray, part: int, count: int) -> list[Draws]:
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"index outside 0 to {len(self) - 1} of {self._name}")
        blocks = hash_uniform(self._streams[part], indices, 0, count).tolist()
        return [Draws(self._streams[part], int(i), b) for i, b in zip(indices, blocks)]

    def _scenes(self, indices: np.ndarray) -> list[dict[str, Any]]:
        heldout = self.split == "heldout"
        scenes = [draw_scene(d, heldout, self._counts) for d in self._draws(indices, 0, 24)]
        for scene, (behind, _) in zip(scenes, self._behind(indices)):
            if behind is not None:
                scene["background"] = None
        return scenes

    def _behind(self, indices: np.ndarray) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
        """What lies behind each scene, and the light, as `render` takes them."""
        if self._scenery == "plain":
            return [(None, None)] * len(indices)
        return [draw(self._scenery, d, SIDE) for d in self._draws(indices, 3, 24)]

    def read(self, indices: np.ndarray | Sequence[int]) -> list[dict[str, Any]]:
        """Returns the records at `indices`, int [N]."""
        indices = np.asarray(indices, np.int64).reshape(-1)
        scenes = self._scenes(indices)
        inks = self._draws(indices, 1, 24)
        images = [render(s, d, *b) for s, d, b in zip(scenes, inks, self._behind(indices))]
        texts = self._texts(indices, scenes)
        return [
            dict(image=image, **text, key=f"{self._name}/{index}", scene=scene)
            for index, scene, image, text in zip(indices, scenes, images, texts)
        ]

    def read_texts(self, indices: np.ndarray | Sequence[int]) -> list[dict[str, Any]]:
        """Returns only {text, labels, key, scene} at `indices`: no picture is drawn (for
        vocabularies)."""
        indices = np.asarray(indices, np.int64).reshape(-1)
        scenes = self._scenes(indices)
        return [
            dict(text, key=f"{self._name}/{index}", scene=scene)
            for index, scene, text in zip(indices, scenes, self._texts(indices, scenes))
        ]

    def _texts(self, indices: np.ndarray, scenes: list[dict]) -> list[dict[str, Any]]:
        draws = self._draws(indices, 2, 48)
        if self._labelled:
            noise = draws if self.split == "train" else [None] * len(draws)
            return [dict(text=None, labels=label_names(s, d)) for s, d in zip(scenes, noise)]
        if self.split != "train":
            return [dict(text=full_caption(s), labels=None) for s in scenes]
        return [dict(text=noisy_caption(s, d), labels=None) for s, d in zip(scenes, draws)]


def write_folder(out: str, count: int, split: str = "heldout") -> None:
    """Writes `count` pictures with metadata.jsonl, as an imagefolder that `prepare` reads."""
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, record in enumerate(Scenes(split).read(np.arange(count))):
        name = f"{number:05d}.png"
        Image.fromarray(record["image"]).save(folder / name)
        lines.append(json.dumps(dict(file_name=name, text=record["text"])))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
