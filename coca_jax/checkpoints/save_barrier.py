"""Where the processes of a run meet while a checkpoint is written behind the steps.

Orbax has three such places in a save: all have written, process 0 has put the checkpoint in its
place, the save is over. A process that could not write skips the first two and waits at the third
for the others, which wait for it at the first: all of them for twenty minutes, and then without the
reason. Here each says where it is, so those that wait for one that comes no more hear why.
"""

from __future__ import annotations

import itertools
import sys

import jax
import orbax.checkpoint as ocp

from coca_jax.checkpoints.saved_items import first_line
from coca_jax.machine import processes

# Of Orbax's names, those that a process skips whose part of the save has failed.
SKIPPED = ("async_write_complete", "async_commit_complete")

_managers = itertools.count()  # which all processes open in one order


class FailedElsewhere(RuntimeError):
    """Another process could not write its part of a checkpoint."""


class Barrier:
    """Orbax's `BarrierSyncFn` of one checkpoint manager, which calls it in one thread at a time."""

    def __init__(self) -> None:
        self._name = f"coca_jax/saves/{next(_managers)}"
        self._rounds = itertools.count()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Returns once all processes are at `key`.

        Raises FailedElsewhere with what one of them said that has skipped this place. That one
        waits on, for those to whom this happened: they come to where it is.
        """
        skipped = any(name in key for name in SKIPPED)
        while True:
            number = next(self._rounds)
            said = processes.meet(f"{self._name}/{number}", {key: _failure()}, timeout_ms)
            processes.forget(f"{self._name}/{number - 1}")
            others = [text for name, text in said.items() if name != key]
            if not others:
                return
            if skipped or len(said) > 2:
                raise FailedElsewhere(others[0] or "another process could not write its part")


def _failure() -> str:
    """What ended this process's part of the save: Orbax comes here while it handles that."""
    error = sys.exception()
    return "" if error is None else f"process {jax.process_index()}: {first_line(error)}"


def options() -> ocp.options.AsyncOptions:
    """For a new checkpoint manager; all processes of a run call it."""
    if jax.process_count() == 1:
        return ocp.options.AsyncOptions()
    return ocp.options.AsyncOptions(barrier_sync_fn=Barrier())
