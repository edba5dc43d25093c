"""Batches: what is in one, the batch of a step as a function of the step, and a stream of them.

The batch of a step follows from (config, vocabulary, step) alone: process p of P that read it has
the rows [p * b, (p + 1) * b), b being the batch size over P, and the whole is the same for any P.
"""

from __future__ import annotations

import abc
import collections
import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from coca_jax.config import Config
from coca_jax.data import batch_schedule, feature_cache
from coca_jax.data import pixels as pixel_work
from coca_jax.data.examples import Examples, Lengths, Tally
from coca_jax.data.feature_cache import Features
from coca_jax.data.mixture import Mixture, Rows
from coca_jax.data.quarantine import Bad, Quarantine
from coca_jax.data.vocabulary import Vocabulary
from coca_jax.runtime import extras

AHEAD = 2  # batches that are made at the same time, while the one before them is used


class Field(NamedTuple):
    """One array of a batch.

    Attributes:
        dtype: of it.
        shape: of one row of it.
        meaning: what it says.
        trains: whether the train step takes it; else it tells people what was trained on.
    """

    dtype: str
    shape: tuple[int, ...]
    meaning: str
    trains: bool = True


def fields(config: Config) -> dict[str, Field]:
    """What a batch of `config` consists of: the one statement of it, by name.

    Every array has the rows of the batch as its first axis.
    """
    length = (config.model.text.max_len,)
    width = (config.loss.teacher_width,)
    taught = dict(
        teacher_image=Field("float32", width, "the teacher's embedding of the image, or zeros"),
        teacher_text=Field("float32", width, "the teacher's embedding of the text, or zeros"),
    )
    numbered = config.loss.contrastive == "global"
    return dict(
        **(taught if config.loss.teacher_width else {}),
        **({"example": Field("int32", (), "number of it in all data")} if numbered else {}),
        **_seen(config),
        tokens=Field("int32", length, "text from begin to end symbol, then padding"),
        text_valid=Field("bool", length, "which tokens are text"),
        is_label=Field("bool", (), "the text is made of class names"),
        text_id=Field("int32", (2,), "equal for equal captions and for equal sets of labels"),
        prompt_len=Field("int32", (), "tokens before an answer; all of the text without one"),
        class_id=Field("int32", (), "place among the classes of the task head; -1: none"),
        source=Field("int32", (), "number in data.sources", trains=False),
        index=Field("int64", (), "of the record in its source", trains=False),
    )


def _seen(config: Config) -> dict[str, Field]:
    """What the model sees of the image."""
    if config.data.features:
        shape = feature_cache.shape(config)
        kept = feature_cache.dtype(config)
        return dict(encoded=Field(kept, shape, "what a frozen image encoder gives"))
    shape = pixel_work.example_shape(config)
    return dict(image=Field("uint8", shape, "RGB pixels of image, clip or pair, or patches"))


def empty(config: Config, rows: int) -> dict[str, np.ndarray]:
    """So many rows of zeros, of the fields that train."""
    return {
        name: np.zeros((rows, *field.shape), field.dtype)
        for name, field in fields(config).items()
        if field.trains
    }


def trained(batch: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """The fields of a batch that the train step takes."""
    return {name: batch[name] for name, field in fields(config).items() if field.trains}


class Made(NamedTuple):
    """A batch, and what was bad in it: {index: which and why} of each source that has rows in
    it."""

    arrays: dict[str, np.ndarray]
    bad: dict[int, dict[int, Bad]]


class Batches:
    """The batches of one process of a run, any of them at any time. Thread-safe.

    Args:
        config: of the run.
        vocabulary: of the run.
        mixture: its data, where they are open already.
        process_index: which of those that read the run's batches this process is, which says its
            rows of each; see partitioning.readers.
        process_count: how many there are.
        class_names: of the task head, in the order of its outputs; () without one.
        features: with config.data.features the kept tokens of each source (training/feature_extraction.py).
        quarantine: of the run; None: an empty one.

    Attributes:
        quarantine: the examples that cannot be used.
        mixture: the data.
        rows: which rows of the global batch these are, in the last stage of config.batch_sizes.
        pixels: decodes the images, or reads their tokens.
        examples: of each source.

    Raises:
        ValueError: missing or empty data, shares or processes that do not divide the batch, values
            of config.data that cannot be.
        FileNotFoundError: data that are not there.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        mixture: Mixture | None = None,
        *,
        process_index: int = 0,
        process_count: int = 1,
        class_names: Sequence[str] = (),
        features: Sequence[feature_cache.Features] = (),
        quarantine: Quarantine | None = None,
    ):
        self.mixture = mixture or Mixture(config)
        self.quarantine = quarantine or Quarantine()
        self.max_bad_fraction = config.data.max_bad_fraction
        here = process_index, process_count
        self._rows = [self.mixture.rows_of(stage, *here) for stage in self.mixture.stages]
        self.rows = self._rows[-1]
        self.pixels: pixel_work.Pixels | feature_cache.Tokens
        if config.data.features:
            self.pixels = feature_cache.Tokens(config, features)
        else:
            self.pixels = pixel_work.Pixels(config)
        self._names = tuple(fields(config))
        self._first = np.cumsum([0, *self.mixture.sizes])  # number of each source's first example
        self.examples = [
            Examples(
                self.mixture,
                number,
                config,
                vocabulary,
                self.pixels,
                class_names,
                self.quarantine,
            )
            for number in range(len(self.mixture.shares))
        ]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step, by `fields`.

        Raises:
            ValueError: a record that the task head cannot learn from; no good record is left in
                the place of bad ones.
        """
        return self.make(step).arrays

    def rows_at(self, step: int) -> Rows:
        """Which rows of the global batch of a step these are."""
        return self._rows[batch_schedule.number_at(self.mixture.stages, step)]

    def make(self, step: int) -> Made:
        """The batch of a step, and what was bad in it."""
        own = self.rows_at(step)
        parts = {
            number: self.examples[number].at(own.positions(number, step))
            for number, count in enumerate(own.here)
            if count
        }
        place = own.place
        rows = [(part, row) for part in parts.values() for row in range(len(part.records))]
        rows = [rows[at] for at in place]
        plans = [part.plan for part in parts.values()]
        plan = {name: np.concatenate([p[name] for p in plans])[place] for name in plans[0]}
        image, failed = self.pixels.render([part.records[row] for part, row in rows], plan)
        for row in sorted(failed):
            part, at = rows[row]
            image[row] = part.replace(at, failed[row])
        found = [part.fields() for part in parts.values()]
        arrays = {name: np.concatenate([f[name] for f in found])[place] for name in found[0]} | {
            self.pixels.field: image
        }
        arrays["example"] = (self._first[arrays["source"]] + arrays["index"]).astype(np.int32)
        bad = {number: part.bad for number, part in parts.items()}
        return Made({name: arrays[name] for name in self._names}, bad)

    def close(self) -> None:
        """Ends the decoding threads."""
        self.pixels.close()


class Stream(abc.ABC):
    """An endless iterator of batches from a step on, made ahead of their use.

    What goes wrong in a batch is raised when that batch is asked for, again each time.

    Args:
        batches: of this process. The stream closes them.
        start_step: of the first batch.

    Attributes:
        step: of the batch that comes next.
    """

    def __init__(self, batches: Batches, start_step: int = 0):
        self._batches, self.step = batches, start_step
        self._made: Made | None = None
        seen = batches.mixture.stage(start_step).seen(start_step)
        self._tallies = [
            Tally(e.source, batches.quarantine, e.number, batches.max_bad_fraction, seen[e.number])
            for e in batches.examples
        ]
        self._lengths = [Lengths(e.source.name, e.max_len) for e in batches.examples]

    @abc.abstractmethod
    def _make(self) -> Made:
        """The batch of `step`; called once for each."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        made = self._made = self._made or self._make()
        full = made.arrays["source"][made.arrays["text_valid"][:, -1]]
        for number, bad in made.bad.items():
            rows = self._batches.rows_at(self.step).here[number]
            self._tallies[number].add(rows, bad)
            if self._batches.examples[number].reads_text and self._batches.mixture.main_process:
                self._lengths[number].add(rows, int((full == number).sum()))
        self._made = None
        self.step += 1
        return made.arrays

    def skipped(self) -> list[int]:
        """How many examples of each source cannot be used, as far as they were read."""
        quarantine = self._batches.quarantine
        return [len(quarantine.of_source(e.number)) for e in self._batches.examples]

    def progress(self, step: int) -> dict[str, float]:
        """{epoch/0, epoch/1, ...: how often `step` batches have gone through each source of
        config.data.sources; bad_images: those in quarantine, as far as this process knows}."""
        seen = self._batches.mixture.epochs(step)
        found = {f"epoch/{number}": value for number, value in enumerate(seen)}
        return found | {"bad_images": float(sum(self.skipped()))}

    def close(self) -> None:
        """Ends the threads; waits for what they are doing."""
        self._batches.close()


class DirectStream(Stream):
    """Batches that threads make ahead, in order.

    Args:
        ahead: threads that make batches; at most one batch more than these waits.
    """

    def __init__(self, batches: Batches, start_step: int = 0, ahead: int = AHEAD):
        super().__init__(batches, start_step)
        self._pool = ThreadPoolExecutor(ahead, "batch")
        self._depth = ahead + 1
        self._futures: collections.deque[Future[Made]] = collections.deque()

    def _make(self) -> Made:
        while len(self._futures) < self._depth:
            step = self.step + len(self._futures)
            self._futures.append(self._pool.submit(self._batches.make, step))
        made = self._futures[0].result()
        self._futures.popleft()
        return made

    def close(self) -> None:
        """Ends the threads; waits for the batches that they are making."""
        self._pool.shutdown(cancel_futures=True)
        super().close()


# The batches of a process, by the loader that a run asks for: `direct`, or seqio's Tasks.


def check_loader(loader: str) -> None:
    """Raises ValueError for a `config.data.loader` that is not installed."""
    if loader == "seqio" and not importlib.util.find_spec("seqio"):
        raise ValueError(
            "data.loader='seqio' needs the extra 'seqio', which brings TensorFlow: "
            f"{extras.remedy('seqio')}; data.loader='direct' gives the same batches without it"
        )


def open_stream(
    config: Config,
    vocabulary: Vocabulary,
    mixture: Mixture | None = None,
    *,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    class_names: Sequence[str] = (),
    features: Sequence[Features] = (),
    quarantine: Quarantine | None = None,
) -> Stream:
    """The batches of this process, from step `start_step` on, without end; see `Batches`.

    They are made by `Batches` itself, or with `config.data.loader='seqio'` by seqio's Tasks and
    mixture (seqio_tasks.py); they are the same.

    Raises:
        ValueError, FileNotFoundError: what `Batches` raises; an unknown loader, or one that is not
            installed; later, with the batch that it concerns, what `Batches.batch` raises, or more
            damaged images than `config.data.max_bad_fraction` allows.
    """
    check_loader(config.data.loader)
    batches = Batches(
        config,
        vocabulary,
        mixture,
        process_index=process_index,
        process_count=process_count,
        class_names=class_names,
        features=features,
        quarantine=quarantine,
    )
    if config.data.loader == "direct":
        return DirectStream(batches, start_step)
    from coca_jax.data.seqio_tasks import SeqioStream  # imports TensorFlow

    return SeqioStream(config, vocabulary, batches, start_step)
