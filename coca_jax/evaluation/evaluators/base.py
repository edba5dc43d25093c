"""What an evaluator says of itself: its name, flags, records, programs and rows of the report.

`evaluate`, the runner of tasks (tasks.py) and the report know no evaluator by name: they read what
the modules of this folder declare. To add one, write a file here with a class like these; nothing
else is edited. The declarations import no JAX: the command's help and its refusals come at once.
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

# What process 0 writes of an evaluation: where it cannot, all hear of it at one place.


class NotWritten(OSError):
    """Process 0 could not write what an evaluation found; all processes raise it together."""


@dataclasses.dataclass
class Writing:
    """Writes of the process that does so (`main_process`) of `count`, each a function without
    arguments.

    One process raises what fails at once. Of several, process 0 goes on, as the others expect it in
    the next program, and writes no more; `agree` is where all raise.
    """

    main_process: bool = False
    count: int = 1
    problem: str = ""

    def __call__(self, work: Callable[[], object]) -> None:
        """Does the work on the process that writes."""
        if not self.main_process or self.problem:
            return
        try:
            work()
        except OSError as error:
            if self.count == 1:
                raise
            self.problem = str(error)

    def agree(self) -> None:
        """All processes come here. Raises NotWritten on all of them, with what failed since the
        start."""
        if self.count == 1:
            return
        if line := multihost.agreed("scores", self.problem):
            raise NotWritten(line)


RecordLimit = Annotated[int, Interval(ge=0)]  # 0: all
# Keys of every task and their types; an evaluator may have options of its own.
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
    """A flag of `coca-jax evaluate`, of the type of its default; several evaluators may share it.

    least: the lowest value of a number.
    """

    name: str
    default: str | bool | int
    help: str
    least: int | None = None


class Scale(enum.Enum):
    """How people write a metric: a share as per cent, a share times 100, or the number itself."""

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
    """What an evaluator runs in.

    records: of the task. batch_size: of the model, images at a time. main_process: whether this
    one shows bars. write: does what is written. workdir, request: where unfinished work is kept,
    and what it depends on besides the task. shared: of all evaluators of one model, to keep what
    others need too.
    """

    records: Any = ()
    batch_size: int = 64
    main_process: bool = False
    write: Writing = dataclasses.field(default_factory=Writing)
    workdir: str = ""
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)

    def common(self, *, several: bool = True) -> dict[str, Any]:
        """Arguments that every evaluator takes. several: a call takes several batches of the
        model, which reads the next one while it computes."""
        times = max(1, 1024 // self.batch_size) if several else 1
        return dict(progress=self.main_process, batch_size=self.batch_size * times)


class Evaluator(abc.ABC):
    """A family of metrics of one data set.

    Declared:
        kind: its name in tasks, and the first part of its metrics' names.
        order: its place among the others, in messages and in the report.
        title: of its part of the report.
        needs: what a record must have, the name of a kind of source (data/supervision.py); '': nothing.
        programs: the methods of a model that it calls.
        usual: whether `evaluate` runs it unasked, where the data have what it needs.
        flags: of `evaluate`, read in `from_flags`.
        options: keys of a task in addition to TASK, and their types.
        metrics: name -> how the report shows it; one that is not declared is shown by its name.
        headlines: metrics that stand at the top of the report, the first of them large.
    Of an instance:
        name: `<kind>/<data set>`.
        examples: after `run`, what the report shows; `kind` in it names the layout, a file of
            report/templates/layouts.
        classes: after `run`, accuracy by class and confusion, or {}.
        skipped: metrics that could not run, and why.
        further: what it learns from beside the records of the task, each a `records.Records`.
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
        """Completes a task, dict(kind, name, data, limit), by the command's flags."""
        if cls.needs:
            task["data"]["kind"] = cls.needs

    @classmethod
    def check_task(cls, task: Mapping[str, Any]) -> None:
        """Raises ValueError or FileNotFoundError for options that cannot be, before any work. It
        reads no data."""
        check_keys(task, cls)

    @classmethod
    def check_model(cls, model: Any, task: Mapping[str, Any]) -> None:
        """Raises ValueError for a model that a task cannot score, before any work."""
        lacking = [name for name in cls.programs if not hasattr(model, name)]
        if lacking:
            what = ", ".join(lacking) if model.writes_captions else "decoder"
            raise ValueError(f"task {cls.kind!r}: this model has no {what}")

    @classmethod
    def data_of(cls, task: Mapping[str, Any], model: Any) -> dict[str, Any]:
        """The data entry that this evaluator reads for a task."""
        return dict(task["data"])

    @classmethod
    def need_of(cls, model: Any) -> str:
        """What a record must have for this model: `needs`."""
        return cls.needs

    @classmethod
    def more_data(cls, task: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The data entries that it reads besides, with their splits."""
        candidates = task.get("candidates")
        return [dict(dict(split="train"), **candidates)] if candidates else []

    @classmethod
    def check_data(cls, task: Mapping[str, Any]) -> None:
        """Raises ValueError for data, which are there, that this evaluator cannot take."""
        return

    @classmethod
    @abc.abstractmethod
    def from_task(cls, task: Mapping[str, Any], setting: Setting) -> Evaluator:
        """Makes the evaluator of a task. Raises ValueError for what the task cannot have."""

    @abc.abstractmethod
    def run(self, predict: Any, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields (name, value)."""


class Pictured(Evaluator):
    """An evaluator that keeps pictures for the report.

    Args:
      data_name: of the data set, the second part of the metrics' names.
      batch_size: images at a time.
      num_examples: pictures kept; by default `pictures`.
      progress: shows a bar.
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
    """Every evaluator by its name, in order: the modules of this folder are read for them."""
    for module in pkgutil.iter_modules(coca_jax.evaluation.evaluators.__path__):
        importlib.import_module(f"coca_jax.evaluation.evaluators.{module.name}")
    found, waiting = [], [Evaluator]
    while waiting:
        for one in waiting.pop().__subclasses__():
            waiting.append(one)
            if "kind" in vars(one):
                found.append(one)
    return {one.kind: one for one in sorted(found, key=lambda one: one.order)}


def of(kind: str) -> type[Evaluator]:
    """The evaluator of this name. Raises ValueError for an unknown one."""
    if kind not in kinds():
        raise ValueError(f"task {kind!r}: choose one of {', '.join(kinds())}")
    return kinds()[kind]


def suited(tasks: Sequence[str], data: Mapping[str, Any]) -> list[str]:
    """Those of the tasks for which the data have what they need, where that can be told early."""
    counts = evaluation_data.counts(data)
    return [task for task in tasks if not counts or counts.get(of(task).needs, 1)]


def lacks(name: str, evaluator: type[Evaluator]) -> str:
    """Why data without what an evaluator needs cannot be scored so, and what to do."""
    return missing(name, evaluator.needs, evaluator.kind)


def missing(name: str, need: str, task: str) -> str:
    """Why data without any caption or label cannot be scored, and what to do."""
    return (
        f"data {name}: no example has a {need}, and {task} needs one; give "
        f"--tasks={instead(need)}, or {sources.KINDS[need].remedy()}"
    )


def instead(need: str) -> str:
    """The usual tasks for data that have nothing of this need."""
    return ",".join(one.kind for one in kinds().values() if one.usual and one.needs != need)


def check(tasks: Sequence[Any]) -> None:
    """Raises ValueError or FileNotFoundError for the first of a run's evaluations that is unknown,
    whose options cannot be, whose data are not there, or hold nothing that it needs, as far as that
    can be told without reading images; and for two of one kind and name."""
    seen = set()
    looked: set[str] = set()  # what tasks share is looked at once ...
    counts: dict[str, Mapping[str, int]] = {}  # ... and gone through once, whatever they need of it
    for task in tasks:
        task = task.to_dict() if hasattr(task, "to_dict") else dict(task)
        evaluator = of(task.get("kind", ""))
        evaluator.check_task(task)
        name = called(task)
        if name in seen:
            raise ValueError(f"{name} is there twice; give one of them another name")
        seen.add(name)
        data = dict(dict(split="test"), **task["data"])
        for one in (data, *evaluator.more_data(task)):
            if _key(one) not in looked:
                _check_split(one, name)
                looked.add(_key(one))
        evaluator.check_data(task)
        place = _key(dict(data, kind=""))
        if data.get("path") and place not in counts:
            counts[place] = evaluation_data.counts(data)
        need = evaluator.needs
        if counts.get(place) and not counts[place].get(need, 1):
            raise ValueError(
                f"{name}: no example of {data['path']} [{data['split']}] has a {need}; leave the "
                f"task out, or say in its data which field it is ({sources.KINDS[need].wanted}"
                "_field='NAME')"
            )


def _key(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, default=str)


def _check_split(data: Mapping[str, Any], task: str) -> None:
    """Raises ValueError or FileNotFoundError for data of a task that are not there, or without the
    split."""
    try:
        entry = Entry.of(data, "data")
        entry.check_place("data")
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from None
    for key in ("where", "text_field", "label_field", "image_field", "limit"):
        if entry.builtin and getattr(entry, key):
            raise ValueError(
                f"{task}: {key}={getattr(entry, key)!r}: builtin={entry.builtin!r} is scored whole "
                "and as it is drawn; leave it out, or give the task's own limit"
            )
    if entry.builtin or not (entry.path or entry.tfds or entry.seqio):
        open_whole(entry)  # at once, for scenes; refuses what is nowhere
        return
    if entry.seqio:  # its module is not loaded for this
        return
    try:
        evaluation_data.check_split(entry, entry.split)
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from None


def called(task: Mapping[str, Any]) -> str:
    """What messages call a task."""
    return f"eval.tasks, {task['kind']} of {task.get('name')}"


def check_apart(task: Mapping[str, Any], other: Mapping[str, Any], use: str) -> None:
    """Raises ValueError where a task's other data are those that it scores, or hold them all. use:
    what they are."""
    given, test = (Entry.of(dict(dict(split="test"), **data)) for data in (other, task["data"]))
    if test.path and not evaluation_data.splits(test):  # then all is read, whatever it is called
        given = dataclasses.replace(given, split=test.split)
    where = test.where if given.where else given.where  # the whole holds each part
    if given == dataclasses.replace(test, kind=given.kind, where=where):
        raise ValueError(
            f"{called(task)}: {test.path or test.tfds or test.builtin} would be {use} and scored: "
            "give another split, or folders `train` and `test`"
        )


def check_keys(task: Mapping[str, Any], evaluator: type[Evaluator]) -> None:
    """Raises ValueError for a key that tasks of this kind do not have, with the nearest one, a
    value that cannot be, or a key that is needed and not there."""
    known = dict(TASK, **evaluator.options)
    name = called(dict(task, kind=evaluator.kind))
    for key, value in task.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise ValueError(f"{name}: no key {key!r}; {remedy}")
        check_value(known[key], value, f"{name}: {key}")
    for key in _NEEDED:
        if key not in task:
            raise ValueError(f"{name}: no {key!r}; give {allowed(known[key])}")
    if task.get("known_only") and not task.get("candidates"):
        raise ValueError(
            f"{name}: known_only=True needs candidates, whose texts are the known ones"
        )
