"""Runs evaluation tasks on a model, each with the evaluator of its kind, and writes the scores."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from coca_jax import evaluators
from coca_jax.evaluators import Predictor, declarations, history, results
from coca_jax.evaluators.declarations import Setting
from coca_jax.evaluators.records import records_of
from coca_jax.evaluators.unfinished import Unfinished
from coca_jax.evaluators.writing import Writing
from coca_jax.machine import processes
from coca_jax.models.head_kinds import HeadKind


class Model(Predictor, Protocol):
    """A predictor that says how much it takes at a time and which weights it has."""

    num_frames: int
    batch_size: int
    head_kind: HeadKind | None

    def checksum(self) -> str:
        """Tells this model from others."""

    def fit_image(self, image: Any) -> np.ndarray:
        """One image as the model takes it. Raises ValueError: cannot be decoded."""


def run_tasks(
    model: Model,
    tasks: Sequence[Mapping[str, Any]],
    workdir: str,
    *,
    step: int | None = None,
    of_step: int | None = None,
) -> dict[str, float]:
    """Runs every task; on process 0 writes eval.json, eval_classes.json, the report's examples and
    the captions (eval_captions/), and of which step of a run the scores are: `step` of one that
    evaluates itself, `of_step` of one that left the weights.

    All processes call this with the same arguments, model and data, which they compare first; each
    computes its share, and all get the scores; with `step` these join the run's history
    (history.py). A task with `known_only` scores only records whose text the candidates hold.
    Scores of tasks that an earlier, killed call with the same weights finished are taken over.

    Raises ValueError for an unknown kind of task, options that cannot be, one that the model has
    no program for, or processes that differ, before any of them runs; OSError where something
    cannot be written, NotWritten of several processes.
    """
    tasks = [_plain(task) for task in tasks]
    check(model, tasks)
    scores: dict[str, float] = {}
    main_process, whose = jax.process_index() == 0, of_step if step is None else step
    request = dict(weights=model.checksum(), step=step, num_frames=model.num_frames)
    if jax.process_count() > 1:
        asked = {_named(t, f".{key}"): json.dumps(t[key]) for t in tasks for key in t}
        model_is = dict(request, batch_size=model.batch_size)
        processes.compare("tasks", asked | {name: str(one) for name, one in model_is.items()})
    write = Writing(main_process, jax.process_count())
    unfinished = Unfinished(workdir, request, write)
    setting = Setting(
        batch_size=model.batch_size,
        main_process=main_process,
        write=write,
        workdir=workdir,
        request=dict(unfinished.request, started=unfinished.started),
    )
    for task in tasks:
        key = json.dumps(task, sort_keys=True)
        kept = unfinished.scores(key)
        if kept is not None:
            scores |= kept
            if main_process:
                print(_named(task, ": kept from before"), file=sys.stderr)
            continue
        new = run_task(model, task, setting)
        write(functools.partial(results.save_results, workdir, new, whose))
        unfinished.add(key, new)
        scores |= new
    of_tasks = dict(scores)
    if step is not None:
        scores["step"] = step
    write(lambda: results.save_results(workdir, scores))
    if step is not None:
        write(lambda: history.add(workdir, step, of_tasks))
    unfinished.close()
    return scores


def check(model: Model, tasks: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for what `run_tasks` refuses before any of them runs."""
    for task in tasks:
        evaluator = declarations.of(task["kind"])
        evaluator.check_task(task)
        evaluator.check_model(model, task)


def _named(task: Mapping[str, Any], what: str) -> str:
    return f"{task['kind']}/{task['name']}{what}"


def _plain(task: Any) -> Any:
    """A task without tuples, as JSON would give it back."""
    whole = task.to_dict() if hasattr(task, "to_dict") else dict(task)

    def plain(x: Any) -> Any:
        return x.to_dict() if hasattr(x, "to_dict") else list(x)

    return json.loads(json.dumps(whole, default=plain))


def run_task(model: Model, task: Mapping[str, Any], setting: Setting) -> dict[str, float]:
    """The scores of one task; on process 0 its examples and classes are written as well."""
    kind = declarations.of(task["kind"])
    task = dict(task, data=kind.data_of(task, model))
    need = kind.need_of(model)
    records = records_of(task, need)
    if jax.process_count() > 1:
        processes.compare("examples", {_named(task, " examples"): str(len(records))})
    setting.records = records
    evaluator = kind.from_task(task, setting)
    for some, of in ((records, ""), *((one, " to learn from") for one in evaluator.further)):
        if some.left_out and setting.main_process:
            evaluators.tell(
                f"{task['kind']}/{task['name']}: {some.left_out} examples{of} have no {need} "
                "and are left out"
            )
    try:
        new = dict(evaluator.run(model, records))
    except ValueError as error:
        last = setting.common()["batch_size"]  # the most that an evaluator has before it
        reading = (records, *evaluator.further)
        named = [one.unreadable(model.fit_image, last) for one in reading]
        found = next(filter(None, named), "")
        if not found:
            raise
        raise ValueError(
            f"{task['kind']}/{task['name']}: {found}; mend or remove it, or `coca-jax prepare` the "
            "data, which leaves such images out and lists them"
        ) from error
    new[f"{evaluator.name}/num_examples"] = float(len(records))
    workdir, name, classes = setting.workdir, evaluator.name, evaluator.classes
    setting.write(lambda: results.save_examples(workdir, name, evaluator.examples))
    if classes:
        setting.write(lambda: results.save_classes(workdir, name, classes))
    if setting.main_process:
        for metric, why in evaluator.skipped.items():
            evaluators.tell(f"{evaluator.name}: {metric.upper()} skipped, {why}")
    return new
