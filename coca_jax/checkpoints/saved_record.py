"""What a checkpoint says of itself: its format, the run's config, a checksum of every array.

The record is written with the checkpoint and appears with it, so a checkpoint that counts has one.
Those of version 0.1 have none: they are read as they are.
"""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from coca_jax.checkpoints import checksums
from coca_jax.files import sealed_json, storage

FORMAT = 1
ITEM = "record"
FILE = "metadata"  # Orbax's name for the file of a JSON item

# What storage says when the trouble is not in the contents: another try may do.
UNREACHABLE = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED"),
    *("RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"),
)


class Damaged(ValueError):
    """The contents of a checkpoint are not what was written."""


class Misfit(ValueError):
    """A checkpoint is whole, but belongs to another model or a newer version."""


def make(items: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The record of {item: tree of arrays}; run: the contents of the run's config.json."""
    trees = {}
    for item, tree in items.items():
        sums = checksums.of_tree(tree)
        trees[item] = {k: [shape, sums[k]] for k, shape in checksums.shapes(tree).items()}
    return sealed_json.seal({"format": FORMAT, "config": run, "items": trees})


def read(folder: epath.Path) -> dict[str, Any] | None:
    """The record of a checkpoint, None for one of version 0.1.

    Raises Damaged when it is not whole, Misfit for a format that this version does not know.
    """
    file = folder / ITEM / FILE
    if not file.exists() and not (folder / ITEM).exists() and not _promised(folder):
        return None
    try:
        record = sealed_json.read(file)
        number, _, _ = record["format"], record["items"], record["config"]
    except FileNotFoundError:
        raise Damaged(f"{file} is missing") from None
    except KeyError as error:
        raise Damaged(f"{file} lacks {error}") from None
    except OSError:
        raise
    except ValueError as error:
        raise Damaged(str(error)) from None
    if number > FORMAT:
        raise Misfit(
            f"checkpoint {folder} has format {number}, this version reads up to {FORMAT}; "
            "update coca_jax"
        )
    return record


def _promised(folder: epath.Path) -> bool:
    """Whether Orbax's list of what the checkpoint holds names a record."""
    try:
        listed = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
        return ITEM in listed
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_fits(folder: epath.Path, item: str, stored: dict[str, str], wanted: Any) -> None:
    """Raises Misfit naming the first array that the model and the checkpoint do not share.

    stored: {path: shape}, from the record or Orbax's metadata. wanted: a tree of abstract arrays.
    """
    shapes = checksums.shapes(wanted)
    for name in sorted(stored.keys() | shapes.keys()):
        there, here = stored.get(name, "missing"), shapes.get(name, "missing")
        if there != here:
            raise Misfit(
                f"checkpoint {folder} does not fit the model of this config ({item}/{name}: "
                f"{there} there, {here} here); use the config that made it, or a new workdir"
            )


def check_contents(folder: epath.Path, item: str, record: dict[str, Any], tree: Any) -> None:
    """Raises Damaged naming the first array whose contents are not those that were saved."""
    found = checksums.of_tree(tree)
    for name, (_, checksum) in record["items"][item].items():
        if found.get(name) != checksum:
            raise Damaged(f"{folder}: {item}/{name} holds other values than were saved")


def is_damage(error: Exception) -> bool:
    """Whether an error in reading says something of the contents, and not of the way to them."""
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return True
    if isinstance(error, (OSError, MemoryError)) or storage.is_of_network(error):
        return False
    return not any(word in str(error) for word in UNREACHABLE)
