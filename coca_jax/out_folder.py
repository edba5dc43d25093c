"""The folder into which a command will write a model: looked at before any work."""

from __future__ import annotations

import os

from coca_jax import storage

_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx", ".npz", ".msgpack", ".json")


def check(folder: str | os.PathLike[str], *, in_run: bool = False) -> None:
    """Whether a model may be written to a folder: `storage.check_writable`, no run in it, whose
    config.json would be another one, and no name of a file, which its user will look for. Nothing
    is made, so that what is refused later leaves nothing. in_run: it is no model that is written,
    and a run may be there.

    Raises:
        ValueError: it may not.
    """
    found = storage.place(folder)
    begin, end = os.path.splitext(str(folder).rstrip("/"))
    if end.lower() in _FILES and not found.exists():
        raise ValueError(
            f"--out={folder} is written as a folder; give a folder's name: --out={begin}"
        )
    if not in_run and ((found / "checkpoints").exists() or (found / "metrics.jsonl").exists()):
        raise ValueError(f"--out={folder} is the folder of a run; give another one")
    storage.check_writable(folder, make=False)
