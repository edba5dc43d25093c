"""Base class of evaluators: name, flags, required record fields, model methods and report rows.

The `evaluate` command, the task runner and the report discover evaluators from the modules of this
folder. To add one, add a file with a subclass; no other file changes. Modules here must not import
JAX at the top, so that `--help` and input checks stay fast.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import enum
import functools
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from annotated_types import Interval, MinLen

import coca_jax.evaluation.evaluators
from coca_jax.config import Entry
from coca_jax.config.base import allowed, check_value
from coca_jax.data import evaluation_data
from coca_jax.data import supervision as sources
from coca_jax.data.filters import open_whole
from coca_jax.evaluation.evaluators import Record
from coca_jax.runtime import multihost


class NotWritten(OSError):
    """Process 0 could not write evaluation results; all processes raise this together."""


@dataclasses.dataclass
class Writing:
    """Runs writes on process 0 and reports a failure on all processes.

    A single process raises an OSError immediately. With several, process 0 stops writing but
    continues to compute, because the others wait for it in collectives; `agree` raises on all.

    main_process: whether this is process 0; count: number of processes; problem: first failure.
    """

    main_process: bool = False
    count: int = 1
    problem: str = ""

    def __call__(self, work: Callable[[], object]) -> None:
        """Calls `work` on process 0."""
        if not self.main_process or self.problem:
            return
        try:
            work()
        except OSError as error:
            if self.count == 1:
                raise
            self.problem = str(error)

    def agree(self) -> None:
        """Raises NotWritten on all processes if a write has failed. All processes must call it."""
        if self.count == 1:
            return
        if line := multihost.agreed("scores", self.problem):
            raise NotWritten(line)


RecordLimit = Annotated[int, Interval(ge=0)]  # 0: all
# Keys of every task and their types; evaluators can add options.
TASK = dict(
    kind=str,
    name=Annotated[str, MinLen(1)],
    data=Mapping[str, Any],
    limit=RecordLimit,
    known_only=bool,
    candidates=Mapping[str, Any],
)
_NEEDED = ("kind", "name", "data")


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of `coca-jax evaluate`; its default determines its type. Evaluators can share a flag.

    least: lower bound of a number.
    """

    name: str
    default: str | bool | int
    help: str
    least: int | None = None


class Scale(enum.Enum):
    """Display of a metric: a percentage, a fraction times 100, or the value itself."""

    PERCENT = "percent"
    HUNDREDFOLD = "hundredfold"
    PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A row of the report. lower: whether a lower value is better."""

    title: str
    scale: Scale = Scale.PERCENT
    lower: bool = False


@dataclasses.dataclass
class Setting:
    """Context of an evaluator.

    records: records of the task. batch_size: batch size of the model in images. main_process:
    whether this process shows progress bars. write: performs file writes. workdir: folder for
    partial results. request: what partial results depend on besides the task. shared: cache that
    the evaluators of one model share.
    """

    records: Any = ()
    batch_size: int = 64
    main_process: bool = False
    write: Writing = dataclasses.field(default_factory=Writing)
    workdir: str = ""
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)

    def common(self, *, several: bool = True) -> dict[str, Any]:
        """Arguments common to all evaluators. several: pass several model batches per call, so that
        the model prefetches the next batch while it computes."""
        times = max(1, 1024 // self.batch_size) if several else 1
        return dict(progress=self.main_process, batch_size=self.batch_size * times)


class Evaluator(abc.ABC):
    """A family of metrics on one dataset.

    Class attributes:
        kind: name in tasks, and first part of the metric names.
        order: position in messages and in the report.
        title: heading in the report.
        needs: kind of supervision that a record must have (data/supervision.py); '': none.
        programs: methods of the model that it calls.
        usual: whether `evaluate` runs it by default if the data has what it needs.
        flags: flags of `evaluate`, read in `from_flags`.
        options: additional keys of a task, with their types.
        metrics: {name: display in the report}; an undeclared metric is displayed by its name.
        headlines: metrics at the top of the report; the first is in large type.
    Instance attributes:
        name: `<kind>/<dataset>`.
        examples: after `run`, the example images for the report; its key `kind` names a layout in
            evaluation/templates/layouts.
        classes: after `run`, per-class accuracy and confusion matrix, or {}.
        skipped: {metric: reason} for metrics that could not run.
        further: additional `Records` that it reads, such as training examples.
    """

    kind: ClassVar[str]
    order: ClassVar[int]
    title: ClassVar[str]
    needs: ClassVar[str] = ""
    programs: ClassVar[tuple[str, ...]] = ()
    usual: ClassVar[bool] = False
    flags: ClassVar[tuple[Flag, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {}
    metrics: ClassVar[Mapping[str, Metric]] = {}
    headlines: ClassVar[tuple[str, ...]] = ()

    def __init__(self, data_name: str):
        self.name = f"{self.kind}/{data_name}"
        self.examples: dict[str, Any] = {}
        self.classes: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.further: Sequence[Any] = ()

    @classmethod
    def from_flags(cls, task: dict[str, Any], flags: Any) -> None:
        """Adds options from the command's flags to a task, dict(kind, name, data, limit)."""
        if cls.needs:
            task["data"]["kind"] = cls.needs

    @classmethod
    def check_task(cls, task: Mapping[str, Any]) -> None:
        """Raises ValueError or FileNotFoundError for invalid options, without reading data."""
        check_keys(task, cls)

    @classmethod
    def check_model(cls, model: Any, task: Mapping[str, Any]) -> None:
        """Raises ValueError if the model does not support the task."""
        lacking = [name for name in cls.programs if not hasattr(model, name)]
        if lacking:
            part = ", ".join(lacking) if model.writes_captions else "decoder"
            raise ValueError(f"task {cls.kind!r}: this model has no {part}.")

    @classmethod
    def data_of(cls, task: Mapping[str, Any], model: Any) -> dict[str, Any]:
        """The data entry that this evaluator reads for a task."""
        return dict(task["data"])

    @classmethod
    def need_of(cls, model: Any) -> str:
        """The kind of supervision that this model needs in a record, by default `needs`."""
        return cls.needs

    @classmethod
    def more_data(cls, task: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Additional data entries that it reads, with their splits."""
        candidates = task.get("candidates")
        return [dict(dict(split="train"), **candidates)] if candidates else []

    @classmethod
    def check_data(cls, task: Mapping[str, Any]) -> None:
        """Raises ValueError for existing data that this evaluator cannot use."""
        return

    @classmethod
    @abc.abstractmethod
    def from_task(cls, task: Mapping[str, Any], setting: Setting) -> Evaluator:
        """Creates the evaluator of a task. Raises ValueError for invalid options."""

    @abc.abstractmethod
    def run(self, predict: Any, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields (metric name, value)."""


class Pictured(Evaluator):
    """An evaluator that stores example images for the report.

    Args:
      data_name: name of the dataset, the second part of the metric names.
      batch_size: images per call of the model.
      num_examples: number of stored images; `pictures` by default.
      progress: show a progress bar.
    """

    pictures: ClassVar[int] = 24

    def __init__(
        self,
        data_name: str,
        *,
        batch_size: int = 128,
        num_examples: int | None = None,
        progress: bool = False,
    ):
        super().__init__(data_name)
        self.batch_size, self.progress = batch_size, progress
        self.num_examples = self.pictures if num_examples is None else num_examples


@functools.cache
def kinds() -> dict[str, type[Evaluator]]:
    """{kind: evaluator class}, sorted by `order`, from all modules of this folder."""
    for module in pkgutil.iter_modules(coca_jax.evaluation.evaluators.__path__):
        importlib.import_module(f"coca_jax.evaluation.evaluators.{module.name}")
    found, waiting = [], [Evaluator]
    while waiting:
        for subclass in waiting.pop().__subclasses__():
            waiting.append(subclass)
            if "kind" in vars(subclass):
                found.append(subclass)
    return {cls.kind: cls for cls in sorted(found, key=lambda cls: cls.order)}


def get(kind: str) -> type[Evaluator]:
    """The evaluator class of this kind. Raises ValueError for an unknown kind."""
    if kind not in kinds():
        raise ValueError(f"task {kind!r}: unknown. Use one of {', '.join(kinds())}.")
    return kinds()[kind]


def suited(tasks: Sequence[str], data: Mapping[str, Any]) -> list[str]:
    """The tasks whose required supervision the data has, or may have if that is not known yet."""
    counts = evaluation_data.counts(data)
    return [task for task in tasks if not counts or counts.get(get(task).needs, 1)]


def lacks(name: str, evaluator: type[Evaluator]) -> str:
    """The error message for data without the supervision that an evaluator needs."""
    return missing(name, evaluator.needs, evaluator.kind)


def missing(name: str, need: str, task: str) -> str:
    """The error message for data without captions or labels."""
    return (
        f"data {name}: no example has a {need}, which {task} needs. Use "
        f"--tasks={instead(need)}, or {sources.KINDS[need].remedy()}"
    )


def instead(need: str) -> str:
    """The default tasks that work without this kind of supervision."""
    return ",".join(cls.kind for cls in kinds().values() if cls.usual and cls.needs != need)


def check(tasks: Sequence[Any]) -> None:
    """Checks the evaluation tasks of a run without reading images.

    Raises ValueError or FileNotFoundError for an unknown kind, invalid options, missing data, data
    without the required supervision, or two tasks with the same kind and name.
    """
    seen = set()
    # Tasks may share data: check and count it once.
    checked: set[str] = set()
    counts: dict[str, Mapping[str, int]] = {}
    for task in tasks:
        task = task.to_dict() if hasattr(task, "to_dict") else dict(task)
        evaluator = get(task.get("kind", ""))
        evaluator.check_task(task)
        name = task_label(task)
        if name in seen:
            raise ValueError(f"{name}: defined twice. Give one of them another name.")
        seen.add(name)
        data = dict(dict(split="test"), **task["data"])
        for entry in (data, *evaluator.more_data(task)):
            if _key(entry) not in checked:
                _check_split(entry, name)
                checked.add(_key(entry))
        evaluator.check_data(task)
        place = _key(dict(data, kind=""))
        if data.get("path") and place not in counts:
            counts[place] = evaluation_data.counts(data)
        need = evaluator.needs
        if counts.get(place) and not counts[place].get(need, 1):
            raise ValueError(
                f"{name}: no example of {data['path']} [{data['split']}] has a {need}. Remove the "
                f"task, or name the field in its data ({sources.KINDS[need].wanted}_field='NAME')."
            )


def _key(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, default=str)


def _check_split(data: Mapping[str, Any], task: str) -> None:
    """Raises ValueError or FileNotFoundError if the data of a task or its split does not exist."""
    try:
        entry = Entry.of(data, "data")
        entry.check_place("data")
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from None
    for key in ("where", "text_field", "label_field", "image_field", "limit"):
        if entry.builtin and getattr(entry, key):
            raise ValueError(
                f"{task}: {key}={getattr(entry, key)!r}: not supported for "
                f"builtin={entry.builtin!r}. Remove it; to limit the examples, set the task's limit."
            )
    if entry.builtin or not (entry.path or entry.tfds or entry.seqio):
        open_whole(entry)  # raises for an unknown source; cheap for synthetic scenes
        return
    if entry.seqio:  # checking it would import TensorFlow
        return
    try:
        evaluation_data.check_split(entry, entry.split)
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from None


def task_label(task: Mapping[str, Any]) -> str:
    """Name of a task in messages."""
    return f"eval.tasks, {task['kind']} of {task.get('name')}"


def check_apart(task: Mapping[str, Any], other: Mapping[str, Any], use: str) -> None:
    """Raises ValueError if `other`, additional data of a task, contains the data that it scores.
    use: how the task uses `other`."""
    given, test = (Entry.of(dict(dict(split="test"), **data)) for data in (other, task["data"]))
    if test.path and not evaluation_data.splits(test):  # without splits, all data is read
        given = dataclasses.replace(given, split=test.split)
    where = test.where if given.where else given.where  # unfiltered data contains every subset
    if given == dataclasses.replace(test, kind=given.kind, where=where):
        raise ValueError(
            f"{task_label(task)}: {test.path or test.tfds or test.builtin} would be both {use} and "
            "scored. Use another split, or folders `train` and `test`."
        )


def check_keys(task: Mapping[str, Any], evaluator: type[Evaluator]) -> None:
    """Raises ValueError for an unknown key, an invalid value, or a missing key of a task."""
    known = dict(TASK, **evaluator.options)
    name = task_label(dict(task, kind=evaluator.kind))
    for key, value in task.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
            raise ValueError(f"{name}: unknown key {key!r}. {remedy}")
        check_value(known[key], value, f"{name}: {key}")
    for key in _NEEDED:
        if key not in task:
            raise ValueError(f"{name}: {key!r} is missing. Set it to {allowed(known[key])}.")
    if task.get("known_only") and not task.get("candidates"):
        raise ValueError(
            f"{name}: known_only=True without candidates. Set candidates, which define the known "
            "texts."
        )
