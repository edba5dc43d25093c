"""The evaluation history of a run: evaluations.jsonl in its workdir.

The file has one line per evaluation, in step order: {"step": 2000, "scores": {name: value}} and a
checksum (runtime/json_files.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from coca_jax.runtime import bounded_json, json_files, storage

FILE = "evaluations.jsonl"


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns dict(step, scores) per evaluation, in step order; a value that is not finite is None.
    Skips damaged lines with a warning."""
    path = storage.place(workdir) / FILE
    found = []
    # Split bytes, not text: a damaged line may be invalid UTF-8 and must not affect the others.
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row = json_files.unseal(bounded_json.loads(line.decode()), f"{path}, line {number},")
            found.append(row)
        except ValueError as error:
            logging.warning("skipped an evaluation: %s", error)
    return found


def add(workdir: str | os.PathLike[str], step: int, scores: Mapping[str, float]) -> None:
    """Adds the evaluation after `step`."""
    clean = {k: float(v) if math.isfinite(v) else None for k, v in scores.items()}
    # A run that went back to an earlier checkpoint repeats steps: drop their old evaluations.
    rows = [row for row in read(workdir) if row["step"] < step]
    _write(workdir, [*rows, dict(step=int(step), scores=clean)])


def drop_after(workdir: str | os.PathLike[str], step: int) -> None:
    """Drops the evaluations after `step`, whose weights the run discards."""
    rows = read(workdir)
    remaining = [row for row in rows if row["step"] <= step]
    if len(remaining) < len(rows):
        _write(workdir, remaining)


def _write(workdir: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    # Rewrite the file atomically: a kill leaves either the old file or the new one.
    text = "".join(json.dumps(json_files.seal(dict(row)), allow_nan=False) + "\n" for row in rows)
    storage.write_text(storage.place(workdir) / FILE, text)


def has(workdir: str | os.PathLike[str], step: int) -> bool:
    """Whether the history contains the evaluation after `step`."""
    return any(row["step"] == step for row in read(workdir))
