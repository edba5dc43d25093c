"""How a command that trains ends where a run does not: one line and a status."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from coca_jax.checkpoints import manager
from coca_jax.runtime import signals
from coca_jax.training import replicas


@contextlib.contextmanager
def exit_on_known_errors() -> Iterator[None]:
    """Within it a run may end. One that was asked to stop and saved itself ends the process with
    the line that says so, of process 0 alone, and EXIT_AGAIN; one whose last save failed, or whose
    devices differ, with an error and 1."""
    try:
        yield
    except (replicas.Corrupted, manager.SaveFailed) as error:
        signals.leave(f"error: {error}", 1)
    except signals.Preempted as stop:
        first = jax.process_index() == 0
        if jax.process_count() > 1:
            jax.distributed.shutdown()  # together: the first to go would take the others down
        signals.leave(str(stop) if first else "", signals.EXIT_AGAIN)
