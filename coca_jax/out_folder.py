"""The folder into which a command will write a model: looked at before any work."""

from __future__ import annotations

import os

from coca_jax import storage


def check(folder: str | os.PathLike[str]) -> None:
    """Whether a model may be written to a folder: `storage.check_writable`, and no run in it, whose
    config.json would be another one. Nothing is made, so that what is refused later leaves nothing.

    Raises:
        ValueError: it may not.
    """
    found = storage.place(folder)
    if (found / "checkpoints").exists() or (found / "metrics.jsonl").exists():
        raise ValueError(f"--out={folder} is the folder of a run; give another one")
    storage.check_writable(folder, make=False)
