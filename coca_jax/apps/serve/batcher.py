"""Requests wait for others of their kind, and one thread asks the model for all of them at once."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from coca_jax.apps.serve.limits import STOPPING, Refused, check_room
from coca_jax.inference import tokenization as text_arrays
from coca_jax.inference.explain import Explanation, Word
from coca_jax.inference.generation.config import Settings
from coca_jax.inference.model import CoCaModel
from coca_jax.inference.tokenization import Caption


class Work(Protocol):
    """What the model is asked; equal works (they are hashable) share a batch."""

    def run(self, model: Any, items: list[Any]) -> Iterator[list[Any]]:
        """Yields lists with an answer, or None for nothing new, for each item. Raises ValueError
        for an item that cannot be."""


class _Job(NamedTuple):
    work: Work
    item: Any
    send: Callable[[Any], None]
    left: threading.Event  # set when nobody waits any more


class _End(NamedTuple):
    error: Exception | None = None


class Batcher:
    """The thread that alone uses the model.

    Args:
        model: what works are run with.
        batch_size: items of a batch at most.
        wait: seconds that the first of a batch waits for others.
        depth: items that may wait; more are refused, see `check_room`.
        seen: called with the size of each batch that was run.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int,
        wait: float,
        depth: int,
        seen: Callable[[int], None] = lambda size: None,
    ):
        self._model, self._batch_size, self._wait = model, batch_size, wait
        self._depth, self._seen = depth, seen
        self._jobs: collections.deque[_Job] = collections.deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items that wait."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self._thread.is_alive() and not self._stopping

    async def answers(self, work: Work, items: Sequence[Any]) -> list[Any]:
        """The last answer to each item, in order. Raises ValueError as the work does, Refused when
        too many wait."""
        streams = self._submit(work, items)
        return list(await asyncio.gather(*(_last(stream) for stream in streams)))

    def stream(self, work: Work, item: Any) -> AsyncIterator[Any]:
        """The answers to an item as they come. Raises as `answers`."""
        return self._submit(work, [item])[0]

    def _submit(self, work: Work, items: Sequence[Any]) -> list[AsyncIterator[Any]]:
        loop = asyncio.get_running_loop()
        with self._changed:
            if self._stopping:
                raise Refused(503, STOPPING)
            check_room(len(items), len(self._jobs), self._depth)
            streams = []
            for item in items:
                answers: asyncio.Queue[Any] = asyncio.Queue()
                job = _Job(work, item, _sender(loop, answers), threading.Event())
                self._jobs.append(job)
                streams.append(_read(answers, job.left))
            self._changed.notify()
        return streams

    def stop(self, seconds: float = 60.0) -> bool:
        """Answers what waits, then ends the thread; waits for that no longer than `seconds`.
        Returns whether it has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _take(self) -> list[_Job]:
        """The next batch; [] when stopping."""
        with self._changed:
            while not self._jobs:
                if self._stopping:
                    return []
                self._changed.wait()
            work, end = self._jobs[0].work, time.monotonic() + self._wait
            while True:
                same = [job for job in self._jobs if job.work == work][: self._batch_size]
                left = end - time.monotonic()
                if len(same) == self._batch_size or left <= 0 or self._stopping:
                    break
                self._changed.wait(left)
            taken = set(map(id, same))
            self._jobs = collections.deque(job for job in self._jobs if id(job) not in taken)
            return same

    def _run(self) -> None:
        while jobs := self._take():
            wanted = [job for job in jobs if not job.left.is_set()]
            if wanted:
                self._seen(len(wanted))
                self._answer(wanted)

    def _answer(self, jobs: list[_Job]) -> None:
        begun = False
        try:
            for answers in jobs[0].work.run(self._model, [job.item for job in jobs]):
                begun = True
                for job, answer in zip(jobs, answers):
                    if answer is not None:
                        job.send(answer)
                if all(job.left.is_set() for job in jobs):
                    return
            end = _End()
        except Exception as error:  # whoever asked is told; the thread goes on
            if isinstance(error, ValueError) and len(jobs) > 1 and not begun:
                for job in jobs:  # one of them cannot be: the others are answered
                    self._answer([job])
                return
            if not isinstance(error, ValueError):
                logging.getLogger("coca_jax").exception("a batch failed")
            end = _End(error)
        for job in jobs:
            job.send(end)


def _sender(loop: asyncio.AbstractEventLoop, answers: asyncio.Queue[Any]) -> Callable[[Any], None]:
    def send(answer: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(answers.put_nowait, answer)

    return send


async def _read(answers: asyncio.Queue[Any], left: threading.Event) -> AsyncIterator[Any]:
    try:
        while True:
            answer = await answers.get()
            if isinstance(answer, _End):
                if answer.error:
                    raise answer.error
                return
            yield answer
    finally:
        left.set()


async def _last(stream: AsyncIterator[Any]) -> Any:
    last = None
    async for answer in stream:
        last = answer
    return last


# What the model is asked, in batches. Each class says what its items are, and what is answered.
#
# Pixels are what `model.fit_image` gives. Answers are ready for JSON.


@dataclasses.dataclass(frozen=True)
class Captions:
    """Items: (pixels, prompt). Answers: {"captions": [...], "attention"}; with explain each caption
    has its words."""

    settings: Settings
    explain: bool = False

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        pixels, prompts = np.stack([one for one, _ in items]), [prompt for _, prompt in items]
        # The same number for all: an image's captions do not depend on its company.
        found = model.captions(
            pixels, prompts, seeds=[0] * len(items), **dataclasses.asdict(self.settings)
        )
        yield _captions(model, pixels, found, self.explain)


@dataclasses.dataclass(frozen=True)
class StreamedCaptions:
    """Items and the last answer: as of Captions. Before it comes {"tokens": [...]} after each
    token, one for each caption that is still written."""

    settings: Settings
    explain: bool = False

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        pixels, prompts = np.stack([one for one, _ in items]), [prompt for _, prompt in items]
        how = dataclasses.asdict(self.settings)
        written: list[list[Caption]] = []
        for now in model.stream_captions(pixels, prompts, seeds=[0] * len(items), **how):
            before = written or [[None] * len(row) for row in now]
            yield [_tokens(*pair) for pair in zip(before, now)]
            written = now
        for row in written:
            row.sort(key=lambda caption: -caption.log_prob)
        yield _captions(model, pixels, written, self.explain)


def _tokens(before: list[Any], now: list[Caption]) -> dict[str, Any] | None:
    new = [
        dict(
            caption=place,
            text=caption.text.rstrip("\ufffd"),
            probability=_probability(caption.log_prob - (old.log_prob if old else 0.0)),
            end=caption.finished,
        )
        for place, (old, caption) in enumerate(zip(before, now))
        if old is None or caption.num_tokens > old.num_tokens
    ]
    return dict(tokens=new) if new else None


@dataclasses.dataclass(frozen=True)
class Explain:
    """Items: (pixels, text). Answers: {"captions": [the text with its words], "attention"}; a text
    that was cut to fit is not finished."""

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        texts = [text for _, text in items]
        found = model.explain(np.stack([one for one, _ in items]), texts)
        room = model.max_len - 2  # the begin and the end symbol are always there
        whole = [len(ids) <= room for ids in model.vocabulary.encode_many(texts)]
        yield [
            dict(captions=[_explained(*told)], attention=_rounded(told[1].attention))
            for told in zip(texts, found, whole)
        ]


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Items: pixels. Answers: {"labels": [{"label", "probability"}], the most probable first,
    "cut": whether the model has read a beginning of a label in its sentence alone}.
    template: the sentence around a label; '': those of `model.zero_shot`."""

    labels: tuple[str, ...]
    template: str

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        with text_arrays.noting_cuts() as cuts:
            found = model.zero_shot(np.stack(items), self.labels, self.template or None)
        cut = any(cuts.rows)
        yield [dict(labels=_ranked(self.labels, row), cut=cut) for row in found]


@dataclasses.dataclass(frozen=True)
class Head:
    """Items: (pixels, of a head over pairs [2, ...]; question or ''). Answers: {"labels": [...]},
    the k most probable classes of the task head, and of one that reads a question "cut", as
    `Answer`."""

    k: int

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        reads = bool(model.head_kind and model.head_kind.reads_text)
        texts = [question for _, question in items] if reads else None
        found = model.classify(np.stack([one for one, _ in items]), texts)
        told = [dict(labels=_ranked(model.class_names, row)[: self.k]) for row in found]
        yield [one | cut for one, cut in zip(told, _cuts(model, texts))] if texts else told


@dataclasses.dataclass(frozen=True)
class Answer:
    """Items: (pixels, question). Answers: {"answer", as the decoder writes it, "cut": whether the
    model has read a beginning of the question alone}."""

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        pixels, questions = np.stack([one for one, _ in items]), [text for _, text in items]
        found = model.answer(pixels, questions)
        yield [dict(answer=text) | cut for text, cut in zip(found, _cuts(model, questions))]


def _cuts(model: CoCaModel, questions: list[str]) -> list[dict[str, bool]]:
    """{"cut": whether it is longer than what the model reads} of each question."""
    encode, words = model.vocabulary.encode_question, model.vocabulary.encode_many(questions)
    read = [len(encode(question, model.max_len)) - 1 for question in questions]
    return [dict(cut=count < len(ids)) for count, ids in zip(read, words)]


@dataclasses.dataclass(frozen=True)
class EmbedImages:
    """Items: pixels. Answers: embeddings float32 [E]."""

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        yield list(model.encode_image(np.stack(items)))


@dataclasses.dataclass(frozen=True)
class EmbedTexts:
    """Items: texts. Answers: (embedding float32 [E], whether the model has read a beginning of the
    text alone)."""

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        with text_arrays.noting_cuts() as cuts:
            found = model.encode_text(items)
        yield list(zip(found, cuts.rows, strict=True))


def _captions(
    model: CoCaModel, pixels: np.ndarray, found: list[list[Caption]], explain: bool
) -> list[dict[str, Any]]:
    if not explain:
        return [dict(captions=[_caption(one) for one in row]) for row in found]
    which = [number for number, row in enumerate(found) for _ in row]
    every = iter(model.explain(pixels[which], [one for row in found for one in row]))
    answers = []
    for row in found:
        reasons = [next(every) for _ in row]
        captions = [_caption(one) | dict(words=_words(reason)) for one, reason in zip(row, reasons)]
        answers.append(dict(captions=captions, attention=_rounded(reasons[0].attention)))
    return answers


def _caption(caption: Caption) -> dict[str, Any]:
    return dict(text=caption.text, log_prob=round(caption.log_prob, 4), finished=caption.finished)


def _explained(text: str, reason: Explanation, whole: bool) -> dict[str, Any]:
    total = sum(word.log_prob for word in reason.words)
    return dict(text=text, log_prob=round(total, 4), finished=whole, words=_words(reason))


def _words(reason: Explanation) -> list[dict[str, Any]]:
    return [_word(word) for word in reason.words]


def _word(word: Word) -> dict[str, Any]:
    others = [dict(text=text, probability=_probability(p)) for text, p in word.alternatives]
    return dict(
        text=word.text,
        probability=_probability(word.log_prob),
        alternatives=others,
        attention=_rounded(word.attention),
    )


def _ranked(names: Any, probabilities: np.ndarray) -> list[dict[str, Any]]:
    order = np.argsort(-probabilities, kind="stable")
    return [dict(label=names[i], probability=_short(float(probabilities[i]))) for i in order]


def _probability(log_prob: float) -> float:
    return _short(math.exp(min(log_prob, 0.0)))


def _short(probability: float) -> float:
    """Six digits of it."""
    return float(f"{probability:.6g}")


def _rounded(attention: np.ndarray) -> list[Any]:
    return np.round(attention.astype(np.float64), 5).tolist()
