"""Runs evaluation tasks on a model, each with the evaluator of its kind, and writes the scores."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from coca_jax.config.heads import HeadKind
from coca_jax.evaluation import evaluators, history
from coca_jax.evaluation.evaluators import Predictor, base, results
from coca_jax.evaluation.evaluators.base import Setting, Writing
from coca_jax.evaluation.evaluators.inputs import records_of
from coca_jax.inference import fingerprint
from coca_jax.runtime import multihost, storage

# What an evaluation has finished when it is killed: eval_progress.json, while it runs.


class Unfinished:
    """What an evaluation has finished, in workdir/eval_progress.json until all of it is.

    Args:
      workdir: made when missing.
      request: what the scores depend on besides the task; a file of another request is dropped.
      write: does it on one process. All call all of this, and raise NotWritten together.

    Attributes:
      request: as the file has it, whose checksum may be of an older kind.
    """

    def __init__(self, workdir: str, request: Mapping[str, Any], write: Writing):
        self._path = storage.place(workdir) / "eval_progress.json"
        self._once = write
        write(lambda: self._begin(request))
        write.agree()
        if not write.main_process and not self._path.exists():
            raise ValueError(
                f"{self._path} of process 0 is not here: the folder of the scores must be "
                "shared by all processes, or lie in a bucket"
            )
        self._state = json.loads(self._path.read_text())
        self.request: dict[str, Any] = self._state["request"]
        self.started: int = self._state["started"]

    def scores(self, task: str) -> dict[str, float] | None:
        """The scores of a task that is finished, else None."""
        return self._state["tasks"].get(task)

    def add(self, task: str, scores: Mapping[str, float]) -> None:
        """Notes that a task is finished; what could not be written of it ends the rest."""
        self._state["tasks"][task] = dict(scores)
        self._once(self._keep)
        self._once.agree()

    def close(self) -> None:
        """All is finished, and all have read the file: the next start begins anew."""
        self._once.agree()
        self._once(self._drop)

    def _is_mine(self) -> bool:
        """False where another evaluation of these weights has begun since, whose file it is now;
        or has finished."""
        return self._found().get("request") == self._state["request"]

    def _found(self) -> dict[str, Any]:
        try:
            return results.read_sealed(self._path, request=dict, started=int, tasks=dict)
        except FileNotFoundError:  # another evaluation has just finished
            return {}

    def _begin(self, request: Mapping[str, Any]) -> None:
        if not fingerprint.same_request(self._found().get("request"), request):
            self._write(dict(request=dict(request), started=time.time_ns(), tasks={}))

    def _keep(self) -> None:
        if self._is_mine():
            self._write(self._state)

    def _drop(self) -> None:
        if self._is_mine():
            self._path.unlink(missing_ok=True)

    def _write(self, state: Mapping[str, Any]) -> None:
        storage.write_text(self._path, json.dumps(state))


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
        multihost.compare("tasks", asked | {name: str(one) for name, one in model_is.items()})
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
        scores_before = unfinished.scores(key)
        if scores_before is not None:
            scores |= scores_before
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
        evaluator = base.of(task["kind"])
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
    kind = base.of(task["kind"])
    task = dict(task, data=kind.data_of(task, model))
    need = kind.need_of(model)
    records = records_of(task, need)
    if jax.process_count() > 1:
        multihost.compare("examples", {_named(task, " examples"): str(len(records))})
    setting.records = records
    evaluator = kind.from_task(task, setting)
    for some, of in ((records, ""), *((one, " to learn from") for one in evaluator.further)):
        if some.left_out and setting.main_process:
            evaluators.notify(
                f"{task['kind']}/{task['name']}: {some.left_out} examples{of} have no {need} "
                "and are left out"
            )
        if some.damaged and setting.main_process:
            evaluators.notify(
                f"{task['kind']}/{task['name']}: {some.damaged} examples{of} have an image that "
                "cannot be read, and are left out"
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
            evaluators.notify(f"{evaluator.name}: {metric.upper()} skipped, {why}")
    return new
