"""Does the shards of a work, on whichever engine, and writes what there is at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from coca_jax.console import bars
from coca_jax.engines import Engine, Report
from coca_jax.importers import shards
from coca_jax.importers.shards import Job
from coca_jax.recaptioning import shard, whole
from coca_jax.recaptioning.captioner import Captioner
from coca_jax.recaptioning.request import Request


def run(
    request: Request,
    jobs: Sequence[Job],
    engine: Engine,
    *,
    say: Callable[[str], None],
    progress: bool,
) -> dict[str, Any]:
    """Does the engine's share of all `jobs`; returns what is there afterwards.

    Returns:
        What `whole.finish` does, or {"waiting": shards that others have still to do}; spent: the
        seconds of the workers by what they went to.
    """
    own = engine.own(jobs)
    spent: Counter[str] = Counter()
    left = _without(own, shard.is_captioned)
    if left:
        if lost := list(filter(None, shards.of_each(shard.lost, left))):
            say(
                f"{request.out}: {len(lost)} of its files are gone or have another size, and are "
                f"written again: {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}"
            )
        field = request.options.text_field
        if field and not shard.first_have_texts(left[0]):  # the end says what all of them have
            say(
                f"warning: {request.input}: --text_field={field}: none of the first "
                f"{shard.LOOKED_AT} images has a text in it"
            )
        say(f"loading {', '.join(request.checkpoints)}")
        known = [unit.rows for job in left for unit in job.units]
        with bars.Bar(sum(known) if all(known) else None, "images", shown=progress) as bar:
            try:
                for seconds in engine.run(Work(request, jobs), left, bar.update, models=True):
                    spent.update(seconds)
            except shard.Untrustworthy:
                # --out may be used again, unless shards are there or other jobs make them.
                if not engine.share and not any(shards.of_each(shard.account, jobs)):
                    whole.remove(request, jobs)
                raise
    waiting = _write(request, jobs, own)
    told = waiting or _end(request, jobs)
    return told | dict(spent={what: round(took, 2) for what, took in spent.items()})


class Work:
    """Captions a shard; loads the models of a request at the first one."""

    def __init__(self, request: Request, jobs: Sequence[Job]) -> None:
        self._request, self._jobs = request, list(jobs)
        self._captioner: Captioner | None = None

    def __call__(self, job: Job, report: Report) -> dict[str, float]:
        """Returns seconds by what they went to."""
        if self._captioner is None:
            self._captioner = Captioner(self._request)
            whole.begin(self._request, self._captioner.checksums())
        before = dict(self._captioner.seconds)
        shard.caption(job, self._captioner, report)
        if not self._request.quantile:  # which only all captions together tell
            _write(self._request, self._jobs, [job])
        return {
            what: took - before.get(what, 0.0) for what, took in self._captioner.seconds.items()
        }


def _write(request: Request, jobs: Sequence[Job], own: Sequence[Job]) -> dict[str, Any]:
    """Writes shards; what they wait for, or {}."""
    least = whole.threshold(request, jobs)
    if least is None:
        return dict(waiting=len(_without(jobs, shard.is_captioned)))
    for job in _without(own, shard.account):
        shard.write(job, request, least, whole.name(request, jobs, job))
    return {}


def _end(request: Request, jobs: Sequence[Job]) -> dict[str, Any]:
    least = whole.threshold(request, jobs)
    told = None if least is None else whole.finish(request, jobs, least)
    if told is None:
        return dict(waiting=len(_without(jobs, shard.account)))
    return told


def _without(jobs: Sequence[Job], there: Callable[[Job], Any]) -> list[Job]:
    """Those of which what is asked for is not there."""
    return [job for job, found in zip(jobs, shards.of_each(there, jobs)) if not found]
