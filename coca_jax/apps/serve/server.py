"""Runs the application with uvicorn: who may ask, slow clients, signals and the end."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import prometheus_client
import uvicorn
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from coca_jax.runtime import storage
from coca_jax.runtime.signals import AT_ONCE, SAME_KEY

HEADER_SECONDS = 20.0  # from a connection, or the last answer, to the end of a request's headers
MAX_CONNECTIONS = 1000
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
COOKIE = "coca_jax_key"
# Only the page's own files, no frame around it; pictures also from what the user chose.
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; media-src blob:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """An ASGI application around another: refuses, adds headers, counts.

    Args:
        key: that requests below /api and to /metrics must bring, as a bearer token or in the cookie
            that the first of them sets; '': none.
        loopback: answer only requests for this machine by its loopback names, so that no other site
            reaches it under a name of its own (DNS rebinding).
        public_name: of a proxy before it, under which it may be asked too.
        seconds: for sending a request's body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str,
        loopback: bool,
        public_name: str,
        seconds: float,
        metrics: prometheus_client.CollectorRegistry,
    ):
        hosts = [*LOOPBACK, public_name or LOOPBACK[0]] if loopback else ["*"]
        self._app = TrustedHostMiddleware(app, hosts, www_redirect=False)
        self._key, self._public, self._seconds = key.encode(), public_name.lower(), seconds
        self._cookie = hashlib.sha256(self._key).hexdigest()
        self._requests = prometheus_client.Counter(
            "coca_jax_requests", "Requests answered.", ("path", "status"), registry=metrics
        )
        self._latency = prometheus_client.Histogram(
            "coca_jax_request_seconds", "From request to answer.", ("path",), registry=metrics
        )
        self.answered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0
        deadline: float | None = asyncio.get_running_loop().time() + self._seconds

        async def receive_in_time() -> Message:
            nonlocal deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"Not sent within {self._seconds:g} seconds.") from None
            if not message.get("more_body"):
                deadline = None  # from here on it waits for the end of the connection
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = [*message.get("headers", [])]
                names = {name.lower() for name, _ in given}
                own = {name: text for name, text in HEADERS.items() if name.encode() not in names}
                if self._key and scope["path"] == "/api/info" and status == 200:
                    own["set-cookie"] = f"{COOKIE}={self._cookie}; HttpOnly; SameSite=Strict"
                pairs = [(name.encode(), text.encode("latin-1")) for name, text in own.items()]
                message["headers"] = given + pairs
            await send(message)

        try:
            self._check(Request(scope))
            await self._app(scope, receive_in_time, send_with_headers)
        except HTTPException as error:
            answer = JSONResponse({"detail": error.detail}, error.status_code, error.headers)
            await answer(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # --grace is over
            if not status:
                answer = JSONResponse({"detail": "The server is stopping."}, 503)
                await answer(scope, receive, send_with_headers)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.answered += 1
            self._requests.labels(path, str(status or 500)).inc()
            self._latency.labels(path).observe(time.monotonic() - start)

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "")
        asking = request.headers.get("origin", f"://{host}").partition("://")[2]
        if asking != host and (not self._public or asking.partition(":")[0] != self._public):
            raise HTTPException(403, "Pages of other sites may not use this server.")
        if not self._key or not request.url.path.startswith(("/api/", "/metrics")):
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        has_key = kind.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode(), self._key
        )
        cookie = request.cookies.get(COOKIE, "")
        if not has_key and not hmac.compare_digest(cookie.encode(), self._cookie.encode()):
            raise HTTPException(
                401,
                "A key is needed. Send the header 'Authorization: Bearer KEY'.",
                {"WWW-Authenticate": "Bearer"},
            )


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol. Closes connections that don't send a request's headers in time,
    which uvicorn itself lets wait forever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._restart()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering():
            self._stop()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._answering():  # else the next request was already there
            self._restart()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _restart(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class _Server(uvicorn.Server):
    """Ends after the first SIGINT or SIGTERM when open requests are answered, at once with status
    130 after a second one. Two within SAME_KEY are one: `uv run` and others pass a Ctrl-C on."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready
        self.asked = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self.should_exit = time.monotonic(), True
        elif time.monotonic() - self.asked > SAME_KEY:
            os._exit(AT_ONCE)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any free one. Raises ValueError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host={host} --port={port}: cannot listen there ({error}). Give another --port."
        ) from None


def url(listening: socket.socket) -> str:
    """Its address for a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def config(app: ASGIApp, grace: int = 10) -> uvicorn.Config:
    """uvicorn's settings."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=grace,
        timeout_keep_alive=int(HEADER_SECONDS),
        h11_max_incomplete_event_size=64 << 10,
        limit_concurrency=storage.most_open(0.5, MAX_CONNECTIONS),
        http=TimedProtocol,
        ws="none",
    )


def serve(
    app: ASGIApp, listening: socket.socket, *, grace: int, ready: Callable[[], None]
) -> float:
    """Serves until SIGINT or SIGTERM, see _Server. Runs in the main thread.

    ready: called once it serves. Returns the rest of the grace, in seconds. Raises RuntimeError if
    it does not start.
    """
    server = _Server(config(app, grace), ready)
    server.run(sockets=[listening])
    if not server.started:
        raise RuntimeError("the server did not start")
    return max(server.asked + grace - time.monotonic(), 0.0)
