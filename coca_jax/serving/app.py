"""The server's application: the page, the API, what watches it."""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import coca_jax
from coca_jax.config import Entry
from coca_jax.data import kinds
from coca_jax.serving import endpoints, forms, openapi
from coca_jax.serving.batcher import Batcher
from coca_jax.serving.endpoints import ENDPOINTS, PICTURES, Endpoint, Server
from coca_jax.serving.guard import Guard
from coca_jax.serving.numbers import Numbers
from coca_jax.serving.refusals import Refused, answer_refused
from coca_jax.serving.reopening import Reopened
from coca_jax.serving.uploads import Decoder, Limits

# The page: these files and no others, read once.
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/serve.css": ("serve.css", "text/css; charset=utf-8"),
    "/pictures.js": ("pictures.js", "text/javascript; charset=utf-8"),
    "/serve.js": ("serve.js", "text/javascript; charset=utf-8"),
}


def build(
    model: Any,
    *,
    name: str,
    index: Any = None,
    key: str = "",
    loopback: bool = True,
    public_name: str = "",
    batch_size: int = 16,
    wait: float = 0.005,
    depth: int = 1024,
    limits: Limits | None = None,
) -> tuple[ASGIApp, Batcher, Numbers]:
    """The application, the thread that runs the model, and its counters.

    model: what `coca_jax.load` returns; name: how the page calls it. index: a
    searching.index.Index of this model. key, loopback, public_name: see guard.Guard. batch_size,
    wait, depth: see batcher.Batcher; depth also of uploads.Decoder.
    """
    limits = limits or Limits()
    routes = {"/healthz", "/metrics", "/openapi.json", "/api/info", *PAGE}
    numbers = Numbers(frozenset(routes | {one.path for one in ENDPOINTS}), PICTURES)
    batcher = Batcher(model, batch_size=batch_size, wait=wait, depth=depth, seen=numbers.batch)
    decoder = Decoder(depth)
    numbers.waiting(lambda: decoder.waiting + batcher.waiting)
    server = Server(model, batcher, limits, Reopened(index, model), decoder)
    about = _about(server, name)
    files = importlib.resources.files("coca_jax.serving") / "page"

    async def health(_: Request) -> Response:
        good = batcher.alive
        return JSONResponse(dict(status="ok" if good else "stopping"), 200 if good else 503)

    async def metrics(_: Request) -> Response:
        text, content_type = numbers.text()
        return Response(text, headers={"Content-Type": content_type})

    async def info(_: Request) -> Response:
        index = await server.index.now()
        return JSONResponse(about | dict(index=index and dict(pictures=len(index.names))))

    async def description(_: Request) -> Response:
        return JSONResponse(openapi.document(bool(key)))

    app = Starlette(
        routes=[
            *(Route(path, _file(files / file, kind)) for path, (file, kind) in PAGE.items()),
            *(Route(one.path, _endpoint(one, server), methods=["POST"]) for one in ENDPOINTS),
            Route(f"{PICTURES}{{row}}", functools.partial(endpoints.picture, server)),
            Route("/api/info", info),
            Route("/openapi.json", description),
            Route("/healthz", health),
            Route("/metrics", metrics),
        ],
        exception_handlers=_HANDLERS,
    )
    who: dict[str, Any] = dict(key=key, loopback=loopback, public_name=public_name)
    guard = Guard(app, **who, most=limits.bytes, seen=numbers.request)
    return guard, batcher, numbers


def _file(path: Any, kind: str) -> Any:
    data = path.read_bytes()

    async def answer(_: Request) -> Response:
        return Response(data, media_type=kind)

    return answer


def _endpoint(endpoint: Endpoint, server: Server) -> Any:
    async def answer(request: Request) -> Response:
        return await endpoint.respond(server, request)

    return answer


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {
        404: f"{request.url.path[:80]}: no such address; /openapi.json lists them",
        405: f"{request.method} is not answered here; /openapi.json says what is",
    }
    text = texts.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    return Refused(error.status_code, text, headers).response()


async def _defect(_: Request, error: Exception) -> Response:
    """Starlette logs the traceback; whoever asked learns nothing of it."""
    return Refused(500, "it failed here; the server's log says why").response()


_HANDLERS = {Refused: answer_refused, HTTPException: _http_error, Exception: _defect}


def _about(server: Server, name: str) -> dict[str, Any]:
    model, config, limits = server.model, server.model.config, server.limits
    sources = config.data.sources
    kind = model.head_kind
    return dict(
        name=name,
        version=coca_jax.__version__,
        image_size=model.image_size,
        resize=model.resize,
        num_frames=model.num_frames,
        max_tokens=model.max_len,
        embedding=config.model.embed_dim,
        captions=model.writes_captions,
        explains=model.writes_captions and model.explains,
        head=None
        if kind is None
        else dict(
            kind=kind.name,
            images=kind.images,
            reads_text=kind.reads_text,
            classes=len(model.class_names),
        ),
        answers=any(kinds.of(Entry.of(one)).asks for one in sources),
        limits=dict(
            bytes=limits.bytes,
            pixels=limits.pixels,
            images=limits.images,
            labels=endpoints.MOST_LABELS,
            characters=forms.LONGEST,
            fields={one.path: found for one in ENDPOINTS if (found := forms.bounds(one.fields))},
        ),
    )
