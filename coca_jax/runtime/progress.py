"""Bars for long work of counted parts, on standard error: on a terminal tqdm's, else a line at
times, as a file that keeps it is read line by line."""

from __future__ import annotations

import sys
import time

import tqdm

LINE_EVERY = 30.0  # seconds between two lines where there is no terminal


class Bar:
    """Counts what is done, of what is called `unit`.

    Args:
        total: how many there are; None: nobody knows.
        unit: what they are, in the plural; '' where `what` says it.
        what: is done with them.
        shown: False for a count that nobody sees.
        thousands: shows 1234567 as 1.23M.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        what: str = "",
        *,
        shown: bool = True,
        thousands: bool = False,
    ):
        terminal = sys.stderr.isatty()
        self._lines = shown and not terminal
        self._total, self._unit, self._what, self._thousands = total, unit, what, thousands
        self._done, self._began = 0, time.monotonic()
        self._printed, self._at = -1, self._began  # what the last line said, and when
        self._bar = tqdm.tqdm(
            total=total,
            unit=f" {unit}" if unit else "it",
            desc=what or None,
            disable=not (shown and terminal),
            unit_scale=thousands,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self._bar.update(count)
        self._done += count
        if self._lines and time.monotonic() - self._at >= LINE_EVERY:
            self._print()

    def _print(self) -> None:
        self._printed, self._at = self._done, time.monotonic()
        size = tqdm.tqdm.format_sizeof if self._thousands else "{:,}".format
        shown = size(self._done) + (f" of {size(self._total)}" if self._total else "")
        shown += f" {self._unit}" if self._unit else ""
        took = tqdm.tqdm.format_interval(self._at - self._began)
        what = f"{self._what}: " if self._what else ""
        print(f"{what}{shown} in {took}", file=sys.stderr, flush=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._lines and self._printed not in (
            -1,
            self._done,
        ):  # work that was short tells nothing
            self._print()
