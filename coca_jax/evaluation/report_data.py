"""Reads the files of a run for its report, and formats its scores."""

from __future__ import annotations

import array
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from coca_jax import config as typed
from coca_jax.config.base import is_number
from coca_jax.data.sources import files
from coca_jax.evaluation import history
from coca_jax.evaluation.evaluators import base, results
from coca_jax.evaluation.evaluators.base import Metric, Scale
from coca_jax.evaluation.metrics.intervals import COMPANIONS
from coca_jax.runtime import bounded_json, goodput, json_files, metric_log, storage

_MISSING = math.nan


@dataclasses.dataclass
class Logged:
    """Logged training metrics by column; as dicts, millions of rows would need gigabytes.

    steps: step of each row; columns: {name: values}, NaN where a row has no finite value; last: the
    last row.
    """

    steps: array.array[float] = dataclasses.field(default_factory=lambda: array.array("d"))
    columns: dict[str, array.array[float]] = dataclasses.field(default_factory=dict)
    last: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> Logged:
        """Collects rows into columns; each row has a 'step'."""
        found = cls()
        for count, row in enumerate(rows):
            found.steps.append(row["step"])
            for name, value in row.items():
                column = found.columns.get(name)
                if column is None:
                    column = found.columns[name] = array.array("d", [_MISSING]) * count
                column.append(value if is_number(value) else _MISSING)
            if len(row) < len(found.columns):
                for column in found.columns.values():
                    if len(column) == count:
                        column.append(_MISSING)
            found.last = row
        return found

    def __len__(self) -> int:
        return len(self.steps)

    def points(self, name: str) -> Iterator[tuple[float, float]]:
        """(step, value) for each row with a finite value of `name`."""
        pairs = zip(self.steps, self.columns.get(name, ()))
        return (pair for pair in pairs if not math.isnan(pair[1]))

    def seconds(self) -> dict[str, float]:
        """{part: total} of the columns named '<part>_seconds', longest first."""
        totals = {
            name.removesuffix("_seconds"): sum(value for _, value in self.points(name))
            for name in self.columns
            if name.endswith("_seconds")
        }
        positive = {name: seconds for name, seconds in totals.items() if seconds > 0}
        return dict(sorted(positive.items(), key=lambda item: -item[1]))


_MAX_BYTES = 1 << 30  # size limit of a file; files with images are the largest


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The parsed files of a run; missing files are empty.

    logged: metrics.jsonl; evaluations: dict(step, scores) each; scores: of the last evaluation;
    goodput: accumulated over restarts (runtime/goodput.py); steps: {task: step at which it was
    scored}, such as {'retrieval/x': 2000}; parents: number of parent folders in `name`.
    """

    folder: epath.Path
    config: dict[str, Any]
    logged: Logged
    evaluations: list[dict[str, Any]]
    scores: dict[str, Any]
    examples: dict[str, Any]
    goodput: dict[str, Any]
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    parents: int = 0

    @property
    def name(self) -> str:
        """Name of the folder, preceded by `parents` parent folders."""
        return "/".join(self.folder.parts[-1 - self.parents :])

    @property
    def last_step(self) -> int:
        """The last step that was logged or evaluated; 0 if unknown."""
        if self.logged:
            return int(self.logged.last["step"])
        return int(self.scores.get("step") or 0)


def read_several(workdirs: Sequence[str | os.PathLike[str]]) -> list[RunFiles]:
    """Reads several runs and gives them distinct names, with parent folders where necessary.
    Raises the errors of `read`, and ValueError if a run occurs twice."""
    given = set()
    for workdir in workdirs:
        place = files.real(os.fspath(workdir))
        if place in given:
            raise ValueError(f"workdir {workdir}: given twice. Give each run once.")
        given.add(place)
    runs = [read(workdir) for workdir in workdirs]
    most = max(len(run.folder.parts) for run in runs)
    for parents in range(most):
        runs = [dataclasses.replace(run, parents=parents) for run in runs]
        if len({run.name for run in runs}) == len({str(run.folder) for run in runs}):
            break
    return runs


def read(workdir: str | os.PathLike[str]) -> RunFiles:
    """Reads the files of a run. Raises FileNotFoundError if the folder doesn't exist, ValueError if
    it contains neither metrics nor evaluations."""
    folder = storage.place(workdir)
    if not folder.is_dir():
        raise FileNotFoundError(f"workdir {folder}: not a folder. Give the workdir of a run.")
    config = _read_json(folder / "config.json")
    config.pop(json_files.SEAL_KEY, None)  # the checksum of the file, not a config key
    if config:  # validate types only: missing keys keep no value in the report
        typed.read(typed.StoredConfig, config, f"{folder / 'config.json'}: config", old=True)
    evaluations = [row for row in history.read(folder) if isinstance(row.get("scores"), dict)]
    found = RunFiles(
        folder=folder,
        config=config,
        logged=Logged.of(_numbers(metric_log.rows(folder))),
        evaluations=[row | dict(scores=_scores(row["scores"])) for row in _numbers(evaluations)],
        scores=_scores(_read_json(folder / "eval.json")),
        examples=_read_json(folder / "eval_examples.json"),
        steps=_steps(_read_json(folder / results.STEPS)),
        goodput=_goodput(folder / goodput.FILE),
    )
    if not found.logged and not found.scores:
        raise ValueError(f"workdir {folder}: no metrics.jsonl or eval.json. Run train first.")
    return found


def _read_json(path: epath.Path) -> dict[str, Any]:
    """{} if the file doesn't exist. Raises ValueError if it is not a JSON object."""
    try:
        return bounded_json.parse(path.read_bytes(), _MAX_BYTES) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from None


def _steps(found: dict[str, Any]) -> dict[str, int]:
    return {task: step for task, step in found.items() if isinstance(step, int)}


def _goodput(path: epath.Path) -> dict[str, Any]:
    """{} if the file is incomplete; training also starts anew then."""
    found = _read_json(path)
    try:
        if found:
            goodput.fold(found, found["life"]["step"], 0.0)
            int(found["starts"])
        return found
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
        return {}


def _numbers(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the rows with a valid step, reduced to numbers and scores."""
    for row in rows:
        step = row.get("step")
        if isinstance(step, int) and _plain(step) and step >= 0:
            yield {k: v for k, v in row.items() if _plain(v) or k == "scores"}


def _scores(scores: dict[str, Any]) -> dict[str, Any]:
    """The entries that are numbers or None."""
    return {name: value for name, value in scores.items() if _plain(value)}


def _plain(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and abs(value) < 1e300)


# Formatting of numbers and names.


def number(value: float) -> str:
    """Formats a number with about four significant digits; only tiny ones have an exponent."""
    size = abs(value)
    if value == round(value) and size < 1e15:
        return f"{value:,.0f}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.001:
        return f"{value:.4g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Formats seconds as '3.2 s', '12 min 05 s' or '7 h 30 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def metric_of(evaluator: str, name: str, values: Iterable[Any]) -> Metric:
    """The evaluator's declaration of a metric, or a guess from its name and values.

    values: all values that are displayed together; None for those that are not finite.
    """
    known = base.kinds().get(evaluator)
    if known is not None and name in known.metrics:
        return known.metrics[name]
    words = name.replace("_", " ")
    plain = "perplexity" in name or "rank" in name
    plain = plain or not all(0 <= value <= 1 for value in values if is_number(value))
    return Metric(words[:1].upper() + words[1:], Scale.PLAIN if plain else Scale.PERCENT)


def title_of(evaluator: str) -> str:
    """The evaluator's title, or its name if it is not registered."""
    known = base.kinds().get(evaluator)
    return known.title if known is not None else evaluator


def score(metric: Metric, value: float | None) -> str:
    """Formats a value in the metric's scale; a percentage outside 0 to 1 is not scaled."""
    if value is None:
        return "not finite"
    if metric.scale is Scale.HUNDREDFOLD:
        return f"{100 * value:.1f}"
    if metric.scale is Scale.PERCENT and 0 <= value <= 1:
        return f"{100 * value:.1f}%"
    return number(value)


def factor(metric: Metric) -> float:
    """Factor that scales a value on a chart axis in the same way as `score`."""
    return 1.0 if metric.scale is Scale.PLAIN else 100.0


def interval(metric: Metric, scores: Mapping[str, Any], name: str) -> str:
    """Formats the 95% interval of a score in the score's scale; '' if it has none."""
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    if low is None or high is None:
        return ""
    sign = "%" if score(metric, scores.get(name)).endswith("%") else ""
    if sign or metric.scale is Scale.HUNDREDFOLD:
        first, last = f"{100 * low:.1f}", f"{100 * high:.1f}"
    else:
        first, last = number(low), number(high)
    return f"{first}\u2009\u2013\u2009{last}{sign}"


def split_name(name: str) -> tuple[str, str, str]:
    """Splits a score name into (evaluator, dataset, metric); ('', '', name) for other names."""
    parts = name.split("/")
    return (parts[0], "/".join(parts[1:-1]), parts[-1]) if len(parts) >= 3 else ("", "", name)


# Scores for the report: one headline and one table per task, as declared by the evaluators.


Scores = Mapping[str, Any]
_COUNTED = "num_"  # prefix of metrics that count examples, images or texts


def tasks_of(scores: Scores) -> dict[tuple[str, str], list[str]]:
    """{(evaluator, dataset): metrics}, sorted by evaluator, then by dataset."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in scores:
        evaluator, data, metric = split_name(name)
        if evaluator and not _is_companion(name, scores):
            found.setdefault((evaluator, data), []).append(metric)
    order = {kind: place for place, kind in enumerate(base.kinds())}
    by_place = sorted(found.items(), key=lambda item: (order.get(item[0][0], 99), item[0]))
    return {task: sorted(metrics, key=_metric_order(task[0])) for task, metrics in by_place}


def _is_companion(name: str, scores: Scores) -> bool:
    return any(name.endswith(s) and name.removesuffix(s) in scores for s in COMPANIONS)


def _metric_order(evaluator: str) -> Any:
    """Sort key: declared metrics in their order, then the others by name, R@5 before R@10."""
    known = base.kinds().get(evaluator)
    declared = list(known.metrics) if known is not None else []

    def place(metric: str) -> tuple[int, str, int]:
        head = metric.rstrip("0123456789")
        number = int(metric[len(head) :] or 0)
        return declared.index(metric) if metric in declared else 99, head, number

    return place


def headlines(scores: Scores, metrics: Mapping[tuple[str, str], list[str]]) -> list[dict[str, Any]]:
    """One tile per task: the first headline metric in large type, up to two others in small."""
    tiles = []
    for (evaluator, data), present in metrics.items():
        wanted = headline_metrics(evaluator, present)
        lines = [_line(scores, evaluator, data, metric) for metric in wanted]
        if lines:
            title = title_of(evaluator)
            tiles.append(dict(title=title, data=data, first=lines[0], rest=lines[1:3]))
    return tiles


def headline_metrics(evaluator: str, present: Sequence[str]) -> list[str]:
    """The evaluator's headline metrics among `present`; for an unknown evaluator, the first one."""
    known = base.kinds().get(evaluator)
    if known is None:
        return [metric for metric in present if not metric.startswith(_COUNTED)][:1]
    return [metric for metric in known.headlines if metric in present]


def _line(scores: Scores, evaluator: str, data: str, metric: str) -> dict[str, Any]:
    name = f"{evaluator}/{data}/{metric}"
    shown = metric_of(evaluator, metric, [scores[name]])
    count = scores.get(f"{name}_count")
    return dict(
        title=shown.title,
        value=score(shown, scores[name]),
        interval=interval(shown, scores, name),
        chance=_baseline(shown, scores, f"{name}_chance"),
        majority=_baseline(shown, scores, f"{name}_majority"),
        count="" if count is None else f"{count:,.0f}",
        lower=shown.lower,
    )


def _baseline(shown: Metric, scores: Scores, name: str) -> str:
    """Formats the baseline of a score in the score's scale; '' if it has none."""
    value = scores.get(name)
    return "" if value is None else score(shown, value)


def tables(
    scores: Scores, metrics: Mapping[tuple[str, str], list[str]], run: RunFiles
) -> list[dict[str, Any]]:
    """One table per task: dict(title, data, rows, note). The note names the step of the scores if
    it is not the run's last step."""
    found = []
    for (evaluator, data), present in metrics.items():
        step = run.steps.get(f"{evaluator}/{data}", run.last_step)
        sizes = [
            f"{scores[f'{evaluator}/{data}/{metric}']:,.0f} {metric.removeprefix(_COUNTED)}"
            for metric in present
            if metric.startswith(_COUNTED) and scores[f"{evaluator}/{data}/{metric}"] is not None
        ]
        rows = [
            _line(scores, evaluator, data, metric)
            for metric in present
            if not metric.startswith(_COUNTED)
        ]
        title = title_of(evaluator)
        sizes += [f"after step {step:,}"] if step != run.last_step else []
        found.append(dict(title=title, data=data, rows=rows, note=", ".join(sizes)))
    return found


def side_by_side(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """One table per task with one column per run: dict(title, data, rows). Each row marks its best
    value."""
    together: dict[str, Any] = {}
    for run in runs:
        together |= run.scores
    found = []
    for (evaluator, data), present in tasks_of(together).items():
        rows = []
        for metric in present:
            if metric.startswith(_COUNTED):
                continue
            name = f"{evaluator}/{data}/{metric}"
            values = [run.scores.get(name) for run in runs]
            shown = metric_of(evaluator, metric, values)
            finite = [value for value in values if value is not None]
            best = None
            if len(set(finite)) > 1:
                best = min(finite) if shown.lower else max(finite)
            cells = [
                dict(
                    value=score(shown, value) if name in run.scores else "",
                    interval=interval(shown, run.scores, name),
                    best=value is not None and value == best,
                )
                for run, value in zip(runs, values)
            ]
            rows.append(dict(title=shown.title, lower=shown.lower, cells=cells))
        found.append(dict(title=title_of(evaluator), data=data, rows=rows))
    return found
