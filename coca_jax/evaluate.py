"""`python -m coca_jax.evaluate --checkpoint=DIR --data=PATH --tasks=zeroshot,retrieval,captioning`.

Scores go to eval.json in the checkpoint's workdir (or --out), named <task>/<data set>/<metric>.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import tqdm
from absl import flags

from coca_jax import cli
from coca_jax.data import images, pipeline, prompts
from coca_jax.evaluators import Predictor, captioning, results, retrieval, zeroshot


class Model(Predictor, Protocol):
    """A predictor that says how its images are prepared."""

    image_size: int
    resize: str


def read_records(data: Mapping[str, Any], size: int, mode: str, limit: int = 0) -> list[dict]:
    """Records with `image` decoded and preprocessed to uint8 [size, size, 3].

    data: an entry as in config.data.sources, with `split`. Raises ValueError for bad data.
    """
    if data.get("builtin") == "scenes":
        found: Iterable[dict] = _scenes(data, limit)
    else:
        found = pipeline.eval_records(data, data.get("split", "test"), limit=limit)
    return [
        dict(record, image=images.preprocess_eval(images.decode(record["image"]), size, mode))
        for record in found
    ]


def _scenes(data: Mapping[str, Any], limit: int) -> Iterator[dict]:
    """Drawn scenes with their attributes, which scoring a caption needs."""
    from coca_jax.data.scenes import Scenes

    source = Scenes(
        data.get("split", "test"), data.get("kind", "caption"), data.get("objects", (1, 2, 3, 4))
    )
    count = min(limit or len(source), len(source))
    for start in range(0, count, 256):
        yield from source.read(np.arange(start, min(start + 256, count)))


def make_evaluator(task: Mapping[str, Any], records: list[dict]) -> Any:
    """The evaluator of one task: dict(kind, name, data, and what that kind takes).

    kind: 'zeroshot' (class_names, templates), 'retrieval' (candidates: a data entry whose texts
    are further candidates), 'captioning'. Raises ValueError for an unknown kind.
    """
    kind, name = task["kind"], task["name"]
    if kind == "zeroshot":
        names = task.get("class_names") or pipeline.class_names(task["data"])
        return zeroshot.ZeroShot(name, names, prompts.load(task.get("templates", "photo")))
    if kind == "retrieval":
        return retrieval.Retrieval(name, extra_texts=_candidates(task))
    if kind == "captioning":
        drawn = bool(records) and "scene" in records[0]
        scorer = captioning.score_scene if drawn else captioning.score_references
        return captioning.Captioning(name, scorer=scorer)
    raise ValueError(f"task {kind!r}: choose 'zeroshot', 'retrieval' or 'captioning'")


def _candidates(task: Mapping[str, Any]) -> list[str]:
    if not task.get("candidates"):
        return []
    found = pipeline.eval_records(task["candidates"], "train")
    return sorted({text for record in found for text in record["text"]})


class _LabelTexts:
    """A predictor whose texts are class names in prompts (see CoCaModel.encode_text)."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.encode_image = model.encode_image

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return self._model.encode_text(texts, labels=True)


def run_tasks(
    model: Model, tasks: Sequence[Mapping[str, Any]], workdir: str, *, step: int | None = None
) -> dict[str, float]:
    """Runs every task; on process 0 writes eval.json and the examples for the report.

    A task with `known_only` scores only records whose text the candidates hold.
    """
    scores: dict[str, float] = {}
    main_process = jax.process_index() == 0
    for task in tqdm.tqdm(tasks, desc="evaluate", unit="task", disable=not main_process):
        records = read_records(task["data"], model.image_size, model.resize, task.get("limit", 0))
        if task.get("known_only"):
            known = set(_candidates(task))
            records = [r for r in records if set(r["text"]) & known]
        evaluator = make_evaluator(task, records)
        predict = _LabelTexts(model) if task["kind"] == "zeroshot" else model
        scores |= dict(evaluator.run(predict, records))
        scores[f"{evaluator.name}/num_examples"] = len(records)
        if main_process:
            results.save_examples(workdir, evaluator.name, evaluator.examples)
    if step is not None:
        scores["step"] = step
    if main_process:
        results.save_results(workdir, scores)
    return scores


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("checkpoint", None, "A run, checkpoint or converted weights.")
    flags.DEFINE_string("data", None, "A folder that `prepare` wrote, or 'scenes'.")
    flags.DEFINE_list("tasks", ["zeroshot", "retrieval", "captioning"], "What to score.")
    flags.DEFINE_string("split", "test", "Split of the data.")
    flags.DEFINE_string("name", "", "Data set name in the scores; default: folder and split.")
    flags.DEFINE_multi_string("where", [], "field=value[,value...]: only these records.")
    flags.DEFINE_string("templates", "", "Prompt set or text file for zero-shot.")
    flags.DEFINE_string("class_names", "", "Text file with a class name a line.")
    flags.DEFINE_integer("limit", 0, "At most so many records; 0: all.")
    flags.DEFINE_string("out", "", "Where eval.json goes; default: beside the checkpoint.")


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry."""
    if len(argv) > 1 or not flags.FLAGS.checkpoint or not flags.FLAGS.data:
        raise ValueError("give --checkpoint=DIR --data=PATH [--tasks=...] and nothing else")
    data: dict[str, Any] = dict(split=flags.FLAGS.split)
    builtin = flags.FLAGS.data == "scenes"
    data |= dict(builtin="scenes") if builtin else dict(path=flags.FLAGS.data)
    if flags.FLAGS.where:
        pairs = (item.split("=", 1) for item in flags.FLAGS.where)
        data["where"] = {field: values.split(",") for field, values in pairs}
    name = flags.FLAGS.name or f"{pathlib.Path(flags.FLAGS.data).name}_{flags.FLAGS.split}"
    tasks = []
    for kind in flags.FLAGS.tasks:
        task: dict[str, Any] = dict(kind=kind, name=name, data=dict(data), limit=flags.FLAGS.limit)
        if kind == "captioning" and builtin:
            task["data"]["objects"] = (1,)  # what exact match is defined for
        if kind == "zeroshot":
            task["data"]["kind"] = "label"
            if flags.FLAGS.templates:
                task["templates"] = flags.FLAGS.templates
            if flags.FLAGS.class_names:
                lines = pathlib.Path(flags.FLAGS.class_names).read_text().splitlines()
                task["class_names"] = [line.strip() for line in lines if line.strip()]
        tasks.append(task)

    from coca_jax import inference

    model = inference.load(flags.FLAGS.checkpoint)
    out = flags.FLAGS.out or flags.FLAGS.checkpoint
    scores = run_tasks(model, tasks, out)
    for key, value in scores.items():
        print(f"{key:60s} {value:10.4f}")
    return scores


if __name__ == "__main__":
    define_flags()
    cli.run(main)
