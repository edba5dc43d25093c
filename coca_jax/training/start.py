"""What a command that trains does before all else, even before its imports."""

from __future__ import annotations

from coca_jax import freed_memory
from coca_jax.training import stopping


def begin() -> None:
    """Makes way for steps that keep their memory, and watches the signals that end a run; in this
    order, for that starts a thread."""
    freed_memory.begin()
    stopping.install()
