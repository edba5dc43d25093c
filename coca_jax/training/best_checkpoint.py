"""Which step of a run scored best: its checkpoint stays beside the newest ones."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from coca_jax.config import Eval
from coca_jax.evaluation import history
from coca_jax.evaluation.evaluators.base import Metric, kinds


def check(name: str, evaluation: Eval) -> None:
    """Raises ValueError for a checkpoint.best (`name`) that no evaluation of the run reports."""
    if not name:
        return
    if not evaluation.tasks or not evaluation.every_steps:
        raise ValueError(
            f"checkpoint.best={name!r} compares evaluations inside the run: give "
            "--config.eval.every_steps and eval.tasks, or leave it out"
        )
    names = _metrics(evaluation)
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.3) or sorted(names)[:1]
        raise ValueError(
            f"checkpoint.best={name!r} is no score of eval.tasks; the nearest is {near[0]!r}"
        )


def _metrics(evaluation: Eval) -> dict[str, Metric]:
    """What the run's evaluations give, by name."""
    return {
        f"{task['kind']}/{task.get('name')}/{name}": metric
        for task in evaluation.tasks
        if task.get("kind") in kinds()  # what else is wrong with a task is told where tasks are
        for name, metric in kinds()[task["kind"]].metrics.items()
    }


class Best:
    """The values of checkpoint.best by step; to Orbax, which checkpoint to preserve for it.

    All processes note the same values: each then keeps the same steps.
    """

    def __init__(self, name: str, evaluation: Eval, workdir: str) -> None:
        self.name, self._lower = name, _metrics(evaluation)[name].lower
        self._values: dict[int, float] = {}
        for row in history.read(workdir):
            self.note(row["step"], row["scores"])

    def note(self, step: int, scores: Mapping[str, Any]) -> None:
        """Takes the scores after `step`."""
        value = scores.get(self.name)
        if value is not None and value == value:
            self._values[step] = value

    def forget_after(self, step: int) -> None:
        """Forgets the scores of later steps than `step`, whose weights the run gives up."""
        self._values = {n: value for n, value in self._values.items() if n <= step}

    def among(self, steps: Collection[int]) -> int | None:
        """The best of the steps that were scored, the last of equal ones."""
        sign = -1 if self._lower else 1
        scored = sorted(step for step in steps if step in self._values)
        return max(scored, key=lambda step: (sign * self._values[step], step), default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> list[bool]:
        """As an Orbax preservation policy, of checkpoints in order of their steps."""
        best = self.among([one.step for one in checkpoints])
        return [one.step == best for one in checkpoints]

    def line(self, steps: Collection[int], folder: Any) -> str:
        """Says which of the checkpoints below `folder` is the best, or that none was scored."""
        best = self.among(steps)
        if best is None:
            return f"best {self.name}: no checkpoint in {folder} has a score"
        return f"best {self.name}: {self._values[best]:.4g} after step {best}, {folder}/{best}"
