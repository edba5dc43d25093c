"""Stopping a run from outside: the signal, the steps until which it may go on, the exit status."""

from __future__ import annotations

import signal
import threading

import jax
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the launchers start the run again


class Preempted(Exception):
    """The run saved itself because it was asked to stop."""

    def __init__(self, step: int):
        super().__init__(f"asked to stop: saved step {step}; run the same command to go on")


class Stop:
    """Tells, once a step, whether the platform asks this run to stop (SIGTERM)."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())

    def reached(self, step: int) -> bool:
        """The same answer on every process for the same step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()

    def close(self) -> None:
        """Gives the signal back to its former handler."""
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)
