"""Runs evaluation tasks on a model, each with the evaluator of its kind, and writes the scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from coca_jax import storage
from coca_jax.data import prompts
from coca_jax.evaluators import (
    KINDS,
    Predictor,
    captioning,
    probes,
    results,
    retrieval,
    task_head,
    zeroshot,
)
from coca_jax.evaluators.records import Records, needed
from coca_jax.importers import unprepared
from coca_jax.models.head_kinds import HeadKind


class Model(Predictor, Protocol):
    """A predictor that says how much it takes at a time and which weights it has."""

    num_frames: int
    batch_size: int
    head_kind: HeadKind | None

    def checksum(self) -> str:
        """Tells these weights from others."""


def make_evaluator(task: Mapping[str, Any], records: Any = (), **common: Any) -> Any:
    """The evaluator of one task: dict(kind, name, data, and what that kind takes).

    kind: 'zeroshot' and 'generative' (class_names: a list, or a file for `read_class_names`;
    templates), 'retrieval' (candidates: a data entry whose texts are further candidates),
    'captioning' (decode: options of decoding; java_metrics; outputs), 'classification' (by the task
    head), 'answers' (written behind questions), 'linear_probe' and 'knn' (train: a data entry to
    learn from, by default the split 'train' of the same data; train_limit; class_names). common:
    arguments of any evaluator. Raises ValueError for an unknown kind.
    """
    kind, name = task["kind"], task["name"]
    if kind in ("zeroshot", "generative"):
        names, labels = _class_names(task)
        default = "photo" if kind == "zeroshot" else "plain"
        templates = prompts.load(task.get("templates") or default)
        maker = zeroshot.ZeroShot if kind == "zeroshot" else zeroshot.Generative
        return maker(name, names, templates, labels=labels, **common)
    if kind == "retrieval":
        return retrieval.Retrieval(name, extra_texts=_candidates(task), **common)
    if kind == "captioning":
        drawn = getattr(records, "scenes", False)
        return captioning.Captioning(
            name,
            scorer=captioning.score_scene if drawn else captioning.score_references,
            java_metrics=task.get("java_metrics", False),
            how=task.get("decode"),
            **common,
        )
    if kind == "classification":
        return task_head.Classification(name, **common)
    if kind == "answers":
        return task_head.Answers(name, **common)
    if kind in ("linear_probe", "knn"):
        train = _probe_train(task)
        names, _ = _class_names(dict(task, data=train))
        found = Records(train, task.get("train_limit", 0))
        return probes.Probe(kind, name, names, found, **common)
    raise ValueError(f"task {kind!r}: choose one of {', '.join(KINDS)}")


def _probe_train(task: Mapping[str, Any]) -> dict[str, Any]:
    """The data entry that a probe learns from."""
    return dict(task.get("train") or dict(task["data"], split="train"))


def _class_names(task: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(names that go into the prompts, labels as the records have them)."""
    given = task.get("class_names")
    if given and not isinstance(given, str):
        return list(given), list(given)
    declared = unprepared.class_names(task["data"], "test")
    return read_class_names(given, declared) if given else (declared, declared)


def read_class_names(path: str, declared: Sequence[str]) -> tuple[list[str], list[str]]:
    """Class names from a text file, one a line: (names for the prompts, labels in the data).

    A line `label<TAB>name` calls the data's class `label` by `name`; classes without a line are no
    candidates. Lines without a tab are the data's own class names, or, when none of them is, as
    many as the data declares, in its order. Raises ValueError for anything else.
    """
    lines = [line.strip() for line in prompts.read_lines(path)]
    lines = [line for line in lines if line]
    pairs = [line.split("\t") for line in lines if "\t" in line]
    if pairs:
        if len(pairs) != len(lines) or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"class_names {path}: every line needs one tab, label<TAB>name")
        return [name.strip() for _, name in pairs], [label.strip() for label, _ in pairs]
    if set(lines) & set(declared):
        return lines, lines
    if len(lines) != len(declared):
        raise ValueError(
            f"class_names {path}: {len(lines)} names, none a class of the data, which has "
            f"{len(declared)} ({', '.join(declared[:3])}, ..); give as many, or label<TAB>name"
        )
    return lines, list(declared)


def _candidates(task: Mapping[str, Any]) -> list[str]:
    if not task.get("candidates"):
        return []
    found = Records(dict(dict(split="train"), **task["candidates"]))
    return sorted({text for record in found for text in _texts(record)})


def _texts(record: Mapping[str, Any]) -> list[str]:
    return [record["text"]] if isinstance(record["text"], str) else list(record["text"] or ())


def run_tasks(
    model: Model, tasks: Sequence[Mapping[str, Any]], workdir: str, *, step: int | None = None
) -> dict[str, float]:
    """Runs every task; on process 0 writes eval.json, eval_classes.json, the report's examples and
    the captions (eval_captions/).

    All processes call this with the same arguments, each computes its share, and all get the
    scores. A task with `known_only` scores only records whose text the candidates hold. Scores of
    tasks that an earlier, killed call with the same weights finished are taken over.
    """
    scores: dict[str, float] = {}
    main_process = jax.process_index() == 0
    request = dict(weights=model.checksum(), step=step, num_frames=model.num_frames)
    unfinished = results.Unfinished(workdir, request, main_process=main_process)
    features: dict[str, dict[str, np.ndarray]] = {}  # of probes, by their data
    for task in tasks:
        task = _plain(task)
        key = json.dumps(task, sort_keys=True)
        kept = unfinished.scores(key)
        if kept is not None:
            scores |= kept
            if main_process:
                print(f"{task['kind']}/{task['name']}: kept from before", file=sys.stderr)
            continue
        new = _run_task(model, task, workdir, dict(request, started=unfinished.started), features)
        if main_process:
            results.save_results(workdir, new)
        unfinished.add(key, new)
        scores |= new
    if step is not None:
        scores["step"] = step
    if main_process:
        results.save_results(workdir, scores)
    unfinished.close()
    return scores


def _plain(task: Any) -> Any:
    """A task without ConfigDicts and tuples, as JSON would give it back."""
    whole = task.to_dict() if hasattr(task, "to_dict") else dict(task)

    def plain(x: Any) -> Any:
        return x.to_dict() if hasattr(x, "to_dict") else list(x)

    return json.loads(json.dumps(whole, default=plain))


def _run_task(
    model: Model,
    task: Mapping[str, Any],
    workdir: str,
    request: Mapping[str, Any],
    features: dict[str, dict[str, np.ndarray]],
) -> dict[str, float]:
    main_process = jax.process_index() == 0
    known = set(_candidates(task)) if task.get("known_only") else None
    if task["kind"] == "answers" or (
        task["kind"] == "classification" and model.head_kind and model.head_kind.reads_text
    ):
        task = dict(task, data=dict(task["data"], kind="question"))
    records = Records(task["data"], task.get("limit", 0), known, needed(task["kind"]))
    if records.left_out and main_process:
        print(
            f"{task['kind']}/{task['name']}: {records.left_out} examples have no "
            f"{needed(task['kind'])} and are left out",
            file=sys.stderr,
        )
    common: dict[str, Any] = dict(progress=main_process, batch_size=model.batch_size)
    if task["kind"] == "captioning":
        name = f"{task['name'].replace('/', '_')}.jsonl"
        path = storage.place(workdir) / "eval_captions" / name
        made_for = dict(request, task=dict(task))
        common["outputs"] = captioning.Outputs(path, made_for, write=main_process)
    elif task["kind"] != "generative":
        # Several batches a call: the model reads the next one while it computes.
        common["batch_size"] *= max(1, 1024 // model.batch_size)
    if task["kind"] in ("linear_probe", "knn"):
        limits = [task.get("limit", 0), task.get("train_limit", 0)]
        of_data = json.dumps([_probe_train(task), task["data"], limits], sort_keys=True)
        common["cache"] = features.setdefault(of_data, {})
    evaluator = make_evaluator(task, records, **common)
    new = dict(evaluator.run(model, records))
    if "outputs" in common:
        common["outputs"].close()
    new[f"{evaluator.name}/num_examples"] = float(len(records))
    if main_process:
        results.save_examples(workdir, evaluator.name, evaluator.examples)
        if getattr(evaluator, "classes", None):
            results.save_classes(workdir, evaluator.name, evaluator.classes)
        for metric, why in getattr(evaluator, "skipped", {}).items():
            print(f"{evaluator.name}: {metric.upper()} skipped, {why}", file=sys.stderr)
    return new
