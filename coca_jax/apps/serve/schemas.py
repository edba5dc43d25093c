"""The fields that a request may have: declared once, read from a form, described in OpenAPI."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from coca_jax.apps.serve.limits import Refused, check_room
from coca_jax.data import images, videos
from coca_jax.inference.generation.config import NOTES, Settings
from coca_jax.runtime import machine

TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", UploadFile: "string"}
LONGEST = 2000  # characters of a text
_MOST = 1200  # fields of a request that are no files
KINDS = ("multipart/form-data", "application/x-www-form-urlencoded")
SEND = "send multipart/form-data, a picture as the field 'image' (curl -F image=@cat.jpg)"


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a form.

    name: its name. about: what it says, for people. type: of its values. default: None: must be
    given, unless it may be there several times (`many`). low, high: of numbers. longest:
    characters of a text.
    """

    name: str
    about: str
    type: type = str
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    many: bool = False
    longest: int = LONGEST

    def read(self, form: FormData) -> Any:
        """Its value, or all of them. Raises Refused, 400."""
        given = form.getlist(self.name)
        if self.many:
            return [self._value(value) for value in given]
        if len(given) > 1:
            raise Refused(400, f"{self.name}: given {len(given)} times; give it once")
        if not given or given == [""] or (self.required and str(given[0]).isspace()):
            if self.default is None:
                raise Refused(400, f"{self.name} is missing: {self.about}")
            return self.default
        return self._value(given[0])

    def _value(self, given: Any) -> Any:
        if isinstance(given, UploadFile) != (self.type is UploadFile):
            kind = "a file" if self.type is UploadFile else f"{TYPES[self.type]}, not a file"
            raise Refused(400, f"{self.name}: give {kind}")
        if self.type in (UploadFile, str):
            if self.type is str and len(given) > self.longest:
                raise Refused(400, f"{self.name}: {len(given)} characters; at most {self.longest}")
            return given
        if self.type is bool:
            if given not in ("true", "false", "1", "0"):
                raise Refused(400, f"{self.name}={given[:40]!r}: give true or false")
            return given in ("true", "1")
        kind = "a whole number" if self.type is int else "a number"
        try:
            value = self.type(given)
        except ValueError:
            raise Refused(400, f"{self.name}={given[:40]!r}: give {kind}") from None
        if not self.low <= value <= self.high:
            bounds = f"from {_number(self.low)} to {_number(self.high)}"
            raise Refused(400, f"{self.name}={given[:40]}: give {kind} {bounds}")
        return value

    def schema(self) -> dict[str, Any]:
        """In OpenAPI."""
        one: dict[str, Any] = dict(type=TYPES[self.type])
        if self.type is UploadFile:
            one["format"] = "binary"
        for name, bound in (("minimum", self.low), ("maximum", self.high)):
            if math.isfinite(bound):
                one[name] = bound
        if self.many:
            return dict(type="array", items=one, description=self.about)
        if self.default is not None:
            one["default"] = self.default
        return one | dict(description=self.about)

    @property
    def required(self) -> bool:
        """Whether a request must have it."""
        return self.default is None and not self.many


_NAME = re.compile(r"[\w.\[\] -]{1,100}", re.ASCII)


def _number(x: float) -> str:
    """Whole numbers with all of their digits."""
    return f"{x:.0f}" if float(x).is_integer() else f"{x:g}"


async def sent(request: Request) -> FormData:
    """The form that a request sends. Raises Refused, 400, for a body that is none, or not whole."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in KINDS:
        raise Refused(400, f"Content-Type {kind[:80] or 'is missing'}: {SEND}")
    try:
        if kind != KINDS[0]:
            return await request.form(max_fields=_MOST)
        async with contextlib.aclosing(request.stream()) as stream:
            parser = _Multipart(request.headers, stream, max_fields=_MOST)
            form = await parser.parse()
    except ClientDisconnect:  # nobody reads this: the client hung up
        raise Refused(400, "the request ended before all of it was sent") from None
    except MultiPartException as error:
        raise Refused(400, error.message) from None
    except (LookupError, UnicodeError):  # that the header names, or of bytes that are none of it
        raise Refused(400, "the form is not in its charset; send UTF-8") from None
    if not parser.ended:
        await form.close()
        raise Refused(400, "the form was cut: its closing boundary is missing; send all of it")
    return form


class _Multipart(MultiPartParser):
    """Starlette's, which takes a form without its end, and without the field that it cut."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


def bounds(fields: Sequence[Field]) -> dict[str, list[float]]:
    """[least, most] of each number that has both, by name."""
    ends = {field.name: [field.low, field.high] for field in fields}
    return {name: found for name, found in ends.items() if all(map(math.isfinite, found))}


def read_form(fields: Sequence[Field], form: FormData) -> dict[str, Any]:
    """{name: value}. Raises Refused, 400, for what cannot be, and for a field that there is not."""
    known = [field.name for field in fields]
    for name in form:
        if not _NAME.fullmatch(name):  # curl -d sends anything as a form: a picture, JSON
            raise Refused(400, f"the body has no fields with names: {SEND}")
        if name not in known:
            raise Refused(400, f"{name[:40]!r}: no such field; choose from {', '.join(known)}")
    return {field.name: field.read(form) for field in fields}


# What a request may ask of the settings of captions: each of these is a program, or time.
_BOUNDS: dict[str, tuple[float, float]] = dict(
    max_tokens=(1, 256), min_tokens=(0, 256), num_captions=(1, 8), num_beams=(1, 8),
    temperature=(0, 10), top_k=(0, 1_000_000), top_p=(0, 1), min_p=(0, 1), length_penalty=(-10, 10),
    repetition_penalty=(0, 10), no_repeat_ngram=(0, 8), seed=(0, 2**32 - 1),
)  # fmt: skip
SETTINGS = [
    Field(
        field.name,
        NOTES[field.name],
        type(field.default),
        field.default,
        *_BOUNDS.get(field.name, ()),
    )
    for field in dataclasses.fields(Settings)
]


def settings(values: dict[str, Any]) -> Settings:
    """Of the values of a request. Raises ValueError for some that do not go together."""
    return Settings(**{field.name: values[field.name] for field in SETTINGS})


# Pictures of a request, within bounds, as the model takes them; pictures of an index, smaller.


# Pictures that are decoded at a time at most: each takes some 7 bytes a pixel, however few bytes
# its file has.
MOST = 8
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request. megabytes: of all that it sends; pixels: of a picture, or of a frame of a
    clip; images: pictures of one request; seconds: for sending them."""

    megabytes: int = 32
    pixels: int = 50_000_000
    images: int = 16
    seconds: int = 60

    @property
    def bytes(self) -> int:
        """Of the body."""
        return self.megabytes << 20


class Decoder:
    """The threads that decode pictures, one a core and MOST at most; other pictures wait.

    depth: pictures that may wait; more are refused, see `check_room`.
    """

    def __init__(self, depth: int):
        self._threads = min(machine.count(), MOST)
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "decoder")
        self._depth, self._open = depth, 0

    @property
    def waiting(self) -> int:
        """Pictures that wait."""
        return max(self._open - self._threads, 0)

    async def run(self, calls: Sequence[Callable[[], _T]]) -> list[_T]:
        """What each call gives, which decodes a picture. Raises what a call does, and Refused
        when too many wait."""
        check_room(len(calls), self._open, self._depth + self._threads)
        self._open += len(calls)
        loop = asyncio.get_running_loop()
        try:  # one by one, so that no request of many pictures holds up the others
            return [await loop.run_in_executor(self._pool, call) for call in calls]
        finally:
            self._open -= len(calls)


async def read_images(
    model: Any, files: Sequence[UploadFile], limits: Limits, decoder: Decoder
) -> list[np.ndarray]:
    """What `model.fit_image` makes of each file. Raises ValueError for one that is no picture or
    has too many pixels, Refused when too many wait."""
    calls = [
        functools.partial(
            _read, model, file, limits.pixels, f"picture {n} of {len(files)}: " * (len(files) > 1)
        )
        for n, file in enumerate(files, 1)
    ]
    return await decoder.run(calls)


def _read(model: Any, file: UploadFile, pixels: int, which: str) -> np.ndarray:
    data = file.file.read()  # here: no picture that waits is in memory beside its file
    try:
        return _preprocess(model, data, pixels)
    except ValueError as error:
        raise ValueError(f"{which}{error}") from None


def _preprocess(model: Any, data: bytes, pixels: int) -> np.ndarray:
    if not data:
        raise ValueError("an empty file; choose a picture")
    if model.num_frames:  # looks at the frames' size before it decodes all of them
        _, height, width = videos.sniff(data, pixels)
        if height * width > pixels:
            raise ValueError(f"too many pixels: {width} x {height}, limit {pixels}")
    else:
        images.open_image(data, pixels)
    return model.fit_image(data)


def smaller(index: Any, row: int, side: int) -> bytes:
    """A picture of a searching.index.Index as a JPEG whose longer side is at most `side`.

    Raises ValueError, OSError: it cannot be read any more, has changed, or lies in an archive.
    """
    return _smaller(*index.file(row), side)


@functools.lru_cache(maxsize=512)
def _smaller(path: str, stamp: tuple[int, int] | None, side: int) -> bytes:
    """stamp: of the file now, so that none of an earlier one is kept."""
    picture = Image.fromarray(images.decode(path))
    picture.thumbnail((side, side))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return out.getvalue()
