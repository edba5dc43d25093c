"""Batch sizes that grow over a run: which rows each step has, as a function of the step alone.

`config.batch_sizes` gives ((share of the steps, size), ...), after which comes `config.batch_size`.
Every source's stream of examples goes on through the stages: what one has taken the next does not
take again before the epoch's end.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from coca_jax.config import Config


class Stage(NamedTuple):
    """Steps whose batches have the same rows.

    Attributes:
        first: of these steps.
        shares: rows of each source in a batch.
        taken: examples of each source in all batches before.
    """

    first: int
    shares: list[int]
    taken: list[int]

    def seen(self, step: int) -> list[int]:
        """Examples of each source in the batches before a step of this stage."""
        return [
            taken + (step - self.first) * share for taken, share in zip(self.taken, self.shares)
        ]


def sizes(config: Config) -> list[int]:
    """All batch sizes of a run, in their order."""
    return [*(int(size) for _, size in config.batch_sizes), config.batch_size]


def steps_of(config: Config, num_examples: int) -> int:
    """Steps of a run: config.steps, or as many as make config.epochs passes over the data."""
    if config.steps:
        return config.steps
    shares = [share for share, _ in config.batch_sizes]
    mean = sum(s * n for s, n in zip((*shares, rest(shares)), sizes(config)))
    return round(config.epochs * num_examples / mean)


def rest(shares: Sequence[float]) -> float:
    """The share of a run that those of its stages leave for the size behind them."""
    return max(0.0, 1 - math.fsum(shares))


def starts(shares: Sequence[float], steps: int) -> list[int]:
    """The first step of each stage of a run of so many, of sizes of batches or of images: the
    smallest from which on at least the shares before it are done. Stages that are given no step
    begin where the next one does."""
    found, done = [0], 0.0
    for share in shares:
        done += share
        found.append(min(steps, math.ceil(round(done * steps, 6))))
    return found


def of(config: Config, steps: int, shares: Callable[[int], Sequence[int]]) -> list[Stage]:
    """The stages of a run of so many steps; shares: rows of each source in a batch of a size."""
    found: list[Stage] = []
    parts = [share for share, _ in config.batch_sizes]
    for first, size in zip(starts(parts, config.stage_steps or steps), sizes(config)):
        rows = list(shares(size))
        taken = found[-1].seen(first) if found else [0] * len(rows)
        found.append(Stage(first, rows, taken))
    return found


def number_at(stages: Sequence[Stage], step: int) -> int:
    """Which stage a step is in."""
    return bisect.bisect_right([stage.first for stage in stages], step) - 1


def words(config: Config) -> str:
    """The batch sizes as people read them: '64' or '16, then 32, then 64'."""
    return ", then ".join(f"{size:,}" for size in sizes(config))
