"""What process 0 writes of an evaluation: where it cannot, all hear of it at one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from coca_jax.machine import processes


class NotWritten(OSError):
    """Process 0 could not write what an evaluation found; all processes raise it together."""


@dataclasses.dataclass
class Writing:
    """Writes of the process that does so (`main_process`) of `count`, each a function without
    arguments.

    One process raises what fails at once. Of several, process 0 goes on, as the others expect it in
    the next program, and writes no more; `agree` is where all raise.
    """

    main_process: bool = False
    count: int = 1
    problem: str = ""

    def __call__(self, work: Callable[[], object]) -> None:
        """Does the work on the process that writes."""
        if not self.main_process or self.problem:
            return
        try:
            work()
        except OSError as error:
            if self.count == 1:
                raise
            self.problem = str(error)

    def agree(self) -> None:
        """All processes come here. Raises NotWritten on all of them, with what failed since the
        start."""
        if self.count == 1:
            return
        if line := processes.agreed("scores", self.problem):
            raise NotWritten(line)
