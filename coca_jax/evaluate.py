"""Scores a model: zero-shot and generative classification, retrieval, captioning, task heads,
written answers, linear probe and nearest neighbours.

    python -m coca_jax.evaluate --checkpoint=DIR --data=PATH --tasks=zeroshot,retrieval,captioning

Scores go to eval.json in the checkpoint's workdir (or --out), named <task>/<data set>/<metric>. Run
the same command again after a kill: finished tasks and captions so far are kept.
"""

from __future__ import annotations

import json
import os
import posixpath
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from absl import flags

from coca_jax import cli, partitioning, storage
from coca_jax.data import prompts
from coca_jax.evaluators import (
    Predictor,
    captioning,
    probes,
    results,
    retrieval,
    task_head,
    zeroshot,
)
from coca_jax.evaluators.records import Records, missing, needed, suited
from coca_jax.importers import unprepared

KINDS = (
    *("zeroshot", "generative", "retrieval", "captioning"),
    *("classification", "answers", "linear_probe", "knn"),
)
USUAL = ("zeroshot", "retrieval", "captioning")


class Model(Predictor, Protocol):
    """A predictor that says how much it takes at a time and which weights it has."""

    num_frames: int
    batch_size: int
    head_kind: str

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
        task["kind"] == "classification" and model.head_kind in ("answer", "pair")
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


def trained_on(config: Any, data: Mapping[str, Any]) -> bool:
    """Whether a run's config has the data, at this split, among its sources."""

    def place(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        path = entry.get("path")
        return (path and os.path.realpath(path), entry.get("tfds"), entry.get("split") or "train")

    sources = config.get("data", {}).get("sources", ())
    return place(data) in [place(entry) for entry in sources if not entry.get("builtin")]


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("checkpoint", None, "A run, checkpoint, export or open_clip weights.")
    flags.DEFINE_string(
        "data", None, "A folder that `prepare` wrote, an imagefolder, 'tfds:NAME', or 'scenes'."
    )
    flags.DEFINE_list("tasks", None, f"{', '.join(KINDS)}; default: {', '.join(USUAL)}.")
    flags.DEFINE_string("split", "", "Split of the data; default: test, else what there is.")
    flags.DEFINE_string("name", "", "Data set name in the scores; default: folder and split.")
    flags.DEFINE_multi_string("where", [], "field=value[,value...]: only these records.")
    for field in ("text", "label", "image"):
        note = f"Field of the {field}, where it has an unusual name."
        flags.DEFINE_string(f"{field}_field", "", note)
    flags.DEFINE_string("templates", "", "Prompt set or text file for classification.")
    flags.DEFINE_string("class_names", "", "Text file: a class name, or label<TAB>name, a line.")
    flags.DEFINE_string("questions", "", "Field that lists {question, answer} objects.")
    flags.DEFINE_integer(
        "num_frames", None, "Frames of each video; 0: images; default: as trained."
    )
    flags.DEFINE_integer("num_beams", 1, "Beams of the captions.", lower_bound=1)
    flags.DEFINE_bool("java_metrics", True, "METEOR and SPICE, where they can run.")
    flags.DEFINE_integer("limit", 0, "At most so many records; 0: all.")
    flags.DEFINE_integer("batch_size", 0, "Images at a time over all devices; 0: 32 a device.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default: the checkpoint's.")
    flags.DEFINE_string("out", "", "Where eval.json goes; default: beside the checkpoint.")
    flags.DEFINE_string("coordinator", "", "host:port of process 0, for several.")
    flags.DEFINE_integer("num_processes", 0, "Processes of this run.")
    flags.DEFINE_integer("process_id", -1, "This process's number, from 0.")


def data_of_flags() -> dict[str, Any]:
    """The data that the command's flags name, an entry as in config.data.sources. Where --split
    is not given the data tell it, and a line on standard error says which it is.

    Raises ValueError or FileNotFoundError for data that are not there or have no such split.
    """
    args = flags.FLAGS
    data: dict[str, Any] = {}
    place, _, rest = args.data.partition(":")
    if args.data == "scenes":
        data["builtin"] = "scenes"
    elif place == "tfds":
        data["tfds"] = rest
    else:
        data["path"] = args.data
    if args.where:
        pairs = (item.split("=", 1) for item in args.where)
        data["where"] = {field: values.split(",") for field, values in pairs}
    for field in ("text_field", "label_field", "image_field"):
        if args[field].value:
            data[field] = args[field].value
    if args.split or "builtin" in data:
        return dict(data, split=args.split or "test")
    data["split"] = unprepared.choose_split(data)
    if data["split"] != "test":
        print(f"{args.data} has no split 'test': '{data['split']}' is used", file=sys.stderr)
    return data


def kinds_of_flags(data: Mapping[str, Any]) -> list[str]:
    """The kinds of tasks asked for, or the usual ones that the data have labels or captions for.

    Raises ValueError for an unknown one, or one asked for that the data are not for.
    """
    args = flags.FLAGS
    for kind in args.tasks or ():
        if kind not in KINDS:
            raise ValueError(f"--tasks={kind}: choose from {', '.join(KINDS)}")
    found = suited(args.tasks or USUAL, data)
    for kind in set(args.tasks or ()).difference(found):
        raise ValueError(missing(f"{args.data} [{data['split']}]", needed(kind)))
    left = [kind for kind in USUAL if kind not in found]
    if not args.tasks and left:
        print(f"{args.data} has nothing for {', '.join(left)}: left out", file=sys.stderr)
    return found


def tasks_of_flags() -> list[dict[str, Any]]:
    """The tasks that the command's flags ask for. Raises ValueError for an unknown one."""
    args, data = flags.FLAGS, data_of_flags()
    place, _, rest = args.data.partition(":")
    path = args.data.rstrip("/")
    folder = rest.replace("/", "_") if place == "tfds" else posixpath.basename(path)
    tasks = []
    for kind in kinds_of_flags(data):
        task: dict[str, Any] = dict(kind=kind, name=args.name or f"{folder}_{data['split']}")
        task |= dict(data=dict(data), limit=args.limit)
        if kind == "captioning":
            task["java_metrics"] = args.java_metrics
            if args.num_beams > 1:
                task["decode"] = dict(num_beams=args.num_beams)
            if args.data == "scenes":
                task["data"]["objects"] = (1,)  # what exact match is defined for
        if kind in ("classification", "answers") and args.questions:
            task["data"]["questions"] = args.questions
        if kind in ("linear_probe", "knn"):
            task["data"]["kind"] = "label"
        if kind in ("zeroshot", "generative"):
            task["data"]["kind"] = "label"
            task |= dict(templates=args.templates, class_names=args.class_names)
        tasks.append(task)
    return tasks


def main(argv: Sequence[str]) -> dict[str, Any] | None:
    """Command-line entry."""
    args = flags.FLAGS
    if len(argv) > 1 or not args.checkpoint or not args.data:
        raise ValueError("give --checkpoint=DIR --data=PATH [--tasks=...] and nothing else")
    tasks = tasks_of_flags()
    partitioning.start_processes(args.coordinator, args.num_processes, args.process_id)

    from coca_jax import inference

    out = args.out or args.checkpoint
    if storage.is_remote(out):
        storage.check_writable(out)
    devices = jax.devices()
    size = args.batch_size or max(64, 32 * len(devices))
    model = inference.load(
        args.checkpoint,
        dtype=args.dtype,
        batch_size=size,
        devices=devices,
        num_frames=args.num_frames,
    )
    if trained_on(model.config, tasks[0]["data"]):
        print(
            f"{args.data}: the model trained on these very examples; the scores say how well it "
            "remembers them, not how well it does on new ones",
            file=sys.stderr,
        )
    if not args.out and not storage.place(out).is_dir():
        raise ValueError(f"--checkpoint={out} is a file; give --out=DIR for eval.json")
    scores = run_tasks(model, tasks, out)
    if jax.process_index():
        return None
    for key, value in scores.items():
        if key.endswith(("_low", "_high", "_count")):
            continue
        line = f"{key:60s} {value:10.4f}"
        if f"{key}_count" in scores:
            low, high = scores[f"{key}_low"], scores[f"{key}_high"]
            line += f"  [{low:.4f}, {high:.4f}] of {scores[f'{key}_count']:,.0f}"
        print(line)
    return scores


if __name__ == "__main__":
    cli.command("evaluate")
