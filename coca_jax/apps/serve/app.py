"""The web application: routes with their forms and results, and the page."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.resources
import json
import os
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import fastapi
import numpy as np
import prometheus_client
import pydantic
from absl import logging
from fastapi import Depends, Form, HTTPException, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles

import coca_jax
from coca_jax.apps.search.index import Index, mixed, stamp
from coca_jax.apps.search.sheet import encode
from coca_jax.apps.serve import batcher
from coca_jax.apps.serve.batcher import Batcher
from coca_jax.apps.serve.server import Guard
from coca_jax.config import Entry
from coca_jax.data import images, supervision, synthetic_source, videos
from coca_jax.data.prompts import PHOTO
from coca_jax.inference.generation import config as generation
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.runtime import bounded_json, machine, storage

MAX_LABELS = 1000
MAX_CHARACTERS = 2000  # of a text
MAX_DECODING = 8  # pictures decoded at a time: each takes about 7 bytes a pixel
MAX_EXAMPLES = 6
RELOAD_SECONDS = 5.0  # between two checks whether the index has changed

# -- forms -----------------------------------------------------------------------------------------

Text = Annotated[str, pydantic.Field(max_length=MAX_CHARACTERS)]
Filled = Annotated[Text, pydantic.Field(pattern=r"\S")]  # not blank


class AnyPictures(pydantic.BaseModel):
    """The field that every form has; an unknown field is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
    image: list[UploadFile] = pydantic.Field(
        [], description="A picture, or a clip for a model of clips; repeatable."
    )


class Pictures(AnyPictures):
    """A form that needs a picture."""

    image: list[UploadFile] = pydantic.Field(
        min_length=1, description="A picture, or a clip for a model of clips; repeatable."
    )


def _field(name: str, default: Any) -> Any:
    """A form field of GenerationConfig: (type, description and bound). Lists are texts, as JSON."""
    kind, declared = generation.KINDS[name], generation.metadata(name)
    bounds: Any = {} if declared["most"] is None else dict(le=declared["most"])
    if isinstance(default, tuple):
        kind, default, bounds = str, json.dumps(default), dict(max_length=10_000)
    return kind, pydantic.Field(default, description=declared["help"], **bounds)


_Generation: Any = pydantic.create_model(
    "Generation",
    __base__=Pictures,
    **{name: _field(name, default) for name, default in generation.defaults().items()},
)


class CaptionForm(_Generation):
    """Pictures, and how to write their captions."""

    prompt: Text = pydantic.Field("", description="Beginning of the captions.")
    explain: bool = pydantic.Field(False, description="Add words, probabilities and attention.")
    stream: bool = pydantic.Field(False, description="Server-sent events; of one picture.")


class ExplainForm(Pictures):
    """Pictures and a text."""

    text: Filled = pydantic.Field(description="A caption of yours.")


class LabelsForm(Pictures):
    """Pictures and labels."""

    label: list[Annotated[str, pydantic.Field(max_length=100 * MAX_LABELS)]] = pydantic.Field(
        min_length=1, description="A label, or several, one a line; repeatable."
    )
    template: Text = pydantic.Field(
        "",
        pattern=r"^$|^[^{}]*\{\}[^{}]*$",
        description="Sentence with {} in the place of the label. Default: the mean of "
        f"{', '.join(map(repr, PHOTO))}.",
    )


class HeadForm(Pictures):
    """Pictures, and a question where the task head reads one."""

    question: Text = pydantic.Field("", description="Question or statement about each picture.")
    k: int = pydantic.Field(5, ge=1, le=1000, description="Number of classes.")


class QuestionForm(Pictures):
    """Pictures and a question."""

    question: Filled = pydantic.Field(description="Question about each picture.")


class EmbedForm(AnyPictures):
    """Pictures, texts or both."""

    text: list[Filled] = pydantic.Field([], description="Repeatable.")


class SearchForm(AnyPictures):
    """What to look for: texts, pictures and rows of the index together."""

    text: list[Text] = pydantic.Field([], description="Repeatable.")
    like: list[int] = pydantic.Field([], description="Row of the index; repeatable.")
    text_weight: float = pydantic.Field(1.0, ge=-100, le=100, description="Weight of each text.")
    image_weight: float = pydantic.Field(
        1.0, ge=-100, le=100, description="Weight of each picture and row."
    )
    k: int = pydantic.Field(24, ge=1, le=200, description="Number of pictures to find.")


# -- results ---------------------------------------------------------------------------------------


class Alternative(pydantic.BaseModel):
    """What else could have stood in a word's place."""

    text: str
    probability: float


class Word(Alternative):
    """A word of a caption; attention: [rows, columns], of clips [frames, rows, columns]."""

    alternatives: list[Alternative]
    attention: list[Any]


class Caption(pydantic.BaseModel):
    """log_prob: sum over the tokens; confidence: geometric mean of the tokens' probabilities;
    finished: whether it ended by itself; similarity: cosine of picture and caption."""

    text: str
    log_prob: float
    confidence: float
    finished: bool
    words: list[Word] | None = None
    similarity: float | None = None


class PictureCaptions(pydantic.BaseModel):
    """Captions of a picture, the best first."""

    captions: list[Caption]
    attention: list[Any] | None = None


class Captions(pydantic.BaseModel):
    """One result for each picture."""

    results: list[PictureCaptions]


class Label(pydantic.BaseModel):
    """A label or class."""

    label: str
    probability: float


class PictureLabels(pydantic.BaseModel):
    """The most probable first; cut: a text is longer than what the model reads."""

    labels: list[Label]
    cut: bool = False


class Labels(pydantic.BaseModel):
    """One result for each picture."""

    results: list[PictureLabels]


class PictureAnswer(pydantic.BaseModel):
    """cut: the question is longer than what the model reads."""

    answer: str
    cut: bool


class Answers(pydantic.BaseModel):
    """One result for each picture."""

    results: list[PictureAnswer]


class Embeddings(pydantic.BaseModel):
    """L2-normalized; cut: for each text, whether it is longer than what the model reads."""

    images: list[list[float]]
    texts: list[list[float]]
    cut: list[bool]


class Found(pydantic.BaseModel):
    """A picture of the index; score: cosine similarity; picture: its address here."""

    rank: int
    row: int
    image: str
    score: float
    caption: str
    picture: str


class Finds(pydantic.BaseModel):
    """The most similar first; cut: a text is longer than what the model reads."""

    results: list[Found]
    cut: bool


# -- the server's state ----------------------------------------------------------------------------

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a request: megabytes of its body, pixels of a picture or of a frame of a clip,
    number of pictures, seconds for sending it."""

    megabytes: int = 32
    pixels: int = 50_000_000
    images: int = 16
    seconds: float = 60


class Reopened:
    """A search index that is opened again after its folder has changed. index: or None."""

    def __init__(self, index: Any, model: Any):
        self._index, self._model = index, model
        self._stamp = getattr(index, "stamp", None)
        self._checked = time.monotonic()

    async def now(self) -> Any:
        """The index, at most RELOAD_SECONDS old. A new one that cannot be read is not used."""
        if self._index is not None and time.monotonic() - self._checked >= RELOAD_SECONDS:
            self._checked = time.monotonic()
            await asyncio.to_thread(self._reload)
        return self._index

    def _reload(self) -> None:
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
            if isinstance(error, OSError):  # try again at the next check
                return
        self._stamp = found


class Server:
    """What the routes share: the model behind its batcher, the index, limits and metrics.

    Args:
        depth: pictures and texts that may be decoded, wait or run at a time.
        folder: the run's folder, for its report, model card and examples; '' for none.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        index: Any = None,
        batch_size: int = 16,
        wait: float = 0.005,
        depth: int = 1024,
        limits: Limits | None = None,
        folder: str = "",
    ):
        self.model, self.name, self.depth = model, name, depth
        self.limits = limits or Limits()
        self.index = Reopened(index, model)
        self.metrics = prometheus_client.CollectorRegistry()
        batches = prometheus_client.Histogram(
            "coca_jax_batch_items",
            "Items that ran together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.metrics,
        )
        waiting = prometheus_client.Gauge(
            "coca_jax_open_items", "Items decoded, waiting or running.", registry=self.metrics
        )
        self._open = 0
        waiting.set_function(lambda: self._open)
        self.batcher = Batcher(model, batch_size=batch_size, wait=wait, seen=batches.observe)
        self._decoders = concurrent.futures.ThreadPoolExecutor(
            min(machine.count(), MAX_DECODING), "decoder"
        )
        self.pages = _pages(folder)
        held_out = _held_out(folder)
        self.examples = _examples(held_out, index)
        self.usual_similarity = _usual_similarity(model, held_out)

    @contextlib.contextmanager
    def room(self, count: int) -> Iterator[None]:
        """Inside, `count` items count as open. Raises HTTPException where they are too many."""
        if count > self.depth:
            raise HTTPException(
                400, f"{count} pictures and texts: at most {self.depth} (--queue). Send fewer."
            )
        if self._open + count > self.depth:
            raise HTTPException(
                503, "Too many requests are waiting. Try again later.", {"Retry-After": "1"}
            )
        self._open += count
        try:
            yield
        finally:
            self._open -= count

    async def pixels(self, files: Sequence[UploadFile]) -> list[np.ndarray]:
        """What the model reads of each upload. Raises ValueError for one that is no picture."""
        found = []
        for number, file in enumerate(
            files, 1
        ):  # one by one: a large request must not block others
            try:
                found.append(await self.in_decoder(self._decode, file))
            except ValueError as error:
                which = f"picture {number} of {len(files)}: " if len(files) > 1 else ""
                raise ValueError(f"{which}{error}") from None
        return found

    async def in_decoder(self, call: Any, *arguments: Any) -> Any:
        """Runs a call on the few threads that decode pictures."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, call, *arguments)

    def _decode(self, file: UploadFile) -> np.ndarray:
        data = file.file.read()  # here: pictures that wait stay in their temporary files
        if not data:
            raise ValueError("an empty file; choose a picture")
        if self.model.num_frames:  # the size of the frames comes before all of them are decoded
            _, height, width = videos.sniff(data, self.limits.pixels)
            if height * width > self.limits.pixels:
                raise ValueError(f"too many pixels: {width} x {height}, limit {self.limits.pixels}")
        else:
            images.open_image(data, self.limits.pixels)
        return self.model.fit_image(data)

    async def ask(
        self, request: Request, work: Any, files: Sequence[UploadFile], text: str = ""
    ) -> list[Any]:
        """The work's answer to each picture with the text."""
        with self.room(len(files)):
            return await while_connected(request, self._ask(work, files, text))

    async def _ask(self, work: Any, files: Sequence[UploadFile], text: str) -> list[Any]:
        return await self.answers(work, await self.pixels(files), [text] * len(files))

    async def answers(
        self, work: Any, pixels: Sequence[Any], texts: Sequence[str] = ()
    ) -> list[Any]:
        """The work's answer to each item."""
        texts = texts or [""] * len(pixels)
        pixels = pixels or [None] * len(texts)
        jobs = [self.batcher.submit(work, *item) for item in zip(pixels, texts)]
        return await asyncio.gather(*(job.last() for job in jobs))

    async def embed(
        self, request: Request, files: Sequence[UploadFile], texts: list[str]
    ) -> tuple[list[Any], list[tuple[Any, bool]]]:
        """Embeddings float32 [E] of pictures; of texts, and whether each was cut."""

        async def both() -> Any:
            pixels = await self.pixels(files)
            return (
                await self.answers(batcher.EmbedImages(), pixels) if pixels else [],
                await self.answers(batcher.EmbedTexts(), [], texts) if texts else [],
            )

        with self.room(len(files) + len(texts)):
            return await while_connected(request, both())

    async def searched(self) -> Any:
        """The index. Raises HTTPException where there is none."""
        index = await self.index.now()
        if index is None:
            raise HTTPException(404, "No index. Start with --index=DIR (coca-jax search index).")
        return index


async def while_connected(request: Request, answer: Coroutine[Any, Any, _T]) -> _T:
    """The answer; cancelled when the client hangs up, so that nothing is computed for nobody."""
    task = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait([task], timeout=0.5))[0]:
            if await request.is_disconnected():
                raise HTTPException(499, "The client hung up.")
        return task.result()
    finally:
        task.cancel()
        # Until it has ended it may use the form's files.
        await asyncio.gather(task, return_exceptions=True)


def _pages(folder: str) -> dict[str, str]:
    """Files of a run that the page links to: {"report", "model_card"}, those that exist."""
    if os.path.basename(folder.rstrip("/")) in ("export", "checkpoints"):
        folder = os.path.dirname(folder.rstrip("/"))
    cards = ("README.md", "export/README.md")
    places = dict(report=("report.html",), model_card=cards)
    found = {
        name: [path for one in names if os.path.isfile(path := os.path.join(folder, one))]
        for name, names in places.items()
    }
    return {name: paths[0] for name, paths in found.items() if paths and folder}


def _held_out(folder: str) -> list[bytes]:
    """Pictures of the run's evaluations, which they keep for the report; [] for none."""
    found: dict[bytes, None] = {}
    with contextlib.suppress(
        OSError, ValueError, AttributeError
    ):  # no evaluation, or a damaged one
        data = storage.place(os.path.join(folder or "/nowhere", "eval_examples.json")).read_bytes()
        for task in bounded_json.loads(data).values():
            found |= {base64.b64decode(one["image"]): None for one in task.get("items", ())}
    return list(found)


def _examples(held_out: list[bytes], index: Any) -> list[bytes]:
    """Pictures for the page to offer, PNG: held-out ones, else the first of the index, else drawn
    scenes."""
    found: list[str | bytes] = [*held_out]
    with contextlib.suppress(OSError, ValueError):
        if index is not None and not found:
            found = [index.file(row)[0] for row in range(min(MAX_EXAMPLES, len(index.names)))]
    if not found:
        scenes = synthetic_source.open_entry(Entry(builtin="scenes"), "test")
        found = [record.image for record in scenes.read(list(range(MAX_EXAMPLES)))]
    return [encode(one, 320, "PNG") for one in found[:MAX_EXAMPLES]]


def _usual_similarity(model: Any, held_out: list[bytes]) -> float | None:
    """Cosine between picture and caption that 9 of 10 held-out pictures exceed: below it the page
    says that the model is guessing. None where the run kept no pictures."""
    if len(held_out) < 10 or not (model.writes_captions and model.explains) or model.num_frames:
        return None
    work = batcher.StreamedCaptions(GenerationConfig(), explain=True)
    found = []
    for data in held_out[:40]:  # one by one: these programs are compiled already
        *_, (last,) = work.run(model, [model.fit_image(data)], [""])
        found.append(last["captions"][0]["similarity"])
    return round(float(np.quantile(found, 0.1)), 4)


@functools.lru_cache(maxsize=512)
def thumbnail(path: str, stamp: tuple[int, int] | None, side: int) -> bytes:
    """A JPEG of at most `side` pixels. stamp: of the file, so that no earlier one is cached."""
    return encode(path, side)


# -- routes ----------------------------------------------------------------------------------------


async def _state(request: Request) -> Server:  # sync ones run in a thread
    return request.app.state.server


State = Annotated[Server, Depends(_state)]
_FORM = Form(media_type="multipart/form-data")
# Guard checks the key before a body is read; the dependency declares it in the OpenAPI document.
router = fastapi.APIRouter(prefix="/api", dependencies=[Depends(HTTPBearer(auto_error=False))])


def _check_writes(server: Server, explain: bool = False) -> None:
    if not server.model.writes_captions:
        raise HTTPException(404, "This model has no text decoder. Use /api/zero_shot.")
    if explain and not server.model.explains:
        raise HTTPException(
            404,
            "explain: not available for pictures of any shape (data.resize='native'). "
            "Use /api/caption without explain.",
        )


@router.post("/caption", response_model_exclude_none=True)
async def caption(form: Annotated[CaptionForm, _FORM], request: Request, server: State) -> Captions:
    """Captions of pictures. With stream=true server-sent events: `tokens` after each token (none
    with beams), then `result` with what results[0] would be, or `error`."""
    _check_writes(server, form.explain)
    given = {
        name: getattr(form, name) for name in generation.KINDS if name in form.model_fields_set
    }
    config = server.model.generation_config.updated(
        {n: generation.parse(n, v) if isinstance(v, str) else v for n, v in given.items()}
    )
    if not form.stream:
        work = batcher.Captions(config, form.explain)
        return Captions(results=await server.ask(request, work, form.image, form.prompt))
    if len(form.image) > 1:
        raise HTTPException(400, f"stream: {len(form.image)} pictures. Send one.")
    kind = batcher.StreamedCaptions if config.streams else batcher.Captions
    with server.room(1):
        (pixels,) = await server.pixels(form.image)
    job = server.batcher.submit(kind(config, form.explain), pixels, form.prompt)
    return StreamingResponse(_events(job), media_type="text/event-stream")  # type: ignore[return-value]


async def _events(job: Any) -> AsyncIterator[str]:
    try:
        async for answer in job:
            kind = "tokens" if "tokens" in answer else "result"
            yield f"event: {kind}\ndata: {json.dumps(answer)}\n\n"
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else "The server failed; see its log."
        yield f"event: error\ndata: {json.dumps(dict(detail=text))}\n\n"


@router.post("/explain", response_model_exclude_none=True)
async def explain(form: Annotated[ExplainForm, _FORM], request: Request, server: State) -> Captions:
    """How probable each word of a text is for each picture, and where the model looked."""
    _check_writes(server, True)
    results = await server.ask(request, batcher.Explain(), form.image, form.text)
    return Captions(results=results)


@router.post("/zero_shot")
async def zero_shot(form: Annotated[LabelsForm, _FORM], request: Request, server: State) -> Labels:
    """Probabilities of labels for each picture, without training."""
    for number, text in enumerate(form.label, 1):
        if not text.strip():
            raise HTTPException(400, f"label: number {number} of {len(form.label)} is empty.")
    lines = [line.strip() for text in form.label for line in text.splitlines()]
    labels = tuple(dict.fromkeys(filter(None, lines)))
    if not 2 <= len(labels) <= MAX_LABELS:
        raise HTTPException(400, f"label: {len(labels)} labels. Give 2 to {MAX_LABELS}.")
    if max(map(len, labels)) > MAX_CHARACTERS:
        raise HTTPException(400, f"label: more than {MAX_CHARACTERS} characters. Shorten it.")
    work = batcher.ZeroShot(labels, form.template)
    return Labels(results=await server.ask(request, work, form.image))


@router.post("/head")
async def head(form: Annotated[HeadForm, _FORM], request: Request, server: State) -> Labels:
    """The most probable classes of the task head, where the model has one."""
    kind = server.model.head_kind
    if kind is None:
        raise HTTPException(404, "This model has no task head. Use /api/zero_shot for labels.")
    if kind.images > 1 and len(form.image) != kind.images:
        raise HTTPException(400, f"image: {len(form.image)} pictures. Send {kind.images}.")
    if kind.reads_text and not form.question.strip():
        raise HTTPException(400, "question: missing. This head reads a question or statement.")
    work = batcher.Head(form.k)
    if kind.images == 1:
        return Labels(results=await server.ask(request, work, form.image, form.question))
    with server.room(len(form.image)):
        pixels = [np.stack(await server.pixels(form.image))]
        return Labels(results=await server.answers(work, pixels, [form.question]))


@router.post("/answer")
async def answer(form: Annotated[QuestionForm, _FORM], request: Request, server: State) -> Answers:
    """The answer that the text decoder writes after a question about each picture."""
    _check_writes(server)
    results = await server.ask(request, batcher.Answer(), form.image, form.question)
    return Answers(results=results)


@router.post("/embed")
async def embed(form: Annotated[EmbedForm, _FORM], request: Request, server: State) -> Embeddings:
    """Embeddings of pictures and texts."""
    if not form.image and not form.text:
        raise HTTPException(400, "Nothing to embed. Send pictures as 'image' or texts as 'text'.")
    pictures, texts = await server.embed(request, form.image, form.text)
    return Embeddings(
        images=[row.tolist() for row in pictures],
        texts=[row.tolist() for row, _ in texts],
        cut=[cut for _, cut in texts],
    )


@router.post("/search")
async def search(form: Annotated[SearchForm, _FORM], request: Request, server: State) -> Finds:
    """The pictures of the index that are most similar to texts, pictures and rows together."""
    index = await server.searched()
    like = [index.place(row) for row in form.like]
    texts = [text for text in form.text if text.strip()]
    pictures, found = await server.embed(request, form.image, texts)
    pictures += [np.float32(index.embeddings[place]) for place in like]
    if not pictures and not found:
        raise HTTPException(400, "Nothing to look for. Send text, image or like.")
    weights = [form.text_weight] * len(found) + [form.image_weight] * len(pictures)
    query = mixed(np.stack([*(row for row, _ in found), *pictures]), weights)
    nearest = await asyncio.to_thread(index.search, query, form.k)
    for one in nearest:  # names below the common folder: no path of this machine
        one["image"] = one["image"][index.letters :]
        one["picture"] = f"/api/pictures/{one['row']}"
    return Finds(results=nearest, cut=any(cut for _, cut in found))


_JPEG = dict(response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})


@router.get("/pictures/{row}", **_JPEG)  # type: ignore[arg-type]
async def picture(
    row: Annotated[int, fastapi.Path(ge=0, lt=2**63)], server: State, large: bool = False
) -> Response:
    """A picture of the index by its row, at most 320 pixels, or 1280."""
    index = await server.searched()
    try:
        path, stamp = index.file(index.place(row))
        data = await server.in_decoder(thumbnail, path, stamp, 1280 if large else 320)
    except (ValueError, OSError):
        raise HTTPException(
            404, f"Picture {row} cannot be shown: unknown, in an archive, moved or changed."
        ) from None
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})


@router.get("/examples/{number}", response_class=Response)
async def example(number: int, server: State) -> Response:
    """An example picture, PNG."""
    if not 0 <= number < len(server.examples):
        raise HTTPException(404)
    return Response(server.examples[number], media_type="image/png")


# A report is one file with its own styles and scripts; it can load and send nothing.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)


@router.get("/report", response_class=FileResponse)
async def report(server: State) -> Response:
    """The run's report."""
    if "report" not in server.pages:
        raise HTTPException(404)
    policy = {"Content-Security-Policy": _PAGE_POLICY}
    return FileResponse(server.pages["report"], media_type="text/html", headers=policy)


@router.get("/model_card", response_class=FileResponse)
async def model_card(server: State) -> Response:
    """The model card, in Markdown."""
    if "model_card" not in server.pages:
        raise HTTPException(404)
    return FileResponse(server.pages["model_card"], media_type="text/plain; charset=utf-8")


@router.get("/info")
async def info(server: State) -> dict[str, Any]:
    """What the model is and can do, and the limits."""
    model, config, limits = server.model, server.model.config, server.limits
    index, kind = await server.index.now(), model.head_kind
    return dict(
        name=server.name,
        version=coca_jax.__version__,
        image_size=model.image_size,
        resize=model.resize,
        num_frames=model.num_frames,
        max_tokens=model.max_len,
        embedding=config.model.embed_dim,
        captions=model.writes_captions,
        explains=model.writes_captions and model.explains,
        head=kind
        and dict(
            kind=kind.name,
            images=kind.images,
            reads_text=kind.reads_text,
            classes=len(model.class_names),
        ),
        answers=any(supervision.of(Entry.of(one)).asks for one in config.data.sources),
        index=index and dict(pictures=len(index.names)),
        examples=len(server.examples),
        usual_similarity=server.usual_similarity,
        pages=sorted(server.pages),
        limits=dict(
            bytes=limits.megabytes << 20,
            pixels=limits.pixels,
            images=limits.images,
            labels=MAX_LABELS,
            characters=MAX_CHARACTERS,
        ),
    )


def build(server: Server, *, key: str = "", loopback: bool = True, public_name: str = "") -> Guard:
    """The application. key, loopback, public_name: see Guard."""

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        app.state.batches = asyncio.create_task(server.batcher.run())
        yield
        app.state.batches.cancel()

    app = fastapi.FastAPI(
        title="coca_jax",
        version=coca_jax.__version__,
        description="A contrastive captioner: captions, labels, questions, embeddings, search.",
        lifespan=lifespan,
        docs_url=None,  # its scripts come from another site
        redoc_url=None,
        max_body_size=server.limits.megabytes << 20,
        form_limits=dict(max_files=server.limits.images, max_fields=MAX_LABELS + 200),
    )
    app.state.server = server

    @app.exception_handler(ValueError)
    async def bad_value(request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": " ".join(str(error).split())}, 400)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": "The server failed; see its log."}, 500)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether the model's thread runs."""
        if app.state.batches.done():
            raise HTTPException(503, "The model's thread has ended.")
        return dict(status="ok")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        data = prometheus_client.generate_latest(server.metrics)
        return Response(data, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    app.include_router(router)
    page = importlib.resources.files("coca_jax.apps.serve") / "page"
    app.mount("/", StaticFiles(directory=str(page), html=True))
    who: Any = dict(key=key, loopback=loopback, public_name=public_name)
    return Guard(app, **who, seconds=server.limits.seconds, metrics=server.metrics)
