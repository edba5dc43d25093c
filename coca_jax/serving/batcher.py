"""Requests wait for others of their kind, and one thread asks the model for all of them at once."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from coca_jax.serving.refusals import STOPPING, Refused, check_room


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
