"""One part of a checkpoint, such as its parameters: read, and compared with what was saved."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from coca_jax.checkpoints import verify
from coca_jax.checkpoints.verify import Damaged
from coca_jax.runtime import storage


def read_item(folder: epath.Path, item: str, target: Any) -> Any:
    """One part of the checkpoint `folder`, into the shapes and shardings of `target`, checked. All
    processes call it, and all come to the end of `restore`.

    Raises as `restore`, and Damaged for contents that are not those that were saved.
    """
    tree = restore(folder, item, target)
    check(folder, item, tree)
    return tree


def restore(folder: epath.Path, item: str, target: Any) -> Any:
    """`read` without the comparison of contents: no process waits for another one in it.

    Raises Misfit for another tree or other shapes, Damaged for what is no item, OSError where
    storage does not answer.
    """
    arrays = verify.read_record(folder)["items"].get(item, {})
    stored = {name: shape for name, (shape, _) in arrays.items()}
    verify.check_fits(folder, item, stored, target)
    ignore_late_answers()
    with _reading(folder / item) as handler:
        tree = handler.restore(folder / item, args=ocp.args.StandardRestore(target))
        jax.block_until_ready(tree)
    return tree


def check(folder: epath.Path, item: str, tree: Any) -> None:
    """Raises Damaged, on all processes or on none, where values are not those that were saved. All
    processes call it: the checksum of an array that is spread over them is computed by all."""
    verify.check_contents(folder, item, verify.read_record(folder), tree)


@functools.cache
def ignore_late_answers() -> None:
    """When one array of many cannot be read or written, Orbax closes its event loop; the others
    then fail, and the interpreter prints a traceback for each. From now on it prints none of
    these."""
    former = sys.unraisablehook

    def hook(found: Any) -> None:
        late = isinstance(found.exc_value, RuntimeError)
        if not (late and "Event loop is closed" in str(found.exc_value)):
            former(found)

    sys.unraisablehook = hook


def metadata(folder: epath.Path, item: str) -> Any:
    """The abstract arrays that an item holds, as Orbax noted them."""
    with _reading(folder / item) as handler:
        found = handler.metadata(folder / item)
        return getattr(found, "tree", found)


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[ocp.StandardCheckpointHandler]:
    """What reads an item. Raises Damaged where what it holds is no item, OSError where a store or
    the machine does not give it."""
    handler = ocp.StandardCheckpointHandler()
    try:
        yield handler
    except Exception as error:
        if not verify.is_damage(error):
            raise OSError(f"{path} cannot be read: {first_line(error)}") from error
        raise Damaged(f"{path} cannot be read: a file is truncated, missing or changed") from error
    finally:
        handler.close()


# Where Orbax and TensorStore begin to show their own objects.
_INSIDES = re.compile(r"\.? See full TensorStore details|,? \[(?:tensorstore_spec|source)")


def first_line(error: BaseException) -> str:
    """What an error tells, in one line: of a chain of errors, as TensorStore writes them, the kind
    and the innermost one; of one that shows TensorStore's objects, what caused it."""
    if storage.is_disk_full(error):
        return "the disk is full"
    while "See full TensorStore details" in str(error) and error.__cause__ is not None:
        error = error.__cause__
    name = type(error).__name__
    line = _INSIDES.split(str(error).partition("\n")[0])[0]
    kind = re.match("[A-Z_]+: (?=Error )", line)
    if kind:
        line = kind[0] + "Error " + line.rpartition(": Error ")[2]
    return f"{name}: {line}"[:300] if line else name
