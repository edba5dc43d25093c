"""Who does the shards: this process, or actors of a Ray cluster."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import tqdm

from coca_jax import extras
from coca_jax.importers.shards import Job
from coca_jax.recaptioning import shard, whole
from coca_jax.recaptioning.captioner import Captioner
from coca_jax.recaptioning.request import Request

ENGINES = ("local", "ray")


def run(
    request: Request,
    jobs: Sequence[Job],
    own: Sequence[Job],
    *,
    engine: str = "local",
    workers: int = 0,
    say: Callable[[str], None],
    progress: bool,
) -> dict[str, Any]:
    """Does the shards `own` of all `jobs`; returns what is there afterwards.

    workers: of engine 'ray', processes; 0: as many as the cluster has GPUs, else nodes.

    Returns:
        What `whole.finish` does, or {"waiting": shards that others have still to do}; spent: the
        seconds of this process by what they went to.
    """
    seconds: dict[str, float] = {}
    left = [job for job in own if not shard.is_captioned(job)]
    if left:
        say(f"loading {', '.join(request.checkpoints)}")
        known = [unit.rows for job in left for unit in job.units]
        with tqdm.tqdm(
            total=sum(known) if all(known) else None, unit="image", disable=not progress
        ) as bar:
            if engine == "ray":
                _on_ray(request, jobs, left, workers, bar.update)
            else:
                captioner = _loaded(request)
                for job in left:
                    _do(request, jobs, job, captioner, bar.update)
                seconds = {what: round(took, 2) for what, took in captioner.seconds.items()}
    waiting = _write(request, jobs, own)
    return (waiting or _end(request, jobs)) | dict(spent=seconds)


def _loaded(request: Request) -> Captioner:
    captioner = Captioner(request)
    whole.begin(request, captioner.checksums())
    return captioner


def _do(
    request: Request,
    jobs: Sequence[Job],
    job: Job,
    captioner: Captioner,
    report: Callable[[int], None],
) -> None:
    shard.caption(job, captioner, report)
    if not request.quantile:  # which only all captions together tell
        _write(request, jobs, [job])


def _write(request: Request, jobs: Sequence[Job], own: Sequence[Job]) -> dict[str, Any]:
    """Writes shards; what they wait for, or {}."""
    least = whole.threshold(request, jobs)
    if least is None:
        return dict(waiting=sum(not shard.is_captioned(job) for job in jobs))
    for job in own:
        shard.write(job, request, least, whole.name(request, jobs, job))
    return {}


def _end(request: Request, jobs: Sequence[Job]) -> dict[str, Any]:
    least = whole.threshold(request, jobs)
    told = None if least is None else whole.finish(request, jobs, least)
    if told is None:
        return dict(waiting=sum(shard.account(job) is None for job in jobs))
    return told


# ---- Ray


class _Worker:
    """A process of the cluster, with the models of a request."""

    def __init__(self, request: Request, jobs: Sequence[Job]) -> None:
        self._request, self._jobs = request, list(jobs)
        self._captioner: Captioner | None = None

    def do(self, job: Job) -> int:
        """Does a shard; returns the number of its images."""
        if self._captioner is None:
            self._captioner = _loaded(self._request)
        done: list[int] = []
        _do(self._request, self._jobs, job, self._captioner, done.append)
        return sum(done)


def _on_ray(
    request: Request,
    jobs: Sequence[Job],
    left: Sequence[Job],
    workers: int,
    report: Callable[[int], None],
) -> None:
    """Does shards on the cluster that RAY_ADDRESS names, or on one that starts here.

    Ray starts a lost worker anew, and its shard is done again from the last part that it saved.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ValueError(f"--engine=ray needs Ray: {extras.remedy('ray')}") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    count = min(workers or gpus or len(ray.nodes()), len(left))
    of_worker = dict(num_gpus=1) if gpus else dict(num_cpus=1)
    worker = ray.remote(max_restarts=-1, max_task_retries=-1, **of_worker)(_Worker)
    pool = [worker.remote(request, jobs) for _ in range(count)]
    waiting = list(left)[::-1]
    running = {one.do.remote(waiting.pop()): one for one in pool}
    while running:
        (done,), _ = ray.wait(list(running))
        one = running.pop(done)
        try:
            report(ray.get(done))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (ValueError, OSError)):
                raise error.cause from None  # bad input, which a line tells
            raise
        if waiting:
            running[one.do.remote(waiting.pop())] = one
    for one in pool:
        ray.kill(one)
