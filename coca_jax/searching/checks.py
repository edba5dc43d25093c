"""What is refused of an index: a folder of something else, a damaged index.json, another model."""

from __future__ import annotations

from typing import Any

from coca_jax.files import storage
from coca_jax.inference import model_checksum

STAGED = "staged"
LEASE = "lease.json"  # of who writes to it, see training/lease.py


def check_folder(folder: str) -> None:
    """Raises ValueError for a folder without index.json that holds anything else than what is there
    before that: one whose first run was killed, or found the disk full, is begun again."""
    place = storage.place(folder)
    if place.exists() and not all(map(_comes_first, place.iterdir())):
        raise ValueError(f"{folder} holds something that is no index; give a new folder")


def _comes_first(path: Any) -> bool:
    if path.name == "metadata":  # empty: what is in it would be of an index that lost its JSON
        return path.is_dir() and not any(path.iterdir())
    unnamed = storage.UNNAMED.fullmatch(path.name)
    return path.name in (STAGED, LEASE) or bool(unnamed and unnamed[1] in (LEASE, "index.json"))


def check_model(folder: str, there: dict[str, Any], about: dict[str, Any]) -> None:
    """Raises ValueError where the index of `folder`, {} for a new one, is another model's."""
    if there and not model_checksum.same(there["model"], about["model"]):
        check_dtype(f"--out={folder}", there, about.get("dtype"))
        raise ValueError(
            f"--out={folder} was made by another model ({there['checkpoint']}); embeddings of two "
            "models do not compare: give a new folder"
        )


def check_dtype(index: str, there: dict[str, Any], dtype: str | None) -> None:
    """Raises ValueError where an index, called `index`, was made in another dtype than a model's,
    whose weights are rounded to it. None, and in what older versions wrote: unknown."""
    made = there.get("dtype")
    if made and dtype and made != dtype:
        raise ValueError(
            f"{index} was made with --dtype={made}, and the model is in {dtype}: other weights; "
            f"give --dtype={made}, or index again into a new folder"
        )


def check_about(about: dict[str, Any], place: str) -> None:
    """Raises ValueError where index.json lacks what `begin` writes."""
    width = about.get("width")
    texts = all(isinstance(about.get(key), str) for key in ("model", "checkpoint"))
    if not texts or not isinstance(width, int) or not 0 < width <= 65_536:
        raise ValueError(
            f"{place} is damaged: it names no model, checkpoint and width; index again"
        )
