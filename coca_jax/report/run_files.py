"""What a run left behind, read for its report."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from etils import epath

from coca_jax import storage
from coca_jax.evaluators import history
from coca_jax.metrics import read_metrics
from coca_jax.training import goodput


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run's files, empty where they are missing.

    rows: of metrics.jsonl; evaluations: dict(step, scores) each; scores: of the last evaluation;
    goodput: as training/goodput.py keeps it over restarts.
    """

    folder: epath.Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    scores: dict[str, Any]
    examples: dict[str, Any]
    goodput: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    @property
    def last_step(self) -> int:
        """The last one that is logged or evaluated; 0 where nothing says."""
        if self.rows:
            return int(self.rows[-1]["step"])
        return int(self.scores.get("step") or 0)


def read(workdir: str | os.PathLike[str]) -> RunFiles:
    """Raises FileNotFoundError when there is no such folder, ValueError when it holds neither
    metrics nor evaluations."""
    folder = storage.place(workdir)
    if not folder.is_dir():
        raise FileNotFoundError(f"workdir {str(folder)!r} is not a folder; give that of a run")
    found = RunFiles(
        folder=folder,
        config=_read_json(folder / "config.json"),
        rows=read_metrics(folder),
        evaluations=history.read(folder),
        scores=_read_json(folder / "eval.json"),
        examples=_read_json(folder / "eval_examples.json"),
        goodput=_read_json(folder / goodput.FILE),
    )
    if not found.rows and not found.scores:
        raise ValueError(f"workdir {str(folder)!r} holds no metrics.jsonl or eval.json: run train")
    return found


def _read_json(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
