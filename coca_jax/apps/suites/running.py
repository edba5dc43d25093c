"""Goes through a suite, keeps what is finished, and writes its scores.

In the folder of the scores: `suite/<data set>.json` and `.npz` as soon as a data set is done (the
outcome of every example, which comparing.py draws from), then `eval.json`, `suite.md` and
`suite.csv`.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from coca_jax.apps.suites import measuring, metrics
from coca_jax.apps.suites.tables import DATACOMP, Task, slug
from coca_jax.data import source_index
from coca_jax.data.sources import formats
from coca_jax.evaluation.evaluators import results
from coca_jax.evaluation.metrics.intervals import scored
from coca_jax.inference import fingerprint
from coca_jax.runtime import storage

WRITTEN = ("suite", "eval.json", results.STEPS, results.CHECKPOINT, "suite.md", "suite.csv")
_COUNTED = {
    ("selection", "pairs"): ("ties are wrong", "images are drawn"),
    ("retrieval", "plain"): ("an image is one, however many rows it has",),
}
LEADING = ("name", "pretrained", "params (M)", "FLOPs (B)")


def run(
    model: Any,
    tasks: Sequence[Task],
    out: str,
    *,
    suite: str,
    name: str,
    table: str = "",
    probe: bool = False,
) -> tuple[dict[str, float], list[str]]:
    """(the scores of all data sets, lines of the table for people).

    Data sets that an earlier call with the same weights and files finished are taken over. name: of
    the model in the row. table: a CSV file whose row of this name is written, in its columns.
    probe: of classification sets with a split 'train' the linear probe as well.

    Raises ValueError for a damaged table before anything is measured.
    """
    table = table or str(storage.place(out) / "suite.csv")
    read_table(table)  # refuses it before anything is measured
    of_model = dict(weights=model.checksum(), num_frames=model.num_frames)
    scores: dict[str, float] = {}
    ours = [*(f"{out.rstrip('/')}/{name}" for name in WRITTEN), table]
    for task in tasks:
        with_probe = probe and _has_train(task)
        request = dict(of_model, data=_data(task, ours), metric=task.metric, probe=with_probe)
        scores |= _kept(out, task, request) or _measured(model, task, out, request)
    mains = [scores[f"suite/{slug(task.key)}/{task.metric}"] for task in tasks]
    scores[f"suite/{suite}/average"] = sum(mains) / len(mains)
    scores[f"suite/{suite}/num_data_sets"] = float(len(mains))
    results.save_results(out, scores, model.step)
    lines = _lines(tasks, scores, suite)
    storage.write_text(storage.place(out) / "suite.md", "\n".join(lines) + "\n")
    row: dict[str, Any] = {
        task.title: scores[f"suite/{slug(task.key)}/{task.metric}"] for task in tasks
    }
    row["name"], row["params (M)"] = name, _parameters(model) / 1e6
    row[f"Average perf. on {len(mains)} datasets"] = scores[f"suite/{suite}/average"]
    write_row(table, row)
    return scores, lines


def _data(task: Task, ours: Sequence[str]) -> str:
    """Tells the data from others by what costs little: the state of their files. ours: files and
    folders that a suite writes, which may lie among them."""
    folder = task.folder
    states = [source_index.state_of_place(folder.path, but=ours)]
    if folder.layout == "pairs" and not storage.place(folder.path).is_dir():
        # A list alone: its images lie beside it, and so may other sets.
        beside = str(storage.place(folder.path).parent)
        states.append(source_index.state_of_place(beside, formats.MEDIA))
    texts = [folder.kind, *folder.class_names, *folder.prompts]
    # What earlier versions finished that counted otherwise is measured once more.
    counted = _COUNTED.get((folder.kind, folder.layout), ())
    return json.dumps([folder.path, folder.split, states, texts, *counted])


def _has_train(task: Task) -> bool:
    there = (storage.place(task.folder.path) / "train" / "nshards.txt").exists()
    return task.folder.one_label and there


def _kept(out: str, task: Task, request: Mapping[str, Any]) -> dict[str, float] | None:
    file = storage.place(out) / "suite" / f"{slug(task.key)}.json"
    found = results.kept(file, request=dict, scores=dict)
    return found["scores"] if fingerprint.same_request(found.get("request"), request) else None


def _measured(model: Any, task: Task, out: str, request: Mapping[str, Any]) -> dict[str, float]:
    outcome = measuring.measure(
        model, task.folder, batch_size=model.batch_size, show=f"suite/{slug(task.key)}"
    )
    if request["probe"]:
        show = f"suite/{slug(task.key)} probe"
        outcome |= measuring.probe(model, task.folder, batch_size=model.batch_size, show=show)
    there = metrics.names(outcome)
    if task.metric not in there:
        raise ValueError(
            f"{task.folder.path}: {task.metric} of {task.key} needs what the data have not; "
            f"they give {', '.join(there)}"
        )
    scores = dict(_scores(f"suite/{slug(task.key)}", there, outcome))
    buffer, folder = io.BytesIO(), storage.place(out) / "suite"
    np.savez_compressed(buffer, **outcome)  # type: ignore[arg-type]
    storage.write_bytes(folder / f"{slug(task.key)}.npz", buffer.getvalue())
    kept = dict(request=request, scores=scores, key=task.key, metric=task.metric)
    storage.write_text(folder / f"{slug(task.key)}.json", json.dumps(kept))
    return scores


def _scores(
    name: str, there: Sequence[str], outcome: metrics.Outcome
) -> Iterator[tuple[str, float]]:
    count = metrics.count(outcome)
    for metric in there:
        interval = metrics.interval(metric, outcome)
        yield from scored(f"{name}/{metric}", metrics.value(metric, outcome), interval, count)
    yield f"{name}/num_examples", float(count)


def _lines(tasks: Sequence[Task], scores: Mapping[str, float], suite: str) -> list[str]:
    """A table in Markdown, a data set a line."""
    lines = ["| data set | metric | score | 95% | examples |", "|---|---|---|---|---|"]
    for task in tasks:
        name = f"suite/{slug(task.key)}/{task.metric}"
        low, high = scores[f"{name}_low"], scores[f"{name}_high"]
        lines.append(
            f"| {task.title} | {task.metric} | {scores[name]:.4f} | {low:.4f} to {high:.4f} | "
            f"{scores[f'{name}_count']:,.0f} |"
        )
    mean = scores[f"suite/{suite}/average"]
    return [*lines, f"| mean of {len(tasks)} | | {mean:.4f} | | |"]


def _parameters(model: Any) -> int:
    return sum(math.prod(np.shape(x)) for x in jax.tree.leaves(model.params))


def write_row(table: str, row: Mapping[str, Any]) -> None:
    """Writes a model's row into a CSV file, in place of one of the same name.

    A file that is there keeps its columns and their order, and gets those of the row that it lacks
    at its end; a new one has the columns of open_clip's docs/openclip_results.csv, then others.
    """
    rows, columns = read_table(table)
    if not columns:
        averages = [name for name in row if name.startswith("Average perf.")]
        titles = [title for title, _ in DATACOMP.values() if title in row]
        columns = [*LEADING, *averages, *titles]
    columns += [name for name in row if name not in columns]
    same = [i for i, one in enumerate(rows) if one.get("name") == row["name"]]
    shown = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}
    if same:
        rows[same[0]] |= shown
    else:
        rows.append(shown)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.write_text(storage.place(table), buffer.getvalue())


def read_table(table: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, columns) of a CSV file, without a spreadsheet's byte order mark; none where it is not
    there. Raises ValueError for one that could not be written again as it is."""
    place = storage.place(table)
    if not place.exists():
        return [], []
    try:
        reader = csv.DictReader(io.StringIO(place.read_bytes().decode("utf-8-sig"), newline=""))
        rows: list[dict[Any, Any]] = []
        for row in reader:
            rows.append(row)
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than there are columns")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{table}: {error}; mend it, or give another file as --csv") from None
    columns = list(reader.fieldnames or ())
    twice = [name for name in columns if name and columns.count(name) > 1]
    if twice:
        raise ValueError(f"{table}: two columns {twice[0]!r}; rename one, or give another --csv")
    return rows, columns
