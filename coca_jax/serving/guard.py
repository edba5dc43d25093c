"""Who may ask, and how much: stands before everything else that answers a request."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coca_jax.serving.refusals import STOPPING, Refused

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
