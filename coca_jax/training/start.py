"""What a command that trains does before all else, even before its imports."""

from __future__ import annotations

from coca_jax import freed_memory
from coca_jax.training import stopping


def begin() -> None:
    """Keeps the memory of a step for the next one, and watches the signals that end a run; in this
    order, for a thread that was there before would have an arena of its own."""
    freed_memory.keep()
    stopping.install()
