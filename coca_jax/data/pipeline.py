"""The input pipeline: batches for training, records for evaluation, the vocabulary of a run.

Importing this does not import TensorFlow; `train_batches` does.
"""

from __future__ import annotations

import atexit
import os
import pathlib
import resource
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
from absl import logging

from coca_jax.data import order, sources, texts
from coca_jax.data import prompts as prompt_sets
from coca_jax.data import vocabulary as vocabularies
from coca_jax.data.sources import Source
from coca_jax.data.vocabulary import Vocabulary

VOCABULARY_FILE = "vocabulary.model"
_SENTENCES_PER_PIECE = 50  # enough for stable unigram probabilities, and quick for small sizes


def open_sources(config: Any) -> list[Source]:
    """The training sources of `config.data.sources`, each with a text in every record.

    Raises:
        ValueError, FileNotFoundError: missing, empty or unsuitable data, in one line.
    """
    shares(config)  # refuses what cannot be mixed before anything is opened
    entries = [_plain(entry) for entry in config.data.sources]
    return [sources.keep_useful(sources.open_source(entry, "train")) for entry in entries]


def _plain(entry: Any) -> dict[str, Any]:
    return entry.to_dict() if hasattr(entry, "to_dict") else dict(entry)


def num_examples(config: Any) -> int:
    """Examples in one pass over all training sources together."""
    return sum(map(len, open_sources(config)))


def shares(config: Any) -> list[int]:
    """How many rows of each batch come from each source.

    Raises:
        ValueError: the weights do not give whole numbers.
    """
    if not config.data.sources:
        raise ValueError("data.sources is empty: give at least one dict(path=...|builtin='scenes')")
    weights = [float(_plain(entry).get("weight", 1.0)) for entry in config.data.sources]
    if min(weights) <= 0:
        raise ValueError(f"data.sources weights {weights}: they must be positive")
    exact = [config.batch_size * weight / sum(weights) for weight in weights]
    rounded = [round(share) for share in exact]
    if any(abs(a - b) > 1e-6 * config.batch_size for a, b in zip(exact, rounded)) or 0 in rounded:
        raise ValueError(
            f"batch_size={config.batch_size} with source weights {weights} gives shares "
            f"{[round(share, 3) for share in exact]}, not whole numbers; change one of them"
        )
    return rounded


def epochs(config: Any, step: int, sizes: list[int]) -> list[float]:
    """How often each source (of these sizes) has been seen after `step` batches."""
    return [step * share / size for share, size in zip(shares(config), sizes)]


def load_vocabulary_or_train(config: Any, workdir: str, *, process_index: int = 0) -> Vocabulary:
    """The vocabulary of a run: the one in `workdir`, else a given one, else that of the run or
    weights it starts from, else a trained one.

    It is kept as `workdir/vocabulary.model`. With several processes the first one makes it and
    the others wait for the file.

    Raises:
        ValueError: more ids than `config.model.text.vocab_size`, no label symbol where the
            configuration wants it, another vocabulary than the run began with, or nothing to
            train on.
        FileNotFoundError: `config.data.vocabulary` does not exist.
    """
    path = f"{os.fspath(workdir)}/{VOCABULARY_FILE}"
    place = config.data.vocabulary or _vocabulary_beside(config.init_from)
    given = vocabularies.load(place) if place else None
    if _exists(path):
        vocabulary = vocabularies.load(path)
        if given is not None and given.checksum != vocabulary.checksum:
            raise ValueError(
                f"data.vocabulary={place} (sha256 {given.checksum[:12]}) is not "
                f"what {path} holds ({vocabulary.checksum[:12]}); use a new workdir"
            )
    elif process_index:
        deadline = time.time() + 3600
        while not _exists(path):
            if time.time() > deadline:
                raise ValueError(f"{path}: process 0 has not written it within an hour")
            time.sleep(1)
        vocabulary = vocabularies.load(path)
    elif given is not None:
        given.save(path)
        vocabulary = given
    else:
        size = config.model.text.vocab_size
        started = time.time()
        sample = sample_texts(config, size * _SENTENCES_PER_PIECE)
        vocabulary = vocabularies.train(sample, size, path, config.seed)
        logging.info(
            "vocabulary: %d pieces trained in %.1f s -> %s",
            *(vocabulary.size, time.time() - started, path),
        )
    if vocabulary.size > config.model.text.vocab_size:
        raise ValueError(
            f"model.text.vocab_size={config.model.text.vocab_size} is less than the "
            f"{vocabulary.size} ids of the vocabulary; set it to {vocabulary.size} or more"
        )
    if config.data.label_token and vocabulary.label_id is None:
        raise ValueError("data.label_token: this vocabulary has no symbol for it; set false")
    return vocabulary


def _vocabulary_beside(init_from: str) -> str:
    """The tokenizer of a run or an export that `config.init_from` names, '' where there is none."""
    place = pathlib.Path(init_from)
    if not init_from or not place.is_dir():
        return ""
    folders = (place, place.parent, place.parent.parent)  # a step, its folder, the run
    found = (file for folder in folders for file in sorted(folder.glob("vocabulary*")))
    return str(next(found, ""))


def _exists(path: str) -> bool:
    file_system, plain = fsspec.url_to_fs(path)
    return file_system.exists(plain)


def sample_texts(config: Any, limit: int) -> Iterator[str]:
    """Texts as training will see them: a sample of `limit`, spread evenly over the sources."""
    found = open_sources(config)
    for number, (source, entry) in enumerate(zip(found, config.data.sources)):
        prompts = prompt_sets.load(_plain(entry).get("prompts") or config.data.prompts)
        count = min(len(source), -(-limit // len(found)))
        picked = order.indices(np.arange(count), len(source), config.seed, number)
        for start in range(0, count, 1024):
            for row, record in enumerate(source.read_texts(picked[start : start + 1024])):
                if source.kind == "caption":
                    yield from record.texts
                elif source.kind == "question":
                    yield from (*record.texts, *record.labels)
                else:
                    prompt = prompts[(start + row) % len(prompts)]
                    yield prompt.replace("{}", ", ".join(record.labels))


def step_examples(config: Any, step: int) -> list[dict[str, Any]]:
    """Which examples the batch of a step holds, row by row, without decoding an image.

    Returns:
        dicts of row, source (its name), epoch, index, key, text (as trained on).
    """
    found, share = open_sources(config), shares(config)
    pattern = order.rows(share)
    result: list[dict[str, Any]] = [{} for _ in pattern]
    for number, (source, entry) in enumerate(zip(found, config.data.sources)):
        positions = step * share[number] + np.arange(share[number], dtype=np.int64)
        picked = order.indices(positions, len(source), config.seed, number)
        records = source.read(picked)
        if source.kind == "caption":
            captions = [record.texts for record in records]
            chosen = texts.choose_captions(captions, config.seed, number, positions)
        elif source.kind == "question":
            chosen = [f"{record.texts[0]} {'|'.join(record.labels)}" for record in records]
        else:
            prompts = prompt_sets.load(_plain(entry).get("prompts") or config.data.prompts)
            labels = [record.labels for record in records]
            chosen, _ = texts.label_texts(labels, prompts, config.seed, number, positions)
        rows = np.flatnonzero(pattern == number)
        for row, at, index, record, text in zip(rows, positions, picked, records, chosen):
            result[row] = dict(
                row=int(row),
                source=source.name,
                epoch=int(at) // len(source),
                index=int(index),
                key=record.key,
                text=text,
            )
    return result


class TrainBatches:
    """An endless iterator of batches; see `train_batches`.

    Attributes:
        sizes: examples of each source.
        step: of the batch that comes next.
    """

    def __init__(
        self,
        config: Any,
        vocabulary: Vocabulary,
        *,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        class_names: Sequence[str] = (),
    ):
        from coca_jax.data import augment, tasks

        if config.batch_size % process_count:
            raise ValueError(
                f"batch_size={config.batch_size} is not divisible by {process_count} processes"
            )
        if config.data.augment not in augment.MODES:
            raise ValueError(
                f"data.augment={config.data.augment!r}: use one of {', '.join(augment.MODES)}"
            )
        layers, magnitude = config.data.randaugment
        if layers < 1 or not 0 <= magnitude <= 30:
            raise ValueError(
                f"data.randaugment={tuple(config.data.randaugment)}: give the operations, 1 or "
                "more, and their magnitude, 0 to 30"
            )
        self._pattern = order.rows(shares(config))
        self._config, self._vocabulary = config, vocabulary
        self._process = (process_index, process_count)
        self._sources = open_sources(config)
        self._prompts = [
            prompt_sets.load(_plain(entry).get("prompts") or config.data.prompts)
            for entry in config.data.sources
        ]
        if config.data.label_token and vocabulary.label_id is None:
            raise ValueError("data.label_token: this vocabulary has no symbol for it; set false")
        self._readers = [
            tasks.BadImages(source, config.data.max_bad_fraction, bool(config.data.num_frames))
            for source in self._sources
        ]
        self._pairs = config.head.kind == "pair"
        self._class_ids = [
            tasks.ClassIds(
                class_names,
                source,
                skip=config.head.unknown == "skip",
                pairs=self._pairs,
                seed=config.seed,
                number=number,
            )
            for number, source in enumerate(self._sources)
        ]
        self.sizes = [len(source) for source in self._sources]
        self.step = start_step
        self._iterator = self._build()
        # Threads that are inside Python when the interpreter ends would never come back, and the
        # pipeline would wait for them for ever.
        finish = weakref.WeakMethod(self.close)
        atexit.register(lambda: (finish() or (lambda: None))())

    def _build(self) -> Iterator[dict[str, np.ndarray]]:
        import seqio
        import tensorflow as tf

        from coca_jax.data import tasks
        from coca_jax.data.feature_converter import CoCaFeatureConverter

        config, (index, count) = self._config, self._process
        max_len, size = config.model.text.max_len, config.model.image_size
        made = [
            tasks.make_task(
                source,
                reader,
                class_ids,
                self._vocabulary,
                seed=config.seed,
                number=number,
                pattern=self._pattern,
                start_step=self.step,
                max_len=max_len,
                label_token=config.data.label_token,
                prompts=self._prompts[number],
                augment=config.data.augment,
                size=size,
                flip=config.data.flip,
                resize=config.data.resize,
                fast=config.data.fast_resize,
                randaugment=tuple(config.data.randaugment),
                num_frames=config.data.num_frames,
                jitter=config.data.frame_jitter,
            )
            for number, (source, reader, class_ids) in enumerate(
                zip(self._sources, self._readers, self._class_ids)
            )
        ]
        local = config.batch_size // count
        mixture = tasks.exact_mixture(made, self._pattern[index * local :][:local])
        blocks = mixture.get_dataset(
            split="train",
            shuffle=False,  # the sources are already in their shuffled order
            seed=config.seed,
            shard_info=seqio.ShardInfo(index, count),
            num_epochs=1,  # the sources are endless
            trim_output_features=False,
            try_in_mem_cache=False,
        )
        threads = config.data.num_threads or len(os.sched_getaffinity(0))
        converter = CoCaFeatureConverter(
            config.data.augment,
            size,
            max_len,
            threads,
            config.data.fast_resize,
            config.data.resize if self._pairs else "",
            config.data.num_frames,
        )
        lengths = dict.fromkeys(converter.TASK_FEATURES, 1)
        lengths |= dict(tokens=max_len, text_valid=max_len)
        batches = converter(blocks, lengths).prefetch(2)
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads + 2
        options.deterministic = True
        options.autotune.enabled = False
        return batches.with_options(options).as_numpy_iterator()

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        import tensorflow as tf

        try:
            batch = next(self._iterator)
        except tf.errors.OpError as error:
            self._check()
            if all(reader.screening for reader in self._readers):
                raise
            # An image did not decode. From here on images are checked before they are decoded.
            logging.warning("step %d: %s", self.step, error.message.splitlines()[0][:200])
            for reader in self._readers:
                reader.screening = True
            self._iterator = self._build()
            return next(self)
        self._check()
        self.step += 1
        return batch

    def _check(self) -> None:
        for reader, class_ids in zip(self._readers, self._class_ids):
            reader.check_fraction()
            class_ids.check()

    def close(self) -> None:
        """Stops the pipeline's threads. Runs by itself when the program ends."""
        self._iterator = iter(())

    def skipped(self) -> list[int]:
        """How many undecodable images each source has shown so far."""
        return [len(reader.bad) for reader in self._readers]

    def progress(self, step: int) -> dict[str, float]:
        """{epoch/0, epoch/1, ...: how often `step` batches have gone through each source of
        config.data.sources; bad_images: undecodable ones seen so far by this process}."""
        seen = epochs(self._config, step, self.sizes)
        found = {f"epoch/{number}": value for number, value in enumerate(seen)}
        return found | {"bad_images": float(sum(self.skipped()))}

    def describe(self) -> str:
        """A line for each source: its examples, and its rows of a batch."""
        return "\n".join(
            f"source {number}: {source.name}, {source.kind}, {len(source)} examples, {share} rows "
            f"of {self._config.batch_size}"
            for number, (source, share) in enumerate(zip(self._sources, shares(self._config)))
        )


def train_batches(
    config: Any,
    vocabulary: Vocabulary,
    *,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    class_names: Sequence[str] = (),
) -> TrainBatches:
    """Batches of this process, from step `start_step` on, without end.

    The batch of a step is a function of (config.seed, step): process p of P holds rows
    [p * b, (p + 1) * b) of it, b = batch_size / P, and the whole is the same for any P.

    Yields:
        dict of numpy arrays: image uint8 [b, S, S, 3], of pairs [b, 2, S, S, 3], of clips (with
        data.num_frames T) [b, T, S, S, 3]; tokens int32 [b, L]; text_valid bool [b, L]; is_label
        bool [b]; text_id int32 [b, 2] (equal for equal captions or equal label sets); prompt_len
        int32 [b] (tokens before an answer); class_id int32 [b] (place in class_names, -1: none);
        source int32 [b] and index int64 [b] (which record).

    Raises:
        ValueError: missing or empty data, shares or processes that do not divide the batch;
            later, more undecodable images than `config.data.max_bad_fraction`, or a label that
            is not in class_names.
    """
    return TrainBatches(
        config,
        vocabulary,
        start_step=start_step,
        process_index=process_index,
        process_count=process_count,
        class_names=class_names,
    )


def class_names(source: str | Mapping[str, Any], split: str = "test") -> list[str]:
    """The class names of a data set: those its manifest declares, else those its records have;
    of questions, the answers."""
    entry = {"path": source} if isinstance(source, str) else _plain(source)
    asked = entry.get("kind") == "question"
    if entry.get("path") and not entry.get("label_field") and not asked:
        declared = sources.read_manifest(str(entry["path"])).get("class_names")
        if declared:
            return declared
    if entry.get("builtin") and not asked:
        from coca_jax.data import scenes

        return scenes.class_names()
    found = sources.open_source(entry, split)
    names: set[str] = set()
    for start in range(0, len(found), 1024):
        for record in found.read_texts(range(start, min(start + 1024, len(found)))):
            names.update(record.labels)
    return sorted(names)


def head_classes(config: Any) -> tuple[str, ...]:
    """The classes of the run's task head, in the order of its outputs; () without a head.

    They are the lines of `config.head.classes`, or else the class names of the training sources
    that have labels or answers: as declared, or sorted.

    Raises:
        ValueError: names that repeat, fewer than two, or a declared class that is not in the file.
        FileNotFoundError: no such file or data.
    """
    if not config.head.kind:
        return ()
    entries = [_plain(entry) for entry in config.data.sources]
    entries = [entry for entry in entries if entry.get("kind", "caption") != "caption"]
    if not entries:
        raise ValueError(
            f"head.kind={config.head.kind!r} needs a source of kind 'label' or 'question'"
        )
    if not config.head.classes:
        found = [class_names(entry, entry.get("split", "train")) for entry in entries]
        return tuple(dict.fromkeys(name for names in found for name in names))
    with fsspec.open(os.fspath(config.head.classes), "r", encoding="utf-8") as file:
        names = tuple(line.strip() for line in file if line.strip())
    if len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(
            f"head.classes={config.head.classes} has {len(names)} names, {len(set(names))} "
            "distinct; give two or more, each once"
        )
    return names


def measure_input(config: Any, seconds: float = 10.0, every: float = 0.0) -> dict[str, Any]:
    """How fast the pipeline alone is, without a model.

    Args:
        config: of a run.
        seconds: how long to read.
        every: seconds between looks at the memory; 0: only its maximum at the end.

    Returns:
        images_per_second, images_per_second_per_core (per second of processor time used),
        first_batch_seconds, cores_busy, max_rss_mib; with `every`, rss_mib: at each look, the
        resident memory of this process.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        vocabulary = load_vocabulary_or_train(config, folder)
    started = time.perf_counter()
    batches = train_batches(config, vocabulary)
    next(batches)
    first = time.perf_counter() - started
    for _ in range(4):  # what was prefetched while nobody looked
        next(batches)
    images, wall, busy, resident = 0.0, 0.0, 0.0, []
    while wall < seconds:
        rate, cores, took = rate_of((batch["image"] for batch in batches), every or seconds)
        images, wall, busy = images + rate * took, wall + took, busy + cores * took
        if every:
            resident.append(_resident_mib())
    batches.close()
    result: dict[str, Any] = dict(
        images_per_second=images / wall,
        images_per_second_per_core=images / busy,
        cores_busy=busy / wall,
        first_batch_seconds=first,
        max_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
    return result | (dict(rss_mib=resident) if every else {})


def rate_of(batches: Iterator[Any], seconds: float) -> tuple[float, float, float]:
    """(examples a second, cores busy, seconds taken) of reading batches for `seconds`.

    Batches are arrays, or tuples of them, with the examples as the first axis.
    """
    count, started, processor = 0, time.perf_counter(), time.process_time()
    while (wall := time.perf_counter() - started) < seconds:
        batch = next(batches)
        count += len(batch[0] if isinstance(batch, tuple) else batch)
    return count / wall, (time.process_time() - processor) / wall, wall


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20
