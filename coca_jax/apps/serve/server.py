"""A server from its first request to its last: starts, waits for a signal, ends in order."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from coca_jax.apps.serve import limits
from coca_jax.runtime import storage
from coca_jax.runtime.signals import AT_ONCE, SAME_KEY


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: any that is free. Raises ValueError where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host={host} --port={port}: cannot listen there ({error}); give another --port"
        ) from None


def url(listening: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: ASGIApp, listening: socket.socket, *, grace: int, ready: Callable[[], None]
) -> float:
    """Answers until SIGINT (Ctrl-C) or SIGTERM, then takes no more requests and ends when those
    that it has are answered, or after `grace` seconds. A second signal ends the process at once,
    with status 130, but for one within SAME_KEY of the first. Runs in the main thread.

    ready: called when it answers. Returns what is left of the grace, in seconds. Raises
    RuntimeError where it does not start.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=grace,
        timeout_keep_alive=20,
        h11_max_incomplete_event_size=64 << 10,
        lifespan="off",
        http=limits.protocol(limits.SECONDS, storage.most_open(0.5, limits.MOST)),
    )
    server = uvicorn.Server(config)
    asked, end = threading.Event(), math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal end
        now = time.monotonic()
        if not asked.is_set():
            end = now + grace
            asked.set()
        elif now - (end - grace) > SAME_KEY:
            os._exit(AT_ONCE)

    # Signals come here from now on, and no longer to what ends a command that is doing something.
    signal.set_wakeup_fd(-1)
    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=server.run, args=([listening],), name="server")
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            thread.join(0.02)
        if not server.started:
            raise RuntimeError("the server did not start")
        ready()
        while thread.is_alive() and not asked.wait(0.5):
            pass
    finally:
        server.should_exit = True
        thread.join()
        for number, handler in former.items():
            signal.signal(number, handler)
    return min(max(end - time.monotonic(), 0.0), float(grace))
