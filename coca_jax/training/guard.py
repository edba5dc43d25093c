"""Whether fine-tuning ruins what a model could do: its probe's scores against those at the start.

The probe is `config.eval.tasks`: retrieval and zero-shot, on data of the user's or on drawn scenes
(`data=dict(builtin='scenes')`). With `config.eval.guard` it is scored before the first step as well
as each `eval.every_steps` and at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coca_jax.config import Eval
from coca_jax.config.evaluation import GUARDED
from coca_jax.evaluation import history
from coca_jax.evaluation.evaluators.base import kinds


class LostTooMuch(ValueError):
    """A guarded score fell further than config.eval.most_lost allows."""

    def __init__(self, line: str, workdir: str):
        super().__init__(
            f"{line}; the run in {workdir} stops, and its checkpoints stay; "
            "--config.eval.guard=warn goes on"
        )


def check(config: Eval) -> None:
    """Raises ValueError for a guard without anything to watch."""
    if config.guard and not any(task.get("kind") in GUARDED for task in config.tasks):
        raise ValueError(
            f"eval.guard={config.guard!r} needs a task of kind {' or '.join(GUARDED)} in "
            "eval.tasks, as dict(kind='retrieval', name='probe', data=dict(path='data/probe'))"
        )


def lost(before: Mapping[str, Any], now: Mapping[str, Any], most: float) -> list[str]:
    """A line for each guarded score of which more than the share `most` of its first value is
    gone."""
    lines = []
    for name, value in now.items():
        evaluator, _, rest = name.partition("/")
        first = before.get(name)
        if not rest.endswith(f"/{GUARDED.get(evaluator, ' ')}") or not first or value is None:
            continue
        share = 1 - value / first
        if share > most:
            title = kinds()[evaluator].title.lower()
            lines.append(f"{title}: {name} is {value:.4f} and was {first:.4f}, {share:.0%} lost")
    return lines


def judge(workdir: str, config: Eval, step: int, scores: Mapping[str, Any]) -> str:
    """What the guard says of the scores after `step`; '' where nothing is lost."""
    rows = history.read(workdir)
    if not config.guard or not rows or rows[0]["step"] != 0 or not step:
        return ""
    lines = lost(rows[0]["scores"], scores, config.most_lost)
    if not lines:
        return ""
    return f"step {step} lost more than eval.most_lost={config.most_lost}: {'; '.join(lines)}"
