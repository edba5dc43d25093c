"""Who may ask, and how much: stands before everything else that answers a request."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

# Connections that ask for nothing: each has some seconds, and makes room where there are many.


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


# What the server counts, for Prometheus.


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Numbers:
    """Counters of one server. routes: the paths that there are; folder: what is below it counts as
    one; others count as 'other'."""

    def __init__(self, routes: frozenset[str], folder: str) -> None:
        self._routes, self._folder, self.answered = routes, folder, 0
        self._registry = CollectorRegistry()
        own: dict[str, Any] = dict(registry=self._registry)
        labels = ("path", "status")
        self._requests = Counter("coca_jax_requests", "Requests answered.", labels, **own)
        self._seconds = Histogram(
            "coca_jax_request_seconds",
            "From a request to its answer.",
            ("path",),
            buckets=_SECONDS,
            **own,
        )
        self._sizes = Histogram(
            "coca_jax_batch_items", "Items that ran together.", buckets=_SIZES, **own
        )
        self._waiting = Gauge(
            "coca_jax_waiting_items", "Items that wait to be decoded, or for a batch.", **own
        )

    def waiting(self, count: Callable[[], int]) -> None:
        """Where the number of waiting items is read."""
        self._waiting.set_function(count)

    def request(self, path: str, status: int, seconds: float) -> None:
        """One request was answered."""
        if path not in self._routes:
            path = self._folder if path.startswith(self._folder) else "other"
        self.answered += 1
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, size: int) -> None:
        """A batch of so many items was run."""
        self._sizes.observe(size)

    def text(self) -> tuple[bytes, str]:
        """All of them, and their content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4


# What a request is told that cannot be answered.


STOPPING = "the server is stopping; ask again later"


class Refused(Exception):
    """A request that is not answered. status: of HTTP; text: one sentence for whoever asked."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None):
        super().__init__(text)
        self.status, self.text, self.headers = status, " ".join(text.split()), headers

    def response(self) -> Response:
        """{"error": text}."""
        return JSONResponse({"error": self.text}, self.status, self.headers)


def check_room(new: int, there: int, most: int) -> None:
    """Raises Refused where `new` pictures or texts do not fit beside those `there`, `most` in all:
    400 where they never would, else 503."""
    if new > most:
        told = f"{new} pictures or texts; at most {most} are taken at a time (--queue)"
        raise Refused(400, f"{told}: send fewer")
    if there + new > most:
        raise Refused(503, "too many requests wait; ask again later", {"Retry-After": "1"})


async def answer_refused(_: Request, error: Exception) -> Response:
    """A handler of Starlette's."""
    assert isinstance(error, Refused)
    return error.response()


# Nothing but the page's own files, no frame around it; pictures also from what the user chose.
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; media-src blob:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}
_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
_DISCARD_BYTES, _DISCARD_SECONDS = 1 << 28, 10
OPEN = ("/", "/serve.css", "/pictures.js", "/serve.js", "/healthz")  # hold nothing of the model


class Guard:
    """An ASGI application around another.

    Args:
        app: what answers.
        key: that requests must bring as `Authorization: Bearer KEY`; '': none.
        loopback: whether requests must be meant for this machine by their Host header, so that no
            page of somebody else's reaches it under a name of its own (DNS rebinding).
        public_name: of the proxy before it, under which it may be asked too, and its page ask.
        most: bytes of a request at most.
        seen: called with path, status and seconds of each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str,
        loopback: bool,
        most: int,
        seen: Callable[[str, int, float], None],
        public_name: str = "",
    ):
        self._app, self._key, self._loopback = app, key.encode(), loopback
        self._public = public_name.lower()
        self._most, self._seen = most, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, body = time.monotonic(), 0, _Body(receive, self._most)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = message.get("headers", [])
                names = {name for name, _ in given}
                own = [pair for pair in _HEADERS if pair[0] not in names]
                message["headers"] = [*given, *own]
                if status >= 400 and status != 408:
                    await body.discard()
            await send(message)

        try:
            self._check(Request(scope))
            await self._app(scope, body.receive, send_with_headers)
        except Refused as refused:
            await refused.response()(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # no time is left at the end
            body.give_up()
            if not status:
                await Refused(503, STOPPING).response()(scope, receive, send_with_headers)
        finally:
            self._seen(scope["path"], status or 500, time.monotonic() - begun)

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "")
        if self._loopback and not is_loopback(_host(host)) and not self._is_public(host):
            raise Refused(403, f"Host: {host[:80]}: this server answers to localhost alone")
        origin = request.headers.get("origin", "")
        asking = origin.partition("://")[2]
        if origin and asking != host and not self._is_public(asking):
            raise Refused(403, f"Origin: {origin[:80]}: pages of other sites may not ask this one")
        if self._key and request.url.path not in OPEN:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self._key)
            if kind.lower() != "bearer" or not right:
                raise Refused(
                    401,
                    "this server wants its key: send the header 'Authorization: Bearer KEY'",
                    {"WWW-Authenticate": "Bearer"},
                )
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most:
            raise _too_large(self._most)

    def _is_public(self, host: str) -> bool:
        return bool(self._public) and _host(host) == self._public


class _Body:
    """The body of a request: not more than `most` bytes of it are read."""

    def __init__(self, receive: Receive, most: int):
        self._receive, self._most = receive, most
        self._read, self._whole = 0, False

    async def receive(self) -> Message:
        """See ASGI. Raises Refused, 413."""
        message = await self._receive()
        self._read += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._read > self._most:
            raise _too_large(self._most)
        return message

    def give_up(self) -> None:
        """What still comes is not waited for."""
        self._whole = True

    async def discard(self) -> None:
        """Throws away what still comes of a request that is refused, within bounds: a client that
        is cut off while it sends would see no answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while not self._whole and self._read < _DISCARD_BYTES:
                    with contextlib.suppress(Refused):
                        await self.receive()


def _too_large(most: int) -> Refused:
    return Refused(
        413, f"the request is larger than {most >> 20} MiB; send fewer or smaller pictures"
    )


def _host(text: str) -> str:
    """Of 'host:port', the host; '' for what is none."""
    try:
        return urlsplit(f"//{text}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, for this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
