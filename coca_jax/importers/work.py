"""Does the shards of an import: their fingerprints, then the shards, on whichever engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from coca_jax.console import activity, bars
from coca_jax.engines import Engine
from coca_jax.importers import dedup, shards
from coca_jax.importers.items import Options
from coca_jax.machine import cores


@dataclasses.dataclass(frozen=True)
class Hands:
    """engine: who does the shards. processes: of engine 'local'; 0: one per core. progress: shows
    how far they are."""

    engine: Engine = Engine()
    processes: int = 0
    progress: bool = True

    def do(self, function: Callable, jobs: list[shards.Job], what: str) -> list[Any]:
        """function(job, report) for each job, in their order."""
        known = all(unit.rows for job in jobs for unit in job.units)
        total = sum(unit.rows for job in jobs for unit in job.units) if known else None
        processes = self.processes or cores.count()
        # In-memory files exist in this process only.
        if any("memory://" in path for job in jobs for path in (job.work, job.units[0].path)):
            processes = 1
        with bars.Bar(total, "examples", what, shown=self.progress) as bar:
            return self.engine.run(function, jobs, bar.update, processes=processes)


def written(jobs: list[shards.Job], options: Options, hands: Hands) -> list[dict[str, Any] | None]:
    """Writes the shards that no earlier run has finished, and returns what was written of each;
    None of one that is another's to write, or waits for what others have still to read."""
    if options.dedup != "none" or options.exclude:
        hands.do(shards.scan, hands.engine.own(jobs), "fingerprints")
        scanned = shards.of_each(shards.scanned, jobs)
        known = [entries for entries in scanned if entries is not None]
        if len(known) < len(jobs):
            return [None] * len(jobs)
        with activity.saying(f"comparing {sum(map(len, known))} images"):
            jobs = _deduplicated(jobs, known, options)
    numbers = [job.number for job in jobs]
    found = dict(zip(numbers, shards.of_each(shards.finished, jobs)))
    left = [job for job in hands.engine.own(jobs) if not found[job.number]]
    found |= zip((job.number for job in left), hands.do(shards.write, left, "prepare"))
    return list(found.values())


def _deduplicated(
    jobs: list[shards.Job],
    scanned: list[list[tuple[int, int, str, str, str, str]]],
    options: Options,
) -> list[shards.Job]:
    """Tells each job what to leave out, by the fingerprints of all. Rows of one split that name the
    same file are no duplicates: they go or stay together."""
    every = [(job.number, entry) for job, entries in zip(jobs, scanned) for entry in entries]
    of_file: dict[tuple[int, str], tuple[int, int]] = {}
    like: dict[tuple[int, int], tuple[int, int]] = {}
    found = []
    for shard, (rank, number, key, place, content, look) in sorted(
        every, key=lambda one: one[1][0]
    ):
        here = shard, number
        like[here] = of_file.setdefault((rank, place), here) if place else here
        if like[here] == here:
            found.append((shard, number, key, content, look))
    exclude = [one for path in options.exclude for one in dedup.to_exclude(path)]
    drop = dedup.decide(found, options.dedup, options.distance, exclude)
    told: dict[int, dict[int, str]] = {job.number: {} for job in jobs}
    for (shard, number), first in like.items():
        if first in drop:
            told[shard][number] = drop[first]
    return [dataclasses.replace(job, drop=told[job.number]) for job in jobs]
