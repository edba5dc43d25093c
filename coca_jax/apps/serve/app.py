"""The server's application: the page, the API, what watches it."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib.resources
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
from absl import logging
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

import coca_jax
from coca_jax.apps.search.index import Index, mixed, stamp
from coca_jax.apps.serve import batcher, schemas
from coca_jax.apps.serve.batcher import Batcher
from coca_jax.apps.serve.limits import STOPPING, Guard, Numbers, Refused, answer_refused
from coca_jax.apps.serve.schemas import Decoder, Field, Limits
from coca_jax.config import Entry
from coca_jax.data import supervision
from coca_jax.data.prompts import PHOTO
from coca_jax.runtime import storage

# An index that is served while others write to its folder.


SECONDS = 5.0  # between two looks at the folder


class Reopened:
    """An index, opened again where its folder has changed.

    index: a searching.index.Index, or None; model: what made it.
    """

    def __init__(self, index: Any, model: Any):
        self._index, self._model = index, model
        self._stamp = getattr(index, "stamp", None)
        self._looked = time.monotonic()

    async def now(self) -> Any:
        """The index as it is now, or was some seconds ago; None for none. While a changed one is
        read, and where it cannot be, other requests get the one before."""
        if self._index is not None and time.monotonic() - self._looked >= SECONDS:
            self._looked = time.monotonic()
            await run_in_threadpool(self._look)
        return self._index

    def _look(self) -> None:
        folder, found = self._index.folder, self._stamp
        try:
            with storage.as_os_error(folder, "cannot be read"):
                found = stamp(folder)
                if found in (None, self._stamp):
                    return
                index = Index(folder)
            index.check(self._model)
            self._index = index
        except (OSError, ValueError) as error:
            logging.warning("--index is served as it was before it changed: %s", error)
            if isinstance(error, OSError):  # the same folder may be read at the next look
                return
        self._stamp = found


# What can be asked over HTTP: each endpoint, its fields, and what it answers.


MOST_LABELS = 1000
PICTURES = "/api/pictures/"  # before a row of the index
SIDES = (320, 1280)  # of pictures of the index

Values = dict[str, Any]
_T = TypeVar("_T")


@dataclasses.dataclass
class Server:
    """What endpoints share."""

    model: Any
    batcher: Batcher
    limits: Limits
    index: Reopened
    decoder: Decoder


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An address that takes a form. about: what it does; example: of its answer."""

    path: str
    about: str
    fields: Sequence[Field]
    answer: Callable[[Server, Values], Awaitable[Any]]
    example: Any

    async def respond(self, server: Server, request: Request) -> Response:
        """The answer to a request. Raises Refused."""
        try:
            async with asyncio.timeout(server.limits.seconds):
                form = await schemas.sent(request)
        except TimeoutError:
            raise Refused(408, f"not sent within {server.limits.seconds} s") from None
        try:
            answer = await _while_heard(request, self._answer(server, form))
        except ValueError as error:
            raise Refused(400, str(error)) from None
        finally:
            await form.close()
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    async def _answer(self, server: Server, form: FormData) -> Any:
        values = schemas.read_form(self.fields, form)
        pictures = values.get("image", [])
        if len(pictures) > server.limits.images:
            raise Refused(400, f"more than {server.limits.images} pictures; send fewer")
        values["image"] = await schemas.read_images(
            server.model, pictures, server.limits, server.decoder
        )
        return await self.answer(server, values)


async def _while_heard(request: Request, answer: Coroutine[Any, Any, _T]) -> _T:
    """The answer to a request that was read. Where its client hangs up it is given up, so that what
    waits for the model is not computed for nobody before what others wait for. Raises Refused."""
    answering = asyncio.ensure_future(answer)
    alone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait([answering, alone], return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():  # nobody reads this
            raise Refused(400, "the client hung up before it was answered")
        return answering.result()
    finally:
        alone.cancel()
        answering.cancel()
        # Until it has ended it may use the form's files.
        await asyncio.gather(answering, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    """Ends when the client has hung up; no part of the request is left to come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


IMAGE = Field(
    "image", "A picture, or a clip for a model of clips; may be repeated.", UploadFile, many=True
)
PROMPT = Field("prompt", "How the captions begin.", default="")
WEIGHT: dict[str, Any] = dict(type=float, default=1.0, low=-100, high=100)


def _pictures(values: Values) -> list[np.ndarray]:
    if not values["image"]:
        raise Refused(400, "image is missing: send at least one picture as the field 'image'")
    return values["image"]


def _check_writes(server: Server) -> None:
    if not server.model.writes_captions:
        raise Refused(404, "this model has no decoder and writes no texts; ask /api/zero_shot")


def _check_explains(server: Server) -> None:
    _check_writes(server)
    if not server.model.explains:
        raise Refused(
            404,
            "this model takes pictures of any shape (data.resize='native') and cannot say where it "
            "looked; ask /api/caption without explain",
        )


async def caption(server: Server, values: Values) -> Any:
    """Captions; one picture's may be streamed."""
    _check_writes(server)
    settings, explain = schemas.settings(values), values["explain"]
    if explain:
        _check_explains(server)
    items = [(pixels, values["prompt"]) for pixels in _pictures(values)]
    if not values["stream"]:
        answers = await server.batcher.answers(batcher.Captions(settings, explain), items)
        return dict(results=answers)
    if len(items) > 1:
        raise Refused(400, f"stream: {len(items)} pictures; a stream is of one")
    work = batcher.Captions if settings.num_beams > 1 else batcher.StreamedCaptions
    events = server.batcher.stream(work(settings, explain), items[0])
    return StreamingResponse(_events(events), media_type="text/event-stream")


async def _events(answers: AsyncIterator[Any]) -> AsyncIterator[str]:
    """Server-sent events: 'tokens', then one 'result', or 'error'."""
    try:
        async for answer in answers:
            kind = "tokens" if "tokens" in answer else "result"
            yield f"event: {kind}\ndata: {json.dumps(answer)}\n\n"
    except (Exception, asyncio.CancelledError) as error:
        told = isinstance(error, (ValueError, Refused))
        text = " ".join(str(error).split()) if told else "it failed here"
        if isinstance(error, asyncio.CancelledError):  # no time is left at the end
            text = STOPPING
        yield f"event: error\ndata: {json.dumps(dict(error=text))}\n\n"


async def explain(server: Server, values: Values) -> Any:
    """A text's words beside each picture."""
    _check_explains(server)
    items = [(pixels, values["text"]) for pixels in _pictures(values)]
    return dict(results=await server.batcher.answers(batcher.Explain(), items))


async def zero_shot(server: Server, values: Values) -> Any:
    """Probabilities of labels."""
    given = [line.strip() for text in values["label"] for line in text.splitlines()]
    labels = tuple(dict.fromkeys(filter(None, given)))
    if labels:  # else it is said below that there are none
        _refuse_empty("label", values["label"])
    if not 2 <= len(labels) <= MOST_LABELS:
        raise Refused(400, f"label: {len(labels)} labels; give 2 to {MOST_LABELS}, one a line")
    longest = max(map(len, labels))
    if longest > schemas.LONGEST:
        raise Refused(400, f"label: {longest} characters; at most {schemas.LONGEST} each")
    template = values["template"]
    if template and template.count("{}") != 1:  # nor the name of a set, 80 sentences for each label
        told = f"template={template[:80]!r}: it must hold '{{}}' once, where the label goes"
        raise Refused(400, told)
    work = batcher.ZeroShot(labels, template)
    return dict(results=await server.batcher.answers(work, _pictures(values)))


async def head(server: Server, values: Values) -> Any:
    """Classes of the task head."""
    kind = server.model.head_kind
    if kind is None:
        raise Refused(404, "this model has no task head; ask /api/zero_shot for labels")
    pictures = _pictures(values)
    if kind.images > 1:
        if len(pictures) != kind.images:
            raise Refused(400, f"image: {len(pictures)} pictures; this head takes {kind.images}")
        pictures = [np.stack(pictures)]
    if kind.reads_text and not values["question"].strip():
        raise Refused(400, "question is missing: this head reads a question or statement")
    items = [(pixels, values["question"]) for pixels in pictures]
    return dict(results=await server.batcher.answers(batcher.Head(values["k"]), items))


async def answer(server: Server, values: Values) -> Any:
    """What the decoder writes behind a question."""
    _check_writes(server)
    items = [(pixels, values["question"]) for pixels in _pictures(values)]
    return dict(results=await server.batcher.answers(batcher.Answer(), items))


def _refuse_empty(name: str, texts: Sequence[str]) -> None:
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise Refused(400, f"{name}: number {number} of {len(texts)} is empty; leave it out")


async def embed(server: Server, values: Values) -> Any:
    """Embeddings."""
    _refuse_empty("text", values["text"])
    pictures, texts = await _embedded(server, values["image"], values["text"])
    if not pictures and not texts:
        raise Refused(400, "nothing to embed; send pictures as 'image' or texts as 'text'")
    return dict(
        images=[row.astype(float).tolist() for row in pictures],
        texts=[row.astype(float).tolist() for row, _ in texts],
        cut=[cut for _, cut in texts],
    )


async def _embedded(
    server: Server, pictures: list[np.ndarray], texts: list[str]
) -> tuple[list[np.ndarray], list[tuple[np.ndarray, bool]]]:
    return (
        await server.batcher.answers(batcher.EmbedImages(), pictures),
        await server.batcher.answers(batcher.EmbedTexts(), texts),
    )


async def search(server: Server, values: Values) -> Any:
    """The most similar pictures of the index."""
    index = await _index(server)
    like = [index.place(row) for row in values["like"]]
    texts = [text for text in values["text"] if text.strip()]
    pictures, found = await _embedded(server, values["image"], texts)
    words, cut = [row for row, _ in found], any(cut for _, cut in found)
    pictures += [index.embeddings[place].astype(np.float32) for place in like]
    if not pictures and not words:
        raise Refused(400, "nothing to look for; send text, image, or like")
    text_weight, image_weight = values["text_weight"], values["image_weight"]
    for name, weight, weighed in (("text", text_weight, words), ("image", image_weight, pictures)):
        if weight != WEIGHT["default"] and not weighed:
            raise Refused(400, f"{name}_weight={weight}: there is no {name} that it weighs")
    weights = [text_weight] * len(words) + [image_weight] * len(pictures)
    query = mixed(np.stack([*words, *pictures]), weights)
    nearest = await run_in_threadpool(index.search, query, values["k"])
    for one in nearest:  # names below the folder that all pictures are in: no paths of this machine
        one["image"] = one["image"][index.letters :]
        one["picture"] = f"{PICTURES}{one['row']}"
    return dict(results=nearest, cut=cut)


async def _index(server: Server) -> Any:
    index = await server.index.now()
    if index is None:
        raise Refused(404, "there is no index here; start with --index=DIR (coca-jax search index)")
    return index


async def picture(server: Server, request: Request) -> Response:
    """A picture of the index by its row, smaller: no path is taken from a request."""
    digits = request.path_params["row"]
    if not re.fullmatch("[0-9]{1,18}", digits):  # Python makes no number of thousands of them
        raise HTTPException(404)
    index, asked = await _index(server), int(digits)
    given = request.query_params.get("side", str(SIDES[0]))
    if given not in map(str, SIDES):
        raise Refused(400, f"side={given[:20]}: choose from {SIDES[0]} and {SIDES[1]}")
    try:
        row = index.place(asked)
    except ValueError as error:
        raise Refused(404, str(error)) from None
    try:
        shrink = functools.partial(schemas.smaller, index, row, int(given))
        [data] = await server.decoder.run([shrink])
    except (ValueError, OSError):
        raise Refused(
            404, f"picture {asked} cannot be shown: it lies in an archive, or was moved or changed"
        ) from None
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})


_WORD = dict(
    text="red", probability=0.97, alternatives=[dict(text="red", probability=0.97)],
    attention=[[0.25, 0.25], [0.25, 0.25]],
)  # fmt: skip
_CAPTION = dict(text="a red circle", log_prob=-0.41, finished=True)
QUESTION = Field("question", "The question, or statement, about each picture.")
ENDPOINTS = (
    Endpoint(
        "/api/caption",
        "Captions of pictures. With stream=true server-sent events: 'tokens' after each token "
        "(beams have none), then 'result' with what results[0] would be.",
        [
            IMAGE,
            PROMPT,
            Field("explain", "Words with probability and attention.", bool, False),
            Field("stream", "Of one picture, token by token.", bool, False),
            *schemas.SETTINGS,
        ],
        caption,
        dict(results=[dict(captions=[_CAPTION | dict(words=[_WORD])], attention=[[0.5, 0.5]])]),
    ),
    Endpoint(
        "/api/explain",
        "How probable each word of a text is beside each picture, and where the model looked.",
        [IMAGE, Field("text", "The text.")],
        explain,
        dict(results=[dict(captions=[_CAPTION | dict(words=[_WORD])], attention=[[0.5, 0.5]])]),
    ),
    Endpoint(
        "/api/zero_shot",
        "Probabilities of labels for each picture, without training; cut: a label in its sentence "
        "is longer than what the model reads.",
        [
            IMAGE,
            Field(
                "label",
                "A label, or several, one a line, those given twice once; may be repeated.",
                many=True,
                longest=100 * MOST_LABELS,
            ),
            Field(
                "template",
                "The sentence around a label, which stands for its {}; default: as of "
                f"model.zero_shot, the mean of {', '.join(map(repr, PHOTO))}.",
                default="",
            ),
        ],
        zero_shot,
        dict(results=[dict(labels=[dict(label="cat", probability=0.98)], cut=False)]),
    ),
    Endpoint(
        "/api/head",
        "The most probable classes of the task head, where the model has one; cut, of one that "
        "reads a question: it is longer than what the model reads of it.",
        [
            IMAGE,
            dataclasses.replace(QUESTION, default=""),
            Field("k", "Classes at most.", int, 5, 1, 1000),
        ],
        head,
        dict(results=[dict(labels=[dict(label="yes", probability=0.98)], cut=False)]),
    ),
    Endpoint(
        "/api/answer",
        "The answer that the decoder writes behind a question about each picture; cut: the "
        "question is longer than what the model reads of it.",
        [IMAGE, QUESTION],
        answer,
        dict(results=[dict(answer="red", cut=False)]),
    ),
    Endpoint(
        "/api/embed",
        "Embeddings of pictures and texts, of length 1; cut, of each text: it is longer than what "
        "the model reads of it.",
        [IMAGE, Field("text", "A text; may be repeated.", many=True)],
        embed,
        dict(images=[[0.6, 0.8]], texts=[[0.8, 0.6]], cut=[False]),
    ),
    Endpoint(
        "/api/search",
        "The pictures of the index that are most similar to texts and pictures together; cut: a "
        "text is longer than what the model reads of it.",
        [
            IMAGE,
            Field("text", "A text; may be repeated.", many=True),
            Field("like", "A row of the index as a picture; may be repeated.", int, many=True),
            Field("text_weight", "Of each text.", **WEIGHT),
            Field("image_weight", "Of each picture.", **WEIGHT),
            Field("k", "Pictures at most.", int, 24, 1, 200),
        ],
        search,
        dict(
            results=[
                dict(rank=1, row=7, image="photos/7.jpg", score=0.31, caption="a red circle",
                     picture="/api/pictures/7"),
            ],
            cut=False,
        ),
    ),
)  # fmt: skip


# The API's description (OpenAPI 3.1), made of what endpoints.py declares.


def document(locked: bool) -> dict[str, Any]:
    """locked: whether requests need the server's key."""
    paths: dict[str, Any] = {one.path: dict(post=_operation(one)) for one in ENDPOINTS}
    paths["/api/info"] = dict(get=_read("What the model is and can do, and the limits."))
    side = dict(type="integer", enum=list(SIDES), default=SIDES[0])
    picture = _read("A picture of the index, smaller, as JPEG.", "image/jpeg")
    picture["parameters"] = [
        {"name": "row", "in": "path", "required": True, "schema": dict(type="integer", minimum=0)},
        {"name": "side", "in": "query", "schema": side},
    ]
    paths["/api/pictures/{row}"] = dict(get=picture)
    paths["/healthz"] = dict(get=_read("200: it answers; 503: the thread of the model has ended."))
    paths["/metrics"] = dict(get=_read("Counters for Prometheus.", "text/plain"))
    found: dict[str, Any] = dict(
        openapi="3.1.0",
        info=dict(
            title="coca_jax",
            version=coca_jax.__version__,
            description="A contrastive captioner: captions, labels, questions, embeddings, search.",
        ),
        paths=paths,
        components=dict(schemas=dict(Error=_ERROR)),
    )
    if locked:
        found["components"]["securitySchemes"] = dict(key=dict(type="http", scheme="bearer"))
        found["security"] = [dict(key=[])]
    return found


_ERROR = dict(
    type="object",
    required=["error"],
    properties=dict(error=dict(type="string", description="What is wrong, in one sentence.")),
)
_REFUSALS = {
    "400": "A field or picture that cannot be.",
    "404": "Nothing of that kind here.",
    "408": "Not sent in time.",
    "413": "Too large.",
    "503": "Too many wait, or it is stopping.",
}


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": dict(schema={"$ref": "#/components/schemas/Error"})}
    refused = {k: dict(description=text, content=error) for k, text in _REFUSALS.items()}
    return {"200": dict(description="The answer.", content=content)} | refused


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    schema: dict[str, Any] = dict(
        type="object",
        properties={field.name: field.schema() for field in endpoint.fields},
        additionalProperties=False,
    )
    required = [field.name for field in endpoint.fields if field.required]
    if required:
        schema["required"] = required
    answer: dict[str, Any] = {
        "application/json": dict(schema=dict(type="object"), example=endpoint.example)
    }
    if any(field.name == "stream" for field in endpoint.fields):
        answer["text/event-stream"] = dict(schema=dict(type="string"))
    return dict(
        operationId=endpoint.path.rsplit("/", 1)[1],
        summary=endpoint.about,
        requestBody=dict(required=True, content={"multipart/form-data": dict(schema=schema)}),
        responses=_responses(answer),
    )


def _read(about: str, content: str = "application/json") -> dict[str, Any]:
    return dict(summary=about, responses=_responses({content: {}}))


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
    files = importlib.resources.files("coca_jax.apps.serve") / "page"

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
        return JSONResponse(document(bool(key)))

    app = Starlette(
        routes=[
            *(Route(path, _file(files / file, kind)) for path, (file, kind) in PAGE.items()),
            *(Route(one.path, _endpoint(one, server), methods=["POST"]) for one in ENDPOINTS),
            Route(f"{PICTURES}{{row}}", functools.partial(picture, server)),
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
        answers=any(supervision.of(Entry.of(one)).asks for one in sources),
        limits=dict(
            bytes=limits.bytes,
            pixels=limits.pixels,
            images=limits.images,
            labels=MOST_LABELS,
            characters=schemas.LONGEST,
            fields={one.path: found for one in ENDPOINTS if (found := schemas.bounds(one.fields))},
        ),
    )
