"""Where checkpoints are, a folder or a bucket, and which of their steps are whole."""

from __future__ import annotations

from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from coca_jax.checkpoints import bucket_arrays
from coca_jax.files import storage

_COMMITTED = "commit_success.txt"  # what Orbax writes last


def place(path: str) -> epath.Path:
    """`storage.place` of a run or of its checkpoints.

    Raises ValueError where there cannot be any.
    """
    found = storage.place(path)
    if str(found).startswith("s3://"):
        bucket_arrays.enable()
    return found


def check_writable(workdir: str) -> None:
    """Makes the folder when it is missing and tries whether files and arrays can be written in it.

    Raises ValueError when they cannot.
    """
    folder = place(workdir)
    storage.check_writable(folder)
    if storage.is_remote(folder):
        bucket_arrays.check_writable(folder)


def atomicity(directory: epath.Path) -> dict[str, Any]:
    """Options of Orbax's CheckpointManager: how a step appears at once.

    On a disk it gets its name when it is whole. In a bucket nothing can be renamed: a file that is
    written last says that a step is whole. Orbax does so by itself on gs:// alone.
    """
    if not str(directory).startswith("s3://"):
        return {}
    options = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
    return {"atomicity_options": options}


def is_whole(step: epath.Path) -> bool:
    """Whether a step, which is there, was written to its end."""
    return not storage.is_remote(step) or (step / _COMMITTED).exists()


def unfinished(directory: epath.Path) -> list[epath.Path]:
    """What saves that were killed or failed have left."""
    if not directory.is_dir():
        return []
    if not storage.is_remote(directory):
        return list(directory.glob("*.orbax-checkpoint-tmp*"))
    return [p for p in directory.iterdir() if p.name.isdecimal() and not is_whole(p)]


def rename(step: epath.Path, target: epath.Path) -> None:
    """Gives a step another name."""
    if storage.is_remote(step):  # the server copies file by file, which may be cut short
        (step / _COMMITTED).unlink()
    storage.move_folder(step, target)
