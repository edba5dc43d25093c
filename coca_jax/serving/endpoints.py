"""What can be asked over HTTP: each endpoint, its fields, and what it answers."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from coca_jax.data.prompts import PHOTO
from coca_jax.searching.index import mixed
from coca_jax.serving import forms, uploads, works
from coca_jax.serving.batcher import Batcher
from coca_jax.serving.forms import Field
from coca_jax.serving.refusals import STOPPING, Refused
from coca_jax.serving.reopening import Reopened
from coca_jax.serving.uploads import Decoder, Limits

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
                form = await forms.sent(request)
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
        values = forms.read(self.fields, form)
        pictures = values.get("image", [])
        if len(pictures) > server.limits.images:
            raise Refused(400, f"more than {server.limits.images} pictures; send fewer")
        values["image"] = await uploads.read(server.model, pictures, server.limits, server.decoder)
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
    settings, explain = forms.settings(values), values["explain"]
    if explain:
        _check_explains(server)
    items = [(pixels, values["prompt"]) for pixels in _pictures(values)]
    if not values["stream"]:
        answers = await server.batcher.answers(works.Captions(settings, explain), items)
        return dict(results=answers)
    if len(items) > 1:
        raise Refused(400, f"stream: {len(items)} pictures; a stream is of one")
    work = works.Captions if settings.num_beams > 1 else works.StreamedCaptions
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
    return dict(results=await server.batcher.answers(works.Explain(), items))


async def zero_shot(server: Server, values: Values) -> Any:
    """Probabilities of labels."""
    given = [line.strip() for text in values["label"] for line in text.splitlines()]
    labels = tuple(dict.fromkeys(filter(None, given)))
    if labels:  # else it is said below that there are none
        _refuse_empty("label", values["label"])
    if not 2 <= len(labels) <= MOST_LABELS:
        raise Refused(400, f"label: {len(labels)} labels; give 2 to {MOST_LABELS}, one a line")
    longest = max(map(len, labels))
    if longest > forms.LONGEST:
        raise Refused(400, f"label: {longest} characters; at most {forms.LONGEST} each")
    template = values["template"]
    if template and template.count("{}") != 1:  # nor the name of a set, 80 sentences for each label
        told = f"template={template[:80]!r}: it must hold '{{}}' once, where the label goes"
        raise Refused(400, told)
    work = works.ZeroShot(labels, template)
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
    return dict(results=await server.batcher.answers(works.Head(values["k"]), items))


async def answer(server: Server, values: Values) -> Any:
    """What the decoder writes behind a question."""
    _check_writes(server)
    items = [(pixels, values["question"]) for pixels in _pictures(values)]
    return dict(results=await server.batcher.answers(works.Answer(), items))


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
        await server.batcher.answers(works.EmbedImages(), pictures),
        await server.batcher.answers(works.EmbedTexts(), texts),
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
        shrink = functools.partial(uploads.smaller, index, row, int(given))
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
            *forms.SETTINGS,
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
