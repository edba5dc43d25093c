"""Who does the shards of a work: this process, processes beside it, or workers on a Ray cluster.

`recaption`, `search index` and `prepare` cut their work into shards that are written one by one,
whole or not at all, and hand them to `Engine.run`. --shard=i/n does a share of them instead.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, process
from typing import Any, TypeVar

from absl import flags

from coca_jax.runtime import extras

NAMES = ("local", "ray")
_LOST = 10  # workers that are lost at one shard, or at their start, end the work

T = TypeVar("T")
Report = Callable[[int], None]  # is called with the number of items done since the last call


@dataclasses.dataclass(frozen=True)
class Engine:
    """Where shards are done, and which of them.

    Attributes:
        name: one of NAMES.
        workers: of 'ray', how many; 0: for a work with a model one a GPU, or one a node where the
            cluster has none; for others one a core.
        share: 'i/n': every n-th shard from the i-th, which counts from 0; '': all.

    Raises:
        ValueError: another name, workers without Ray, or a share that is not two such numbers.
    """

    name: str = "local"
    workers: int = 0
    share: str = ""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"--engine={self.name}: use one of {', '.join(NAMES)}")
        if self.workers and self.name != "ray":
            raise ValueError(f"--workers={self.workers}: it is of --engine=ray; leave it out")
        i, _, n = self.share.partition("/")
        if self.share and not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
            raise ValueError(f"--shard={self.share}: give i/n, i from 0 to n - 1, such as 0/8")

    def own(self, jobs: Sequence[T]) -> list[T]:
        """The shards of the share."""
        if not self.share:
            return list(jobs)
        i, _, n = self.share.partition("/")
        return list(jobs[int(i) :: int(n)])

    def run(
        self,
        work: Callable[[Any, Report], T],
        jobs: Sequence[Any],
        report: Report,
        *,
        processes: int = 1,
        models: bool = False,
    ) -> list[T]:
        """work(job, report) for each job; what it returned, in the order of the jobs.

        Args:
            work: a function of a module, or an object that is pickled to each worker and stays
                there, so that it may load a model at its first job. Done again, a job writes the
                same.
            processes: of 'local', how many at a time; 1: this one.
            models: whether the work runs a model.

        Raises:
            ValueError, OSError: what the work raises of bad input; no Ray; a process that was
                ended; or a shard at which one worker after the other was lost.
        """
        if self.name == "ray":
            return _on_ray(work, jobs, report, self.workers, models) if jobs else []
        if min(processes, len(jobs)) <= 1:
            return [work(job, report) for job in jobs]
        return _in_processes(work, jobs, report, min(processes, len(jobs)))


def define_flags() -> None:
    """Defines --engine, --workers and --shard; `of_flags` reads them."""
    flags.DEFINE_enum("engine", "local", NAMES, "ray: on the cluster of RAY_ADDRESS.")
    flags.DEFINE_integer(
        "workers",
        0,
        "ray: how many; 0: one a GPU, or a node, where a model runs, else one a core.",
        lower_bound=0,
    )
    flags.DEFINE_string("shard", "", "i/n: do each n-th shard from the i-th, from 0.")


def of_flags() -> Engine:
    """What the flags say. Raises ValueError as `Engine` does."""
    return Engine(flags.FLAGS.engine, flags.FLAGS.workers, flags.FLAGS.shard)


# ---- processes of this machine

_queue: Any = None  # in a process: where it reports what it has read
_function: Callable[[Any, Report], Any]


def _start(work: Callable[[Any, Report], Any], queue: Any) -> None:
    global _function, _queue
    _function, _queue = work, queue


def _do(job: Any) -> Any:
    return _function(job, _queue.put)


def _in_processes(
    work: Callable[[Any, Report], T], jobs: Sequence[Any], report: Report, processes: int
) -> list[T]:
    """Once a job has failed no other begins; those that run are finished, and are kept."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    begun: list[concurrent.futures.Future[T]] = []
    waiting: set[concurrent.futures.Future[T]] = set()
    with concurrent.futures.ProcessPoolExecutor(processes, context, _start, (work, queue)) as pool:
        try:
            left = list(jobs)[::-1]
            while left or waiting:
                # Not all at once: what a pool has handed on to its processes cannot be taken back.
                while left and len(waiting) < processes:
                    begun.append(pool.submit(_do, left.pop()))
                    waiting.add(begun[-1])
                done, waiting = concurrent.futures.wait(waiting, 0.2, FIRST_COMPLETED)
                if any(future.exception() for future in done):
                    left.clear()
                while not queue.empty():
                    report(queue.get())
            return [future.result() for future in begun]
        except process.BrokenProcessPool:
            raise OSError(
                "a worker process was ended, perhaps for want of memory: run again with fewer "
                f"--processes than {processes}; finished shards are kept"
            ) from None


# ---- Ray


class _Worker:
    """A process of the cluster."""

    def __init__(self, work: Callable[[Any, Report], Any], folder: str) -> None:
        if os.path.isdir(folder):  # a shared file system: relative paths mean the same there
            os.chdir(folder)
        self._work = work

    def ready(self) -> None:
        """Returns once the process runs."""

    def do(self, job: Any) -> tuple[Any, int]:
        """Does a job; returns what came of it and the number of its items."""
        done: list[int] = []
        return self._work(job, done.append), sum(done)


def _on_ray(
    work: Callable[[Any, Report], T],
    jobs: Sequence[Any],
    report: Report,
    workers: int,
    models: bool,
) -> list[T]:
    """On the cluster that RAY_ADDRESS names, or on one that starts here."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ValueError(f"--engine=ray needs Ray: {extras.remedy('ray')}") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0)) if models else 0
        each = dict(num_gpus=1) if gpus else dict(num_cpus=1)
        usual = gpus or (len(ray.nodes()) if models else int(there.get("CPU", 1)))
        worker = ray.remote(max_restarts=0, scheduling_strategy="SPREAD", **each)(_Worker)
        pool = _Pool(ray, lambda: worker.remote(work, os.getcwd()), jobs, report)
        return pool.run(min(workers or usual, len(jobs)))
    finally:
        if ours:
            ray.shutdown()


class _Pool:
    """Workers, each of which takes the next job when it is ready and when it has done one.

    So a work begins with the first worker for which there is a place, more come as the cluster
    grows, and those that never come are not waited for. The job of a worker that is lost goes to
    another one.
    """

    def __init__(
        self, ray: Any, make: Callable[[], Any], jobs: Sequence[Any], report: Report
    ) -> None:
        self._ray, self._make, self._jobs, self._report = ray, make, jobs, report
        self._waiting = list(range(len(jobs)))[::-1]
        self._running: dict[Any, tuple[Any, int | None]] = {}  # a job's number; None: it starts
        self._lost: Counter[int | None] = Counter()

    def run(self, workers: int) -> list[Any]:
        """What came of each job."""
        found: dict[int, Any] = {}
        try:
            for _ in range(workers):
                self._start()
            while len(found) < len(self._jobs):
                (first,), _ = self._ray.wait(list(self._running))
                worker, number = self._running.pop(first)
                try:
                    result = self._ray.get(first)
                except self._ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, (ValueError, OSError)):
                        raise error.cause from None  # bad input, which a line tells
                    raise
                except self._ray.exceptions.RayError as error:
                    self._again(worker, number, error)
                    continue
                if number is None:
                    self._lost[None] = 0
                else:
                    found[number], items = result
                    self._report(items)
                self._next(worker)
        finally:
            for worker, _ in self._running.values():
                self._ray.kill(worker)
        return [found[number] for number in range(len(self._jobs))]

    def _start(self) -> None:
        worker = self._make()
        self._running[worker.ready.remote()] = worker, None

    def _next(self, worker: Any) -> None:
        if self._waiting:
            number = self._waiting.pop()
            self._running[worker.do.remote(self._jobs[number])] = worker, number
        else:
            self._ray.kill(worker)  # gives its place back

    def _again(self, worker: Any, number: int | None, error: Exception) -> None:
        """In the place of a worker that was lost another one starts."""
        self._ray.kill(worker)  # one that only cannot be reached would write on
        self._lost[number] += 1
        if self._lost[number] == _LOST:
            what = "before they began" if number is None else f"at shard {number}"
            why = " ".join(str(error).split())
            raise OSError(f"--engine=ray: {_LOST} workers were lost {what}; the last: {why}")
        if number is not None:
            self._waiting.append(number)
        self._start()
