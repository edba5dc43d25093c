"""Dynamic batching: requests of one kind wait a few milliseconds for each other and run together.

One thread uses the model. The event loop owns the queue, so no locks are needed. Each class of work
below says what the model is asked for a batch; equal works (they are hashable) share a batch.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from coca_jax.inference import tokenization
from coca_jax.inference.explain import Explanation
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.inference.model import CoCaModel
from coca_jax.inference.tokenization import Caption


class Work(Protocol):
    """What the model computes for a batch of (pixels or None, text)."""

    def run(self, model: Any, pixels: list[Any], texts: list[str]) -> Iterator[list[Any]]:
        """Yields lists with an answer, or None, for each item; the last list is the result. Raises
        ValueError for an item that the model cannot take."""


@dataclasses.dataclass(eq=False)
class _Job:
    work: Work
    pixels: Any
    text: str
    loop: asyncio.AbstractEventLoop
    answers: asyncio.Queue[Any] = dataclasses.field(default_factory=asyncio.Queue)
    abandoned: bool = False  # nobody waits for it any more

    def send(self, answer: Any) -> None:
        """Called from the model's thread. None ends the answers; an exception is raised."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.answers.put_nowait, answer)

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            while (answer := await self.answers.get()) is not None:
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            self.abandoned = True

    async def last(self) -> Any:
        """The last answer."""
        async with contextlib.aclosing(aiter(self)) as answers:  # type: ignore[type-var]
            return [answer async for answer in answers][-1]


class Batcher:
    """Runs queued jobs in batches.

    Args:
        model: passed to `Work.run`.
        batch_size: largest batch.
        wait: seconds that the first job of a batch waits for others, while requests overlap.
        seen: called with the size of each batch.
    """

    def __init__(
        self, model: Any, *, batch_size: int, wait: float, seen: Callable[[int], Any] = int
    ):
        self._model, self._batch_size, self._wait, self._seen = model, batch_size, wait, seen
        self._jobs: collections.deque[_Job] = collections.deque()
        self._arrived = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "model")
        self._running = threading.Lock()
        self._last = 0  # size of the last batch

    def submit(self, work: Work, pixels: Any, text: str = "") -> _Job:
        """Queues a job; iterate over it for its answers, or await `last`."""
        job = _Job(work, pixels, text, asyncio.get_running_loop())
        self._jobs.append(job)
        self._arrived.set()
        return job

    async def run(self) -> None:
        """Runs batches until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if jobs := await self._next():
                self._seen(len(jobs))
                await loop.run_in_executor(self._thread, self._run, jobs)

    def close(self, seconds: float) -> bool:
        """Ends the thread. Waits for its batch at most `seconds`; returns whether it has ended."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + seconds
        while self._running.locked() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self._running.locked()

    async def _next(self) -> list[_Job]:
        while not self._jobs:
            self._arrived.clear()
            await self._arrived.wait()
        work, loop = self._jobs[0].work, asyncio.get_running_loop()
        # A lone client does not wait: requests have not overlapped since the last batch.
        wait = self._wait if len(self._jobs) > 1 or self._last > 1 else 0.0
        deadline = loop.time() + wait
        while True:
            same = [job for job in self._jobs if job.work == work][: self._batch_size]
            if len(same) == self._batch_size or loop.time() >= deadline:
                break
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
        self._jobs = collections.deque(job for job in self._jobs if job not in same)
        self._last = len(same)
        return [job for job in same if not job.abandoned]

    def _run(self, jobs: list[_Job]) -> None:
        with self._running:
            self._answer(jobs)

    def _answer(self, jobs: list[_Job]) -> None:
        started = False
        end: Exception | None = None
        try:
            pixels, texts = [job.pixels for job in jobs], [job.text for job in jobs]
            for answers in jobs[0].work.run(self._model, pixels, texts):
                started = True
                for job, answer in zip(jobs, answers):
                    if answer is not None:
                        job.send(answer)
                if all(job.abandoned for job in jobs):
                    return
        except ValueError as error:
            if len(jobs) > 1 and not started:  # one bad item must not fail the others
                for job in jobs:
                    self._answer([job])
                return
            end = error
        except Exception as error:
            logging.exception("a batch failed")
            end = RuntimeError(type(error).__name__)
        for job in jobs:
            job.send(end)


# -- what the model is asked -----------------------------------------------------------------------
# Pixels are what `model.fit_image` returns; answers are ready for JSON.


@dataclasses.dataclass(frozen=True)
class Captions:
    """Text: the prompt. Answer: {"captions": [...], "attention"}; `explain` adds to each caption its
    words and its similarity to the picture."""

    config: GenerationConfig
    explain: bool = False

    def run(self, model: CoCaModel, pixels: list[Any], texts: list[str]) -> Iterator[list[Any]]:
        """See the class."""
        images = np.stack(pixels)
        # Equal seeds: captions of an image must not depend on what else is in the batch.
        seeds = [0] * len(images)
        found = model.captions(images, self.config, prompt=texts, seeds=seeds)
        yield _captions(model, images, found, self.explain)


@dataclasses.dataclass(frozen=True)
class StreamedCaptions:
    """As Captions; before the result come {"tokens": [...]}, one for each unfinished caption."""

    config: GenerationConfig
    explain: bool = False

    def run(self, model: CoCaModel, pixels: list[Any], texts: list[str]) -> Iterator[list[Any]]:
        """See the class."""
        images, seeds = np.stack(pixels), [0] * len(pixels)
        before: list[list[Caption | None]] = []
        found: list[list[Caption]] = []
        for found in model.stream_captions(images, self.config, prompt=texts, seeds=seeds):
            before = before or [[None] * len(row) for row in found]
            yield [_tokens(*pair) for pair in zip(before, found)]
            before = list(map(list, found))
        for row in found:
            row.sort(key=lambda caption: -caption.log_prob)
        yield _captions(model, images, found, self.explain)


def _tokens(before: list[Caption | None], now: list[Caption]) -> dict[str, Any] | None:
    new = [
        dict(
            caption=number,
            text=caption.text.rstrip("\ufffd"),  # half of a character
            probability=_probability(caption.log_prob - (old.log_prob if old else 0.0)),
            end=caption.finished,
        )
        for number, (old, caption) in enumerate(zip(before, now))
        if old is None or caption.num_tokens > old.num_tokens
    ]
    return dict(tokens=new) if new else None


@dataclasses.dataclass(frozen=True)
class Explain:
    """Answer: as Captions, of the given text; `finished` is false where it was cut to fit."""

    def run(self, model: CoCaModel, pixels: list[Any], texts: list[str]) -> Iterator[list[Any]]:
        """See the class."""
        found = model.explain(np.stack(pixels), texts)
        room = model.max_len - 2  # besides the begin and the end symbol
        fits = [len(ids) <= room for ids in model.vocabulary.encode_many(texts)]
        answers = []
        for text, reason, finished in zip(texts, found, fits):
            total = sum(word.log_prob for word in reason.words)
            caption = _caption(Caption(text, total, len(reason.words), finished))
            answers.append(dict(captions=[caption], attention=_rounded(reason.attention)))
            caption["words"] = _words(reason)
        yield answers


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Answer: {"labels": [...], the most probable first, "cut": whether a label is longer than what
    the model reads}. template: sentence with `{}`; '': the default of `model.zero_shot`."""

    labels: tuple[str, ...]
    template: str

    def run(self, model: CoCaModel, pixels: list[Any], texts: list[str]) -> Iterator[list[Any]]:
        """See the class."""
        with tokenization.noting_cuts() as cuts:
            found = model.zero_shot(np.stack(pixels), self.labels, self.template or None)
        yield [dict(labels=_ranked(self.labels, row), cut=any(cuts.rows)) for row in found]


@dataclasses.dataclass(frozen=True)
class Head:
    """Answer: {"labels": the k most probable classes of the task head}; "cut" as Answer, of heads
    that read a question."""

    k: int

    def run(self, model: CoCaModel, pixels: list[Any], texts: list[str]) -> Iterator[list[Any]]:
        """See the class."""
        reads = bool(model.head_kind and model.head_kind.reads_text)
        found = model.classify(np.stack(pixels), texts if reads else None)
        cuts = _cuts(model, texts) if reads else [{}] * len(found)
        ranked = [_ranked(model.class_names, row)[: self.k] for row in found]
        yield [dict(labels=labels) | cut for labels, cut in zip(ranked, cuts)]


@dataclasses.dataclass(frozen=True)
class Answer:
    """Text: the question. Answer: {"answer": text, "cut": whether the question was cut}."""

    def run(self, model: CoCaModel, pixels: list[Any], texts: list[str]) -> Iterator[list[Any]]:
        """See the class."""
        found = model.answer(np.stack(pixels), texts)
        yield [dict(answer=text) | cut for text, cut in zip(found, _cuts(model, texts))]


def _cuts(model: CoCaModel, questions: list[str]) -> list[dict[str, bool]]:
    words = model.vocabulary.encode_many(questions)
    read = [len(model.vocabulary.encode_question(one, model.max_len)) - 1 for one in questions]
    return [dict(cut=count < len(ids)) for count, ids in zip(read, words)]


@dataclasses.dataclass(frozen=True)
class EmbedImages:
    """Answer: float32 [E]."""

    def run(self, model: CoCaModel, pixels: list[Any], texts: list[str]) -> Iterator[list[Any]]:
        """See the class."""
        yield list(model.encode_image(np.stack(pixels)))


@dataclasses.dataclass(frozen=True)
class EmbedTexts:
    """Answer: (float32 [E], whether the text was cut)."""

    def run(self, model: CoCaModel, pixels: list[Any], texts: list[str]) -> Iterator[list[Any]]:
        """See the class."""
        with tokenization.noting_cuts() as cuts:
            found = model.encode_text(texts)
        yield list(zip(found, cuts.rows, strict=True))


def _captions(
    model: CoCaModel, images: np.ndarray, found: Sequence[Sequence[Caption]], explain: bool
) -> list[dict[str, Any]]:
    if not explain:
        return [dict(captions=[_caption(one) for one in row]) for row in found]
    which = [number for number, row in enumerate(found) for _ in row]
    every = [one for row in found for one in row]
    reasons = iter(model.explain(images[which], every))
    texts = model.encode_text([caption.text for caption in every])
    # The cosine separates a familiar picture from a strange one better than the probabilities do:
    # on the demo model, scenes against emoji, an AUC of 0.82 instead of 0.79.
    similar = iter(np.einsum("ne,ne->n", model.encode_image(images)[which], texts))
    answers = []
    for row in found:
        scored = [(_caption(one), next(reasons), float(next(similar))) for one in row]
        captions = [one | dict(words=_words(why), similarity=round(x, 4)) for one, why, x in scored]
        answers.append(dict(captions=captions, attention=_rounded(scored[0][1].attention)))
    return answers


def _caption(caption: Caption) -> dict[str, Any]:
    return dict(
        text=caption.text,
        log_prob=round(caption.log_prob, 4),
        # Geometric mean of the tokens' probabilities: unlike log_prob it doesn't depend on length.
        confidence=_probability(caption.log_prob / max(caption.num_tokens, 1)),
        finished=caption.finished,
    )


def _words(reason: Explanation) -> list[dict[str, Any]]:
    return list(map(_word, reason.words))


def _word(word: Any) -> dict[str, Any]:
    others = [dict(text=text, probability=_probability(p)) for text, p in word.alternatives]
    return dict(
        text=word.text,
        probability=_probability(word.log_prob),
        alternatives=others,
        attention=_rounded(word.attention),
    )


def _ranked(names: Any, probabilities: np.ndarray) -> list[dict[str, Any]]:
    order = np.argsort(-probabilities, kind="stable")
    return [dict(label=names[i], probability=_short(probabilities[i])) for i in order]


def _probability(log_prob: float) -> float:
    return _short(math.exp(min(log_prob, 0.0)))


def _short(probability: float) -> float:
    return float(f"{probability:.6g}")


def _rounded(attention: np.ndarray) -> list[Any]:
    return np.round(attention.astype(np.float64), 5).tolist()
