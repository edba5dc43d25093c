"""The records that an evaluation goes through: which of a data set's have what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from coca_jax.importers import unprepared

# What a record must have for a task.
NEEDS = {
    "caption": ("retrieval", "captioning"),
    "label": ("zeroshot", "generative", "linear_probe", "knn"),
}
FIELDS = {"caption": "text_field", "label": "label_field"}


class Records:
    """The records of a data entry in their stored order, read as one goes through them.

    Args:
      data: an entry as in config.data.sources with `split`; `path` may be a plain imagefolder, and
        `tfds` any set that the user has.
      limit: at most so many; 0: all.
      known: only records one of whose texts is among these; None: all.
      need: 'caption' or 'label', what a record must have to count; '': nothing.

    Attributes: left_out, the number of records without what is needed.

    A record has image (encoded bytes; of drawn scenes uint8 [64, 64, 3]), second (the other image
    of a pair), text, labels, key and extra; drawn scenes have `scene`. Raises ValueError or
    FileNotFoundError for bad data, or data none of which has what is needed.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        limit: int = 0,
        known: set[str] | None = None,
        need: str = "",
    ):
        self.scenes = data.get("builtin") == "scenes"
        if self.scenes:
            from coca_jax.data.scenes import Scenes

            split, kind = data.get("split", "test"), data.get("kind", "caption")
            source: Any = Scenes(split, kind, data.get("objects", (1, 2, 3, 4)))
        else:
            if need and data.get("kind") != "question":
                data = dict(data, kind=need)
            source = unprepared.open_source(data, "test")
        self._source = source
        self._indices = np.arange(min(limit or len(source), len(source)))
        self.left_out = 0
        # Going through a TFDS set costs as much as evaluating on it.
        if need and not (self.scenes or source.complete or data.get("tfds")):
            self._require(need, source.name)
        if known is not None:
            self._keep(lambda part: [not known.isdisjoint(texts) for texts in self._texts(part)])

    def _require(self, need: str, name: str) -> None:
        count = len(self._indices)
        self._keep(
            lambda part: [
                bool(record.texts if need == "caption" else record.labels)
                for record in self._source.read_texts(part)
            ]
        )
        self.left_out = count - len(self._indices)
        if not len(self._indices):
            raise ValueError(missing(name, need))

    def _keep(self, wanted: Callable[[np.ndarray], list[bool]]) -> None:
        """Leaves the records for which `wanted`, called with parts of the indices, is true."""
        kept = [np.asarray(wanted(part), bool) for part in self._parts()]
        self._indices = self._indices[np.concatenate(kept)]

    def _texts(self, indices: np.ndarray) -> list[Sequence[str]]:
        found = self._source.read_texts(indices)
        return [[r["text"]] for r in found] if self.scenes else [r.texts for r in found]

    def __len__(self) -> int:
        return len(self._indices)

    def _parts(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self._indices), 256):
            yield self._indices[start : start + 256]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part in self._parts():
            if self.scenes:
                yield from self._source.read(part)
                continue
            for record in self._source.read(part):
                yield dict(
                    image=record.image,
                    text=list(record.texts),
                    labels=list(record.labels),
                    key=record.key,
                    extra=record.extra,
                    second=record.second,
                )


def needed(task: str) -> str:
    """What a record must have for a task of this kind: 'caption', 'label', or '' for neither."""
    return next((need for need, tasks in NEEDS.items() if task in tasks), "")


def suited(tasks: Sequence[str], data: Mapping[str, Any]) -> list[str]:
    """Those of the tasks for which the data have what they need, where that can be told early."""
    counts = unprepared.counts(data)
    return [task for task in tasks if not counts or counts.get(needed(task), 1)]


def check(tasks: Sequence[Any]) -> None:
    """Raises ValueError or FileNotFoundError for the first of a run's evaluations whose data are
    not there, or hold nothing that it needs, as far as that can be told without reading images."""
    for task in tasks:
        task = task.to_dict() if hasattr(task, "to_dict") else dict(task)
        data, kind = dict(task.get("data") or {}), task.get("kind", "")
        if not data.get("path"):
            continue
        data.setdefault("split", "test")
        found, name = unprepared.splits(data), f"{data['path']} [{data['split']}]"
        if found and data["split"] not in found:
            raise ValueError(
                f"eval.tasks, {kind} of {task.get('name')}: data {data['path']} have no split "
                f"{data['split']!r}; they have {', '.join(found)}"
            )
        if not suited([kind], data):
            raise ValueError(f"eval.tasks: {missing(name, needed(kind), kind)}")


def missing(name: str, need: str, task: str = "this task") -> str:
    """Why data without any caption or label cannot be scored, and what to do."""
    other = "zeroshot" if need == "caption" else "retrieval,captioning"
    return (
        f"data {name}: no example has a {need}, and {task} needs one; give --tasks={other}, or "
        f"--{FIELDS[need]}=NAME where a field of another name holds it"
    )
