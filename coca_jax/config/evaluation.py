"""Evaluation during training: `config.eval`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from coca_jax.config.base import STRICT, Fraction, Section, Steps, option

# Kinds of tasks that `eval.guard` watches, and the score of each.
GUARDED = dict(retrieval="mean_recall", zero_shot="top1")


@dataclass(frozen=True, config=STRICT)
class Eval(Section):
    """What a run evaluates."""

    every_steps: Steps = option(0, "Steps between evaluations; 0: only at the end.")
    guard: Literal["", "warn", "stop"] = option(
        "", "Compare the retrieval and zero-shot scores of `tasks` with those before training."
    )
    most_lost: Fraction = option(0.1, "Relative drop of such a score that triggers the guard.")
    tasks: tuple[Mapping[str, Any], ...] = option(
        (), "Tasks, as dicts of kind, name, data and options of the kind; also run at the end."
    )
