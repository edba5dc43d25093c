"""Every evaluation of a run, not only the last: evaluations.jsonl in its workdir.

One line an evaluation, in order of steps: {"step": 2000, "scores": {name: value}} and a checksum
(see sealed_json.py). The file is written whole each time: a kill leaves the old one or the new one.
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
    """The evaluations so far, dict(step, scores), in order of steps; values that are not finite are
    None. A damaged line is left out with a warning."""
    path = storage.place(workdir) / FILE
    found = []
    # As bytes: one that is damaged may be no UTF-8, and is of its line alone.
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row = json_files.unseal(bounded_json.loads(line.decode()), f"{path}, line {number},")
            found.append(row)
        except ValueError as error:
            logging.warning("an evaluation is left out: %s", error)
    return found


def add(workdir: str | os.PathLike[str], step: int, scores: Mapping[str, float]) -> None:
    """Adds the evaluation after `step`. Those of that step and of later ones, left by a run that
    went back to an earlier checkpoint, are dropped: each step occurs once."""
    clean = {k: float(v) if math.isfinite(v) else None for k, v in scores.items()}
    rows = [row for row in read(workdir) if row["step"] < step]
    _write(workdir, [*rows, dict(step=int(step), scores=clean)])


def drop_after(workdir: str | os.PathLike[str], step: int) -> None:
    """Drops the evaluations of later steps than `step`, whose weights the run gives up."""
    rows = read(workdir)
    remaining = [row for row in rows if row["step"] <= step]
    if len(remaining) < len(rows):
        _write(workdir, remaining)


def _write(workdir: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(json_files.seal(dict(row)), allow_nan=False) + "\n" for row in rows)
    storage.write_text(storage.place(workdir) / FILE, text)


def has(workdir: str | os.PathLike[str], step: int) -> bool:
    """Whether the evaluation after `step` is there."""
    return any(row["step"] == step for row in read(workdir))
