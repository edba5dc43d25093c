"""Connections that ask for nothing: each has some seconds, and makes room where there are many."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# From a connection, or the first byte of its next request, to the end of the headers.
SECONDS = 20.0
MOST = 1000  # connections at a time, and half of the files that the process may have open at most


def protocol(seconds: float, most: int) -> type[H11Protocol]:
    """uvicorn's protocol, which knows no such limits itself.

    A connection is closed that has not sent the headers of a request within `seconds`. Where one
    more than `most` comes, that one is closed which has asked for nothing for the longest time,
    the new one where all others wait for an answer.
    """

    silent: dict[Limited, None] = {}  # that ask for nothing, the longest silent first

    class Limited(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            silent[self] = None
            self._wait()
            if len(self.connections) > most:
                longest = next(iter(silent))
                del silent[longest]
                longest.transport.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self._is_silent():
                silent.pop(self, None)
                self._stop_waiting()
            elif self._late is None:
                self._wait()  # for the rest of the headers of a second request

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._is_silent() and not self.transport.is_closing():
                silent[self] = None

        def connection_lost(self, exc: Exception | None) -> None:
            silent.pop(self, None)
            self._stop_waiting()
            super().connection_lost(exc)

        def _is_silent(self) -> bool:
            """Whether no request of it waits for an answer."""
            return self.cycle is None or self.cycle.response_complete

        def _wait(self) -> None:
            self._late = self.loop.call_later(seconds, self.transport.abort)

        def _stop_waiting(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Limited
