"""How a command that trains ends where a run does not: one line and a status."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from coca_jax.checkpoints import checkpointing
from coca_jax.training import replicas, stopping


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Within it a run may end. One that was asked to stop and saved itself ends the process with
    the line that says so, of process 0 alone, and EXIT_AGAIN; one whose last save failed, or whose
    devices differ, with an error and 1."""
    try:
        yield
    except (replicas.Corrupted, checkpointing.SaveFailed) as error:
        stopping.leave(f"error: {error}", 1)
    except stopping.Preempted as stop:
        first = jax.process_index() == 0
        if jax.process_count() > 1:
            jax.distributed.shutdown()  # together: the first to go would take the others down
        stopping.leave(str(stop) if first else "", stopping.EXIT_AGAIN)
