"""The folder into which a command will write a model or a run: looked at before any work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from coca_jax import storage

PLAN = "plan.json"  # of an ablation, in its folder

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


def check_run(workdir: str | os.PathLike[str]) -> None:
    """Raises ValueError where a workdir is the folder of an ablation, whose report a run would
    write over, and which would be taken for a run then."""
    if not storage.is_remote(workdir) and (storage.place(workdir) / PLAN).exists():
        raise ValueError(
            f"--workdir={workdir} is the folder of an ablation, whose runs are {workdir}/VARIANT/"
            "seedN; give another one"
        )


@contextlib.contextmanager
def gone_if_refused(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """A local folder that is made inside, and is empty when a ValueError or OSError ends it, is
    removed."""
    folder = storage.place(workdir)
    new = not storage.is_remote(folder) and not folder.exists()
    try:
        yield
    except (ValueError, OSError):
        if new:
            with contextlib.suppress(OSError):  # something is in it, or it was not made
                os.rmdir(folder)
        raise
