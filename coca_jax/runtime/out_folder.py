"""The folder into which a command will write a model or a run: looked at before any work."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from coca_jax.runtime import bounded_json, storage

CARD = "---\nlibrary_name: coca_jax\n"  # how the README.md of a model's folder begins
# What `export` and `convert` leave, and files of the file system's own.
_OURS = re.compile(
    r"\..*|.*\.new|config\.json|params\.safetensors|vocabulary\..*|programs|onnx|"
    r"open_clip_(config\.json|model\.safetensors)"
)
_OF_HUB = re.compile(r"README\.md|preprocessor_config\.json|model\.safetensors|tokenizer\..*")
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


def check_model(folder: str | os.PathLike[str]) -> None:
    """`check`, and nothing of somebody else's in the folder: it is new or empty, or holds a model
    that was written there before, whole or, after a stop, in part.

    Raises:
        ValueError: it may not be written to.
    """
    check(folder)
    found = storage.place(folder)
    if not found.exists() or _is_ours(found / "config.json"):
        return
    names = sorted(path.name for path in found.iterdir())
    card = found / "README.md"
    stopped = card.exists() and card.read_bytes().startswith(CARD.encode())
    others = [
        name
        for name in names
        if name == "config.json"
        or not (_OURS.fullmatch(name) or (stopped and _OF_HUB.fullmatch(name)))
    ]
    if others:
        raise something_else(folder, others[0])


def something_else(folder: str | os.PathLike[str], name: str) -> ValueError:
    """Why nothing is written to a folder that holds `name`, which is somebody else's."""
    return ValueError(f"--out={folder} holds something else ({name}); give a new folder")


def _is_ours(path: Any) -> bool:
    """Whether a config.json is that of a model of this library: many programs have such a file."""
    try:
        return {"model", "preprocess", "tokenizer"} <= bounded_json.parse(path.read_bytes()).keys()
    except (OSError, ValueError):
        return False


def check_apart(workdir: str | os.PathLike[str], data: str) -> None:
    """Raises ValueError where a new run's workdir is the folder of the data, among which its files
    would lie. Below it may be: what a run writes is no picture."""
    begun = os.path.exists(os.path.join(workdir, "config.json"))
    if begun or not os.path.isdir(data):
        return
    if os.path.realpath(data) == os.path.realpath(workdir):
        raise ValueError(
            f"--workdir={workdir} is the folder of the data, among which the run's files would "
            "lie; give one of its own"
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


_OF_START = ("vocabulary.model", "config.json", "metrics.jsonl", "goodput.json", "trackers.json")


@contextlib.contextmanager
def cleaned_if_refused(
    workdir: str | os.PathLike[str], main_process: bool = True
) -> Iterator[None]:
    """Removes the files that a new run wrote when a ValueError or OSError ends it before its first
    logged step: the next one would find a vocabulary, and warn of it. Indexes and imported data
    stay, as they take long to make. So does what was there before, and all of a run that began."""
    folder = storage.place(workdir)
    before = {name for name in _OF_START if (folder / name).exists()}
    try:
        yield
    except (ValueError, OSError):
        metrics, steps = folder / "metrics.jsonl", folder / "checkpoints"
        begun = (
            (metrics.exists() and metrics.stat().length)
            or (steps.exists() and any(steps.iterdir()))
            or any(folder.glob("skipped_step_*"))  # examples of a loss that is not finite
        )
        if main_process and "config.json" not in before and not begun:
            with contextlib.suppress(OSError):
                for name in _OF_START:
                    if name not in before and (folder / name).exists():
                        (folder / name).unlink()
                if steps.exists():
                    steps.rmdir()
        raise
