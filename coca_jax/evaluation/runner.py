"""Runs evaluation tasks on a model and writes the scores; a killed evaluation resumes."""

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


class Unfinished:
    """Scores of the finished tasks of a running evaluation, in workdir/eval_progress.json.

    All processes call every method; errors in writing raise NotWritten on all of them.

    Args:
      workdir: created if missing.
      request: everything that the scores depend on besides the task. A file with another request
        is replaced.
      write: writes on process 0.

    Attributes:
      request: the request as stored in the file; its checksum may be of an older format.
    """

    def __init__(self, workdir: str, request: Mapping[str, Any], write: Writing):
        self._path = storage.place(workdir) / "eval_progress.json"
        self._once = write
        write(lambda: self._begin(request))
        write.agree()
        if not write.main_process and not self._path.exists():
            raise ValueError(
                f"{self._path}: written by process 0 but not visible to process "
                f"{jax.process_index()}. Use a folder that all processes share, or a bucket."
            )
        self._state = json.loads(self._path.read_text())
        self.request: dict[str, Any] = self._state["request"]
        self.started: int = self._state["started"]

    def scores(self, task: str) -> dict[str, float] | None:
        """The scores of a task, or None if it has not finished."""
        return self._state["tasks"].get(task)

    def add(self, task: str, scores: Mapping[str, float]) -> None:
        """Stores the scores of a finished task."""
        self._state["tasks"][task] = dict(scores)
        self._once(self._save)
        self._once.agree()

    def close(self) -> None:
        """Deletes the file after the last task."""
        self._once.agree()  # every process has read the file
        self._once(self._drop)

    def _is_mine(self) -> bool:
        """False if another evaluation in this workdir has replaced or deleted the file."""
        return self._read().get("request") == self._state["request"]

    def _read(self) -> dict[str, Any]:
        try:
            return results.read_sealed(self._path, request=dict, started=int, tasks=dict)
        except FileNotFoundError:  # another evaluation has just finished
            return {}

    def _begin(self, request: Mapping[str, Any]) -> None:
        if not fingerprint.same_request(self._read().get("request"), request):
            self._write(dict(request=dict(request), started=time.time_ns(), tasks={}))

    def _save(self) -> None:
        if self._is_mine():
            self._write(self._state)

    def _drop(self) -> None:
        if self._is_mine():
            self._path.unlink(missing_ok=True)

    def _write(self, state: Mapping[str, Any]) -> None:
        storage.write_text(self._path, json.dumps(state))


class Model(Predictor, Protocol):
    """A predictor with a batch size and a checksum of its weights."""

    num_frames: int
    batch_size: int
    head_kind: HeadKind | None

    def checksum(self) -> str:
        """Identifies the weights."""

    def fit_image(self, image: Any) -> np.ndarray:
        """Preprocesses one image. Raises ValueError if it cannot be decoded."""


def run_tasks(
    model: Model,
    tasks: Sequence[Mapping[str, Any]],
    workdir: str,
    *,
    step: int | None = None,
    of_step: int | None = None,
) -> dict[str, float]:
    """Runs the tasks and returns {"evaluator/dataset/metric": value}.

    All processes call this with the same arguments, model and data; each evaluates its share, and
    all get the scores. Process 0 writes eval.json, eval_classes.json, the examples for the report
    and the captions (eval_captions/). Tasks that an earlier, killed call with the same weights
    finished are not repeated.

    Args:
        model: the model to evaluate.
        tasks: options of each task. A task with `known_only` scores only the records whose text is
            among the candidates.
        workdir: folder for the results.
        step: current step of a training run; adds the scores to the run's history (history.py).
        of_step: step of the checkpoint that the weights come from, outside of training.

    Raises:
        ValueError: before any task runs, for an unknown kind of task, invalid options, a task that
            the model does not support, or processes whose arguments differ.
        OSError: a file cannot be written (NotWritten with several processes).
    """
    tasks = [_plain(task) for task in tasks]
    check(model, tasks)
    scores: dict[str, float] = {}
    main_process, whose = jax.process_index() == 0, of_step if step is None else step
    request = dict(weights=model.checksum(), step=step, num_frames=model.num_frames)
    if jax.process_count() > 1:
        asked = {_named(t, f".{key}"): json.dumps(t[key]) for t in tasks for key in t}
        model_is = dict(request, batch_size=model.batch_size)
        multihost.compare("tasks", asked | {name: str(value) for name, value in model_is.items()})
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
                print(_named(task, ": already evaluated, scores reused"), file=sys.stderr)
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
    """Raises the ValueErrors of `run_tasks` without running a task."""
    for task in tasks:
        evaluator = base.get(task["kind"])
        evaluator.check_task(task)
        evaluator.check_model(model, task)


def _named(task: Mapping[str, Any], suffix: str) -> str:
    return f"{task['kind']}/{task['name']}{suffix}"


def _plain(task: Any) -> Any:
    """Converts a task to plain JSON types (lists instead of tuples)."""
    fields = task.to_dict() if hasattr(task, "to_dict") else dict(task)

    def plain(x: Any) -> Any:
        return x.to_dict() if hasattr(x, "to_dict") else list(x)

    return json.loads(json.dumps(fields, default=plain))


def run_task(model: Model, task: Mapping[str, Any], setting: Setting) -> dict[str, float]:
    """Returns the scores of one task; process 0 also writes its examples and per-class results."""
    kind = base.get(task["kind"])
    task = dict(task, data=kind.data_of(task, model))
    need = kind.need_of(model)
    records = records_of(task, need)
    if jax.process_count() > 1:
        multihost.compare("examples", {_named(task, " examples"): str(len(records))})
    setting.records = records
    evaluator = kind.from_task(task, setting)
    inputs = ((records, ""), *((further, "training ") for further in evaluator.further))
    for given, purpose in inputs:
        if given.left_out and setting.main_process:
            evaluators.notify(
                _named(task, f": skipped {given.left_out} {purpose}examples without {need}")
            )
        if given.damaged and setting.main_process:
            evaluators.notify(
                _named(
                    task,
                    f": skipped {given.damaged} {purpose}examples whose image cannot be read",
                )
            )
    try:
        new = dict(evaluator.run(model, records))
    except ValueError as error:
        # If an unreadable image caused the error, name the image instead. An evaluator has read at
        # most one batch beyond the examples that it finished.
        last = setting.common()["batch_size"]
        reading = (records, *evaluator.further)
        named = [given.unreadable(model.fit_image, last) for given in reading]
        found = next(filter(None, named), "")
        if not found:
            raise
        raise ValueError(
            f"{task['kind']}/{task['name']}: {found}. Repair or remove it, or run `coca-jax "
            "prepare` on the data, which skips unreadable images and lists them."
        ) from error
    new[f"{evaluator.name}/num_examples"] = float(len(records))
    workdir, name, classes = setting.workdir, evaluator.name, evaluator.classes
    setting.write(lambda: results.save_examples(workdir, name, evaluator.examples))
    if classes:
        setting.write(lambda: results.save_classes(workdir, name, classes))
    if setting.main_process:
        for metric, why in evaluator.skipped.items():
            evaluators.notify(f"{evaluator.name}: skipped {metric.upper()}: {why}")
    return new
