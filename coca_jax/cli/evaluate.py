"""Scores a model: zero-shot and generative classification, retrieval, captioning, task heads,
written answers, linear probe and nearest neighbours.

Scores go to eval.json in the checkpoint's workdir (or --out), named <task>/<data set>/<metric>. Run
the same command again after a kill: finished tasks and captions so far are kept.

Examples:
  coca-jax evaluate --checkpoint=runs/mine --data=data/mine
  coca-jax evaluate --checkpoint=runs/mine --data=data/mine --tasks=retrieval,captioning
  coca-jax evaluate --checkpoint=weights --data=photos/ --tasks=zero_shot --out=scores
  coca-jax evaluate --checkpoint=weights --suite=wds/vtab/pets --root='sets/{dataset}' --out=scores
"""

from __future__ import annotations

import difflib
import hashlib
import json
import posixpath
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from coca_jax.cli import main as cli
from coca_jax.data import evaluation_data, leakage
from coca_jax.data.sources import files, formats
from coca_jax.evaluation.evaluators import base
from coca_jax.evaluation.evaluators.base import Flag
from coca_jax.interop import hub
from coca_jax.runtime import storage, text_tables

# Flags of tasks alone, besides those of the evaluators, and flags of suites alone.
OF_TASKS = ("tasks", "where", "text_field", "label_field", "image_field", "limit")
OF_SUITES = ("root",)


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    define_task_flags()
    flags.DEFINE_list("suite", [], "Datasets or collections by CLIP_benchmark's names.")
    flags.DEFINE_string("root", "", "Where they lie, as its --dataset_root: 'sets/{dataset}'.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default: the checkpoint's.")
    flags.DEFINE_string("out", "", "Where eval.json goes; default: beside the checkpoint.")
    flags.DEFINE_string("coordinator", "", "host:port of process 0, for several.")
    flags.DEFINE_integer("num_processes", 0, "Processes of this run.", 0)
    flags.DEFINE_integer("process_id", -1, "This process's number, from 0.", -1)


def define_task_flags() -> None:
    """Defines the flags of a model and of what it is scored on."""
    flags.DEFINE_string("checkpoint", None, cli.CHECKPOINT)
    flags.DEFINE_string(
        "data",
        None,
        "What `prepare` wrote or reads in place, hf://OWNER/NAME, 'tfds:NAME', or 'scenes'.",
    )
    usual = ", ".join(usual_kinds())
    flags.DEFINE_list("tasks", None, f"{', '.join(base.kinds())}; default: {usual}.")
    flags.DEFINE_string("split", "", "Split of the data; default: test, else what there is.")
    flags.DEFINE_string("name", "", "Data set name in the scores; default: folder and split.")
    flags.DEFINE_multi_string("where", [], "field=value[,value...]: only these records.")
    for field in ("text", "label", "image"):
        note = f"Field of the {field}, where it has an unusual name."
        flags.DEFINE_string(f"{field}_field", "", note)
    for flag in evaluator_flags():
        _define(flag)
    flags.DEFINE_integer(
        "num_frames", None, "Frames of each video; 0: images; default: as trained.", lower_bound=0
    )
    flags.DEFINE_integer("limit", 0, "The first so many that have what a task needs; 0: all.", 0)
    flags.DEFINE_integer("batch_size", 0, "Images at a time over all devices; 0: 32 a device.", 0)


def evaluator_flags() -> list[Flag]:
    """The flags of all evaluators, each once."""
    found = (flag for one in base.kinds().values() for flag in one.flags)
    return list(dict.fromkeys(found))


def _define(flag: Flag) -> None:
    if isinstance(flag.default, bool):
        flags.DEFINE_bool(flag.name, flag.default, flag.help)
    elif isinstance(flag.default, int):
        flags.DEFINE_integer(flag.name, flag.default, flag.help, lower_bound=flag.least)
    else:
        flags.DEFINE_string(flag.name, flag.default, flag.help)


def usual_kinds() -> list[str]:
    """The evaluators that run where --tasks is not given."""
    return [kind for kind, one in base.kinds().items() if one.usual]


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
        data["path"] = formats.from_hub(args.data)
        if not files.is_pattern(data["path"]) and not files.exists(data["path"]):
            formats.guess(data["path"])  # says that it is not there, or cannot be reached
    if args.where:
        pairs = cli.where_of(args.where)
        data["where"] = {field: list(values) for field, values in pairs}
        if len(data["where"]) < len(pairs):
            raise ValueError("--where: one field twice; give all its values together, field=a,b")
    for field in ("text_field", "label_field", "image_field"):
        if args[field].value:
            data[field] = args[field].value
    if "builtin" in data:
        fields = ("where", "text_field", "label_field", "image_field")
        cli.refuse_given(fields, "scenes are drawn, and are scored whole and as they are")
    if args.split or "builtin" in data:
        if args.split and "path" in data:
            evaluation_data.check_split(data, args.split)
        return dict(data, split=args.split or "test")
    data["split"] = evaluation_data.choose_split(data)
    if data["split"] != "test":
        cli.say(f"{args.data} has no split 'test': '{data['split']}' is used")
    return data


def kinds_of_flags(data: Mapping[str, Any]) -> list[str]:
    """The kinds of tasks asked for, or the usual ones that the data have labels or captions for.

    Raises ValueError for an unknown one, or one asked for that the data are not for.
    """
    args, kinds, usual = flags.FLAGS, base.kinds(), usual_kinds()
    for kind in args.tasks or ():
        if kind not in kinds:
            near = difflib.get_close_matches(kind, kinds, n=1)
            guess = f"did you mean {near[0]}? The tasks are" if near else "choose from"
            raise ValueError(f"--tasks={kind}: {guess} {', '.join(kinds)}")
    found = base.suited(args.tasks or usual, data)
    for kind in args.tasks or ():
        if kind not in found:
            place = f"{args.data} [{data['split']}]"
            raise ValueError(base.lacks(place, kinds[kind]))
    if not found:
        needs = sorted({kinds[kind].needs for kind in usual})
        raise ValueError(
            f"data {args.data} [{data['split']}]: no example has a {' or a '.join(needs)}, so "
            "there is nothing to score; name their fields as --text_field or --label_field"
        )
    if not args.tasks and len(found) > 1 and "zero_shot" in found and _is_of_one_class(data):
        found.remove("zero_shot")
    left = [kind for kind in usual if kind not in found]
    if not args.tasks and left:
        cli.say(f"{args.data} has nothing for {', '.join(left)}: left out")
    return found


def _is_of_one_class(data: Mapping[str, Any]) -> bool:
    """Whether all labels of some data are the same; False where a look at the records tells."""
    looked = {"where", "text_field", "label_field"} & data.keys() or "path" not in data
    if looked or flags.FLAGS.class_names:
        return False
    return len(evaluation_data.class_names(dict(data, kind="label"), data["split"])) == 1


def able(model: Any, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the tasks that nobody asked for by name, those that the model has programs for; a line on
    standard error names the others. Raises ValueError where none is left."""
    found, left = [], []
    for task in tasks:
        try:
            base.get(task["kind"]).check_model(model, task)
            found.append(task)
        except ValueError as error:
            left.append(f"{task['kind']} left out: {str(error).partition(': ')[2]}")
    for line in left:
        cli.say(line)
    if not found:
        raise ValueError(f"nothing to score: {'; '.join(left)}")
    return found


def tasks_of_flags() -> list[dict[str, Any]]:
    """The tasks that the command's flags ask for. Raises ValueError for an unknown one or a flag
    that none of them reads, and as `declarations.check`."""
    args, data = flags.FLAGS, data_of_flags()
    place, _, rest = args.data.partition(":")
    path = args.data.rstrip("/")
    if path.startswith("hf://"):
        path = path.removeprefix("hf://").partition(":")[0]
    folder = rest.replace("/", "_") if place == "tfds" else posixpath.basename(path)
    name = args.name or f"{folder}_{data['split']}{_part(data.get('where', {}), args.limit)}"
    tasks, kinds = [], kinds_of_flags(data)
    refuse_unused(kinds)
    for kind in kinds:
        task: dict[str, Any] = dict(kind=kind, name=name)
        task |= dict(data=dict(data), limit=args.limit)
        base.get(kind).from_flags(task, args)
        tasks.append(task)
    base.check(tasks)
    return tasks


def _part(where: Mapping[str, Sequence[str]], limit: int) -> str:
    """What is put behind the name of a split of which a part is scored, so that its scores do not
    take the place of the whole's: '-vendor-openmoji-first30'. Where a value is long or has signs
    that names do not take, digits of a checksum of all values tell it from others: '-3f2a90bc'."""
    joined = {field: "+".join(values) for field, values in where.items()}
    found = "".join(f"-{field}-{text[:40]}" for field, text in joined.items())
    name = re.sub(r"[^\w.+-]+", "_", found)
    several = any("+" in value for values in where.values() for value in values)
    if several or name != "".join(f"-{field}-{text}" for field, text in joined.items()):
        where_text = json.dumps([[field, list(values)] for field, values in where.items()])
        name += f"-{hashlib.sha256(where_text.encode()).hexdigest()[:8]}"
    return name + (f"-first{limit}" if limit else "")


def refuse_unused(kinds: Sequence[str]) -> None:
    """Raises ValueError for the first flag that is given and that no task of these kinds reads."""
    for flag in evaluator_flags():
        takers = [kind for kind, one in base.kinds().items() if flag in one.flags]
        if not set(takers) & set(kinds):
            why = f"it is of {' and '.join(takers)}, and the tasks are {', '.join(kinds)}"
            cli.refuse_given([flag.name], why)


def run_suite(args: Any) -> dict[str, float]:
    """Scores the checkpoint on the datasets of --suite, by CLIP_benchmark."""
    if not args.checkpoint or not args.root or args.data:
        raise ValueError("give --suite=NAMES with --checkpoint=DIR and --root=DIR, without --data")
    if args.num_processes > 1:
        raise ValueError(f"--num_processes={args.num_processes}: a suite runs in one process")
    cli.refuse_given(
        [
            *OF_TASKS,
            "name",
            "coordinator",
            "process_id",
            *(flag.name for flag in evaluator_flags()),
        ],
        "CLIP_benchmark scores all of its datasets, each by its own definition",
    )
    out = args.out or args.checkpoint
    if storage.is_remote(out) or not (args.out or storage.place(out).is_dir()):
        raise ValueError(f"--checkpoint={args.checkpoint}: give --out=DIR, a local folder")
    from coca_jax import inference
    from coca_jax.evaluation import clip_benchmark
    from coca_jax.evaluation.evaluators import results

    clip_benchmark.register()
    results.check_checkpoint(out, args.checkpoint)
    cli.say(f"loading {args.checkpoint}")
    size = args.batch_size or 64
    how: dict[str, Any] = dict(dtype=args.dtype, num_frames=args.num_frames)
    model = inference.load(args.checkpoint, batch_size=size, **how)
    results.save_checkpoint(out, args.checkpoint)
    split = args.split or "test"
    scores = clip_benchmark.evaluate(
        model, args.suite, args.root, out, split=split, batch_size=size
    )
    results.save_results(out, scores, model.step)
    return scores


def summary(scores: dict[str, Any]) -> list[str]:
    """The headline scores and where all are."""
    from coca_jax.evaluation import report_terminal

    args = flags.FLAGS
    out = args.out or args.checkpoint
    if args.suite:
        lines = [f"{name.removeprefix('suite/'):60s} {value:.4f}" for name, value in scores.items()]
    else:
        lines = report_terminal.score_table(scores)
    lines += [f"all scores: {out.rstrip('/')}/eval.json"]
    if (storage.place(out) / "metrics.jsonl").exists():
        lines += text_tables.next_commands(f"coca-jax report {shlex.quote(out)}")
    return lines


def main(argv: Sequence[str]) -> dict[str, Any] | None:
    """Command-line entry."""
    args = flags.FLAGS
    if args.suite:
        return run_suite(args)
    if len(argv) > 1 or not args.checkpoint or not args.data:
        raise ValueError(
            "give --checkpoint=DIR --data=PATH [--tasks=...] and nothing else, or --suite=NAMES "
            "--root=DIR in place of --data"
        )
    cli.refuse_given(OF_SUITES, "it is for --suite")
    tasks = tasks_of_flags()
    if not args.out and hub.is_name(args.checkpoint):
        raise ValueError(f"--checkpoint={args.checkpoint} is a name; give --out=DIR for eval.json")
    if args.process_id <= 0:
        cli.say(f"loading {args.checkpoint}")
    import jax

    from coca_jax.runtime import multihost, signals

    multihost.start(args.coordinator, args.num_processes, args.process_id)
    first = jax.process_index() == 0
    # One that fails, as of a checkpoint that is not there, does not wait five minutes for the rest.
    with signals.failing_alone(jax.process_count()):
        scores = score(tasks)
        if jax.process_count() > 1:
            jax.distributed.shutdown()
    if not first:
        return None
    return scores


def score(tasks: list[dict[str, Any]]) -> dict[str, float]:
    """The scores of the checkpoint on the tasks, on every process."""
    import jax

    from coca_jax import inference
    from coca_jax.evaluation import runner as evaluation
    from coca_jax.evaluation.evaluators import results

    args = flags.FLAGS
    out = args.out or args.checkpoint
    if args.out or storage.is_remote(out):
        storage.check_writable(out, make=False)
    results.check_checkpoint(out, args.checkpoint)
    devices = jax.devices()
    size = args.batch_size or max(64, 32 * len(devices))
    model = inference.load(
        args.checkpoint,
        dtype=args.dtype,
        batch_size=size,
        devices=devices,
        num_frames=args.num_frames,
    )
    if source := leakage.trained_on(model.config.data.sources, data := tasks[0]["data"]):
        cli.say(
            f"{args.data}: the model trained on {leakage.part(source, data)} examples; the scores say "
            f"how well it remembers them, not how well it does on new ones{leakage.held_out(source)}"
        )
    if not args.out and not storage.place(out).is_dir():
        raise ValueError(f"--checkpoint={out} is no folder; give --out=DIR for eval.json")
    if not args.tasks:
        tasks = able(model, tasks)
    if not jax.process_index():
        results.save_checkpoint(out, args.checkpoint)
    return evaluation.run_tasks(model, tasks, out, of_step=model.step)


if __name__ == "__main__":
    cli.command("evaluate")
