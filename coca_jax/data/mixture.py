"""The training data of a run: its sources, opened once, and the share of each in a batch."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from coca_jax.config import Config, Entry
from coca_jax.data import batch_schedule, filters, order, supervision
from coca_jax.data import prompts as prompt_sets
from coca_jax.data.batch_schedule import Stage
from coca_jax.data.filters import Indexes
from coca_jax.data.sources import array_record, manifest
from coca_jax.data.sources.source import Source, read_all, read_whole_texts
from coca_jax.data.texts import Draw

UNEVEN = 10  # times that one source is gone through for each of another, at which a run says so


class Mixture:
    """What `config.data.sources` names.

    Nothing is opened before it is asked for, and then once: pass one Mixture to all that needs
    the training data of a process.

    Args:
        config: of a run.
        workdir: of the run, for the index files of views whose data cannot be written beside;
            '': none.
        process_index, process_count: of this process, and how many there are.

    Attributes:
        main_process: whether this process says what is true of the data of all.
        entries: of `config.data.sources`.
        shares: rows of each source in a batch of config.batch_size.
        pattern: int32 [batch], the source of each row of such a batch.

    Raises:
        ValueError: there is no source, or the weights do not give whole numbers of rows.
    """

    def __init__(
        self, config: Config, workdir: str = "", process_index: int = 0, process_count: int = 1
    ):
        self._config = config
        self.main_process = process_index == 0
        self._indexes = Indexes(os.fspath(workdir), process_index, process_count)
        self.entries = [
            Entry.of(entry, f"config.data.sources[{i}]")
            for i, entry in enumerate(config.data.sources)
        ]
        for size in batch_schedule.sizes(config):
            self.shares = shares(self.entries, size)
        self.pattern = order.rows(self.shares)

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """The stages of the run's batch sizes; one without config.batch_sizes."""
        grow = bool(self._config.batch_sizes)
        steps = batch_schedule.steps_of(self._config, self.num_examples) if grow else 0
        return batch_schedule.of(self._config, steps, lambda size: shares(self.entries, size))

    def rows(self, process_index: int, process_count: int) -> Rows:
        """The rows of one process in a batch of the last stage, config.batch_size.

        Raises:
            ValueError: the batch does not split over so many processes.
        """
        return self.rows_of(self.stages[-1], process_index, process_count)

    def rows_of(self, stage: Stage, process_index: int, process_count: int) -> Rows:
        """The rows of one process in a batch of a stage. Raises as `rows`."""
        pattern = order.rows(stage.shares)
        if len(pattern) % process_count:
            raise ValueError(
                f"batch_size={len(pattern)} is not divisible by {process_count} processes"
            )
        return Rows(stage, pattern, process_index, process_count)

    def stage(self, step: int) -> Stage:
        """The stage that a step is in."""
        return self.stages[batch_schedule.number_at(self.stages, step)]

    @functools.cached_property
    def sources(self) -> list[Source]:
        """The sources, each with what its kind trains on in every record.

        Raises:
            ValueError, FileNotFoundError: missing, empty or unsuitable data, in one line.
        """
        found = [
            filters.open_source(entry, "train", training=True, indexes=self._indexes)
            for entry in self.entries
        ]
        for source, entry in zip(found, self.entries):
            source.kind = source.kind.configured(entry, self._config.data)
        return found

    @property
    def sizes(self) -> list[int]:
        """Examples of each source."""
        return [len(source) for source in self.sources]

    @property
    def num_examples(self) -> int:
        """Examples in one pass over all sources together."""
        return sum(self.sizes)

    @functools.cached_property
    def data_digests(self) -> list[dict[str, Any] | None]:
        """`manifest.digest` of each source, what it leaves out included; None of those that are no
        prepared data."""
        _ = self.sources  # what is wrong with them is said in its own words
        return [
            manifest.digest(entry.path, entry.split or "train") if entry.path else None
            for entry in self.entries
        ]

    def epochs(self, step: int) -> list[float]:
        """How often each source has been gone through after `step` batches."""
        return [seen / size for seen, size in zip(self.stage(step).seen(step), self.sizes)]

    def pairs(self, step: int) -> int:
        """Examples in all batches before a step."""
        return sum(self.stage(step).seen(step))

    def indices(self, number: int, positions: np.ndarray) -> np.ndarray:
        """Which example of source `number` stands at each position of its endless stream."""
        size = len(self.sources[number])
        return order.indices(positions, size, self._config.seed, number)

    def draw(self, number: int, positions: np.ndarray) -> Draw:
        """The random choices of source `number` at these positions."""
        return Draw(self._config.seed, number, positions)

    def describe(self) -> str:
        """A line for each source: its examples, and its rows of a batch; one for each stage."""
        grown = [
            f"from step {stage.first}: {sum(stage.shares)} rows, {stage.shares} of the sources"
            for stage in (self.stages if self._config.batch_sizes else ())
        ]
        lines = [
            f"source {number}: {source.name}, {source.kind.name}, {len(source)} examples, {share} "
            f"rows of {self._config.batch_size}"
            for number, (source, share) in enumerate(zip(self.sources, self.shares))
        ]
        return "\n".join([*lines, *grown])

    def remark_small(self) -> str:
        """A warning where a batch has more rows of a source than that has examples, else ''."""
        largest = max(batch_schedule.sizes(self._config))
        small = [
            f"{share} rows of source {number}, {source.name}, which has {len(source)} examples"
            for number, (source, share) in enumerate(
                zip(self.sources, shares(self.entries, largest))
            )
            if share > len(source)
        ]
        if not small or largest > self.num_examples:  # then it is said of all data
            return ""
        return (
            f"warning: a batch of {largest} has {' and '.join(small)}: each is in it several "
            "times, as a negative of itself; lower its weight or the batch size"
        )

    def remark_uneven(self) -> str:
        """A warning where sources of equal weights are gone through very unevenly, else ''. Weights
        are shares of a batch whatever the sizes: of a million pairs beside a thousand, the second
        is half of what trains."""
        times = self.epochs(batch_schedule.steps_of(self._config, self.num_examples))
        often, seldom = (times.index(pick(times)) for pick in (max, min))
        equal = len({entry.weight for entry in self.entries}) == 1
        if not equal or times[often] < UNEVEN * max(1, times[seldom]):
            return ""
        shares = [
            f"source {number}, {self.sources[number].name} ({self.sizes[number]:,} examples), "
            f"{times[number]:,.3g} times"
            for number in (often, seldom)
        ]
        return (
            f"warning: the run goes through {shares[0]}, and through {shares[1]}: a weight is a share "
            "of the batch, whatever the size, and these are equal. For other shares give "
            "--data=PATH:KIND:WEIGHT, or weight in config.data.sources"
        )

    def sample_texts(self, limit: int) -> Iterator[str]:
        """Texts as training will see them: a sample of `limit`, spread evenly over the sources."""
        for number, source in enumerate(self.sources):
            count = min(len(source), -(-limit // len(self.sources)))
            picked = self.indices(number, np.arange(count))
            for row, record in read_whole_texts(source, picked):
                yield from source.kind.vocabulary_texts(record, row)

    def step_examples(self, step: int) -> list[dict[str, Any]]:
        """Which examples the batch of a step holds, row by row, without reading an image.

        Returns:
            dicts of row, source (its name), epoch, index, key, text (as trained on); of a record
            that cannot be read key '' and why as text.
        """
        stage = self.stage(step)
        pattern = order.rows(stage.shares)
        result: list[dict[str, Any]] = [{} for _ in pattern]
        for number, (source, share) in enumerate(zip(self.sources, stage.shares)):
            positions = stage.seen(step)[number] + np.arange(share, dtype=np.int64)
            picked = self.indices(number, positions)
            records, unread = read_all(source, picked, texts=True)
            shown = source.kind.shown(records, self.draw(number, positions))
            rows = np.flatnonzero(pattern == number)
            rows_of_step = zip(rows, positions, picked, records, shown)
            for n, (row, at, index, record, text) in enumerate(rows_of_step):
                result[row] = dict(
                    row=int(row),
                    source=source.name,
                    epoch=int(at) // len(source),
                    index=int(index),
                    key=record.key,
                    text=unread[n].detail if n in unread else text,
                )
        return result


class Rows:
    """The rows of the global batches of a stage that process p of P has: [p * count, (p + 1) *
    count).

    Attributes:
        process_index, process_count: p and P.
        count: of the rows.
        sources: int32 [count], the number of the source of each.
        here: how many of them each source has.
        place: int64 [count], where each stands when the sources' rows follow one another.
    """

    def __init__(self, stage: Stage, pattern: np.ndarray, process_index: int, process_count: int):
        self.process_index, self.process_count = process_index, process_count
        self.count = len(pattern) // process_count
        first = process_index * self.count
        self._stage, count = stage, len(stage.shares)
        self._before = np.bincount(pattern[:first], minlength=count).tolist()
        self.sources = pattern[first : first + self.count]
        self.here: list[int] = np.bincount(self.sources, minlength=count).tolist()
        self.place = np.argsort(np.argsort(self.sources, kind="stable"), kind="stable")

    def positions(self, number: int, step: int) -> np.ndarray:
        """Where in its endless stream source `number` stands in these rows of a step: int64."""
        first = self._stage.seen(step)[number] + self._before[number]
        return first + np.arange(self.here[number], dtype=np.int64)


def shares(entries: Sequence[Entry], batch_size: int) -> list[int]:
    """How many rows of each batch come from each source.

    Raises:
        ValueError: there is no source, or the weights do not give whole numbers.
    """
    if not entries:
        raise ValueError("data.sources is empty: give at least one dict(path=...|builtin='scenes')")
    weights = [entry.weight for entry in entries]
    exact = [batch_size * weight / sum(weights) for weight in weights]
    rounded = [round(share) for share in exact]
    off = max(abs(a - b) for a, b in zip(exact, rounded))
    # Weights such as 0.333333 mean thirds; in a large batch as much may be a good part of a row.
    if off > min(1e-6 * batch_size, 0.01) or sum(rounded) != batch_size or 0 in rounded:
        if len(weights) > batch_size:
            remedy = f"give a batch_size of at least {len(weights)}"
        else:
            remedy = f"weights {nearest_shares(weights, batch_size)} do; or change batch_size"
        raise ValueError(
            f"batch_size={batch_size} with source weights {weights} gives shares "
            f"{[round(share, 3) for share in exact]}, not whole numbers; {remedy}"
        )
    return rounded


def nearest_shares(weights: Sequence[float], batch_size: int) -> list[int]:
    """Rows of a batch for each of at most batch_size weights: whole numbers that add up, each at
    least 1, otherwise nearest to the weights."""
    exact = [weight / sum(weights) * batch_size for weight in weights]
    rows = [max(1, int(share)) for share in exact]
    while sum(rows) > batch_size:  # a row for each of many small shares is taken from the largest
        rows[rows.index(max(rows))] -= 1
    nearest = sorted(range(len(rows)), key=lambda i: rows[i] - exact[i])
    for i in nearest[: batch_size - sum(rows)]:
        rows[i] += 1
    return rows


def declared_classes(entry: Entry) -> list[str]:
    """The class names that a data set declares, in its order; [] where only its records tell."""
    if not supervision.of(entry).declared:
        return []
    if entry.path and not entry.label_field:
        return array_record.read_manifest(entry.path).get("class_names") or []
    if entry.builtin:
        from coca_jax.data import scenes

        return scenes.class_names()
    return []


def class_names(source: Entry | Mapping[str, Any] | str, split: str = "test") -> list[str]:
    """The class names of a data set: those it declares, else those its records have; of
    questions, the answers."""
    entry = Entry.of(source)
    return declared_classes(entry) or filters.open_source(entry, split).labels()


def head_classes(config: Config, mixture: Mixture | None = None) -> tuple[str, ...]:
    """The classes of the run's task head, in the order of its outputs; () without a head.

    They are the lines of `config.head.classes`, or else the class names of the training sources
    that have labels or answers: of each source as declared, or sorted, those of the first before
    others. `mixture` is that of `config`, where it is open already.

    Raises:
        ValueError: no source has labels; names that repeat, or fewer than two.
        FileNotFoundError: no such file or data.
    """
    head = config.head
    if not head.kind:
        return ()
    mixture = mixture or Mixture(config)
    numbers = [n for n, entry in enumerate(mixture.entries) if supervision.of(entry).has_classes]
    if not numbers:
        able = " or ".join(repr(name) for name, one in supervision.KINDS.items() if one.has_classes)
        raise ValueError(f"head.kind={head.kind!r} needs a source of kind {able}")
    if not head.classes:
        found = [
            declared_classes(mixture.entries[n]) or mixture.sources[n].labels() for n in numbers
        ]
        return tuple(dict.fromkeys(name for names in found for name in names))
    lines = prompt_sets.read_lines(head.classes, f"head.classes={head.classes}")
    names = tuple(line.strip() for line in lines if line.strip())
    if len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(
            f"head.classes={head.classes} has {len(names)} names, {len(set(names))} "
            "distinct; give two or more, each once"
        )
    return names
