"""The embedded data set as a source: scenes that are drawn as they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from coca_jax.config import Entry
from coca_jax.data import images, scenes
from coca_jax.data.random_access import Indices, Source
from coca_jax.data.records import Record


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
    drawn = scenes.Scenes(split, kind, objects, entry.scenery)

    def record(scene: Mapping[str, Any]) -> Record:
        return Record(
            image=images.encode_bmp(scene["image"]),
            texts=(scene["text"],) if scene["text"] else (),
            labels=tuple(scene["labels"] or ()),
            key=scene["key"],
            extra=json.dumps({"scene": scene["scene"]} | scene["extra"]),
        )

    def read(indices: Indices) -> list[Record]:
        return [record(scene) for scene in drawn.read(indices)]

    def read_texts(indices: Indices) -> list[Record]:
        return [
            Record(
                *(b"", (t["text"],) if t["text"] else (), tuple(t["labels"] or ())),
                *(t["key"], json.dumps({"scene": t["scene"]} | t["extra"])),
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
