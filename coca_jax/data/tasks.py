"""seqio Tasks, one per source, and the Mixture whose every batch holds the exact share of each."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from coca_jax.data import images, order, preprocessors, texts, videos
from coca_jax.data.feature_converter import CoCaFeatureConverter
from coca_jax.data.records import Record
from coca_jax.data.sources import Source
from coca_jax.data.vocabulary import Vocabulary


class SeqioVocabulary(seqio.Vocabulary):
    """What seqio asks of a vocabulary, answered by ours."""

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        self._vocabulary = vocabulary

    bos_id = property(lambda self: self._vocabulary.bos_id)
    eos_id = property(lambda self: self._vocabulary.eos_id)
    unk_id = property(lambda self: self._vocabulary.unk_id)
    pad_id = property(lambda self: self._vocabulary.pad_id)
    _base_vocab_size = property(lambda self: self._vocabulary.size)

    def _encode(self, s: str) -> Sequence[int]:
        return self._vocabulary.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self._vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes) -> np.ndarray:
            return np.array(self._vocabulary.encode(text.decode()), np.int32)

        return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32), (None,))

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(lambda i: self._vocabulary.decode(i).encode(), [ids], tf.string)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SeqioVocabulary)
            and self._vocabulary.checksum == other._vocabulary.checksum
        )

    def __hash__(self) -> int:
        return hash(self._vocabulary.checksum)


class BadImages:
    """The undecodable images of a source: found, counted, and stepped over.

    A bad image is replaced by the next good one of its source, by index: a function of the data
    alone, so all hosts and all resumes agree. Looking costs a second decode of each image, so it
    starts only when the decoder has failed on this source once (`screening`).
    """

    def __init__(self, source: Source, max_fraction: float, clips: bool = False):
        self._source, self._max_fraction, self._clips = source, max_fraction, clips
        self.screening = False
        self.bad: dict[int, str] = {}
        self._good: set[int] = set()
        self._lock = threading.Lock()

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, list[Record]]:
        """What to train on at these indices: indices int64 [n], records."""
        if not self.screening:
            return indices, self._source.read(indices)
        found = [self._good_one(int(index)) for index in indices]
        return np.array([index for index, _ in found], np.int64), [record for _, record in found]

    def _good_one(self, index: int) -> tuple[int, Record]:
        for step in range(len(self._source)):
            candidate = (index + step) % len(self._source)
            if candidate in self.bad:
                continue
            try:
                record = self._source.read([candidate])[0]
            except Exception as error:  # a damaged shard: array_record raises RuntimeError
                self._note(candidate, f"index {candidate}", f"cannot be read: {error}")
                continue
            if candidate in self._good or self._check(candidate, record):
                return candidate, record
        raise ValueError(f"data source {self._source.name}: no image in it can be decoded")

    def _check(self, index: int, record: Record) -> bool:
        try:
            if self._clips:
                videos.verify(record.image)
            else:
                images.decode(record.image)
        except ValueError as error:
            self._note(index, f"{record.key!r} (index {index})", str(error))
            return False
        self._good.add(index)
        return True

    def _note(self, index: int, which: str, why: str) -> None:
        with self._lock:
            if index not in self.bad:
                self.bad[index] = f"{which}: {why}"
                logging.warning("%s: skipping image %s: %s", self._source.name, which, why)

    def check_fraction(self) -> None:
        """Raises ValueError when more than the tolerated share of the images seen are bad."""
        seen = len(self._good) + len(self.bad)
        allowed = self._max_fraction * min(len(self._source), max(seen, 10_000))
        if len(self.bad) > allowed:
            raise ValueError(
                f"data source {self._source.name}: {len(self.bad)} undecodable images among "
                f"{seen} seen, more than data.max_bad_fraction={self._max_fraction:g} allows; "
                f"first: {next(iter(self.bad.values()))}"
            )


class ClassIds:
    """The class of each record, by a head's list of names.

    Args:
        names: of the classes, in order; none where the run has no head.
        skip: whether a record none of whose labels is a class gets -1 (no class) silently.
        pairs: whether the head is one over pairs of images.
    """

    def __init__(
        self,
        names: Sequence[str],
        source: Source,
        *,
        skip: bool,
        pairs: bool,
        seed: int,
        number: int,
    ):
        self.numbers = {name: number for number, name in enumerate(names)}
        self._skip, self._pairs, self._source = skip, pairs, source
        self._seed, self._number = seed, number
        self._problem = ""

    def __call__(self, records: Sequence[Record], positions: np.ndarray) -> np.ndarray:
        """int32 [n]; -1: no class."""
        if self._pairs:
            for record in records:
                if not record.second:
                    self._problem = self._problem or (
                        f"{record.key!r} has one image and head.kind='pair' takes two; prepare "
                        "the data with --image_field=FIRST,SECOND"
                    )
        if not self.numbers or self._source.kind == "caption":
            return np.full(len(records), -1, np.int32)
        labels = [record.labels for record in records]
        chosen = texts.choose_labels(labels, self.numbers, self._seed, self._number, positions)
        found = np.array([self.numbers.get(name, -1) for name in chosen], np.int32)
        for record, number in zip(records, found):
            if number < 0 and not self._skip:
                self._problem = self._problem or (
                    f"{record.key!r} has {list(record.labels)}, not among the {len(self.numbers)} "
                    "classes of the head; name it in head.classes, leave the record out, or set "
                    "head.unknown='skip'"
                )
        return found

    def check(self) -> None:
        """Raises ValueError naming the first record that the head cannot learn from."""
        if self._problem:
            raise ValueError(f"data source {self._source.name}: {self._problem}")


class RecordSource(seqio.DataSource):
    """A seqio source of blocks: the share of one source in each batch, from a step on.

    Args:
        reader: the records.
        class_ids: the class of each.
        seed, number: of the run; of the source within it. They fix the order.
        pattern: int32 [batch], the source of each row of the global batch.
        start_step: the first batch.
    """

    def __init__(
        self,
        source: Source,
        reader: BadImages,
        class_ids: ClassIds,
        *,
        seed: int,
        number: int,
        pattern: np.ndarray,
        start_step: int,
    ):
        self._source, self._reader, self._class_ids = source, reader, class_ids
        self._seed, self._number = seed, number
        self._pattern, self._start_step = pattern, start_step
        super().__init__(splits=("train",), num_input_examples={"train": len(source)})

    supports_arbitrary_sharding = True

    def list_shards(self, split: str) -> Sequence[str]:
        return [self._source.name]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        shard = shard_info or seqio.ShardInfo(0, 1)
        local = len(self._pattern) // shard.num_shards
        before = int((self._pattern[: shard.index * local] == self._number).sum())
        rows = self._pattern[shard.index * local :][:local]
        count = int((rows == self._number).sum())
        share = int((self._pattern == self._number).sum())
        is_label = self._source.kind == "label"

        def read(step: np.ndarray) -> tuple:
            positions = int(step) * share + before + np.arange(count, dtype=np.int64)
            wanted = order.indices(positions, len(self._source), self._seed, self._number)
            used, records = self._reader.read(wanted)
            return (
                positions,
                used,
                np.array([record.image for record in records], object),
                np.array([record.second for record in records], object),
                *_flatten([record.texts for record in records]),
                *_flatten([record.labels for record in records]),
                np.full(count, self._number, np.int32),
                np.full(count, is_label),
                self._class_ids(records, positions),
            )

        names = dict(
            position=tf.int64, index=tf.int64, image=tf.string, second=tf.string,
            texts=tf.string, text_counts=tf.int32, labels=tf.string, label_counts=tf.int32,
            source=tf.int32, is_label=tf.bool, class_id=tf.int32,
        )  # fmt: skip

        def block(step: tf.Tensor) -> dict[str, tf.Tensor]:
            values = tf.numpy_function(read, [step], list(names.values()))
            return {
                name: tf.ensure_shape(v, (None,) if name in ("texts", "labels") else (count,))
                for name, v in zip(names, values)
            }

        steps = tf.data.Dataset.range(self._start_step, np.iinfo(np.int64).max)
        return steps.map(block, num_parallel_calls=2, deterministic=True)


def _flatten(lists: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    flat = [text.encode() for texts in lists for text in texts]
    return np.array(flat, object), np.array([len(texts) for texts in lists], np.int32)


def output_features(vocabulary: Vocabulary) -> Mapping[str, seqio.Feature]:
    """What every Task yields: blocks of the converter's features, images as encoded bytes."""
    features: dict[str, seqio.Feature] = {}
    for name, spec in CoCaFeatureConverter.TASK_FEATURES.items():
        if name == "tokens":
            features[name] = seqio.Feature(SeqioVocabulary(vocabulary), add_eos=True, rank=2)
        else:
            features[name] = seqio.ContinuousFeature(dtype=spec.dtype, rank=spec.rank)
    return features


def make_task(
    source: Source,
    reader: BadImages,
    class_ids: ClassIds,
    vocabulary: Vocabulary,
    *,
    seed: int,
    number: int,
    pattern: np.ndarray,
    start_step: int,
    max_len: int,
    label_token: bool,
    prompts: Sequence[str],
    augment: str,
    size: int,
    flip: bool,
    resize: str,
    fast: bool,
    randaugment: tuple[int, float],
    num_frames: int = 0,
    jitter: bool = False,
) -> seqio.Task:
    """The Task of one source: choose a text, tokenise, plan the augmentation."""
    is_label = source.kind == "label"
    text = preprocessors.caption_text(seed, number)
    if is_label:
        text = preprocessors.label_text(prompts, seed, number)
    elif source.kind == "question":
        text = preprocessors.question_text(class_ids.numbers, seed, number)
    tokenizer = preprocessors.Tokenizer(vocabulary, max_len, is_label and label_token)
    features = output_features(vocabulary)
    return seqio.Task(
        f"source_{number}",
        RecordSource(
            source,
            reader,
            class_ids,
            seed=seed,
            number=number,
            pattern=pattern,
            start_step=start_step,
        ),
        features,
        [
            text,
            preprocessors.tokenize(tokenizer, max_len),
            preprocessors.plan_augmentation(
                augment,
                size,
                seed,
                number,
                flip=flip,
                resize=resize,
                fast=fast,
                randaugment=randaugment,
                num_frames=num_frames,
                jitter=jitter,
            ),
            preprocessors.keep(list(features)),
        ],
    )


def exact_mixture(tasks: Sequence[seqio.Task], pattern: np.ndarray) -> seqio.Mixture:
    """A Mixture whose elements are the batches of this process, rows in the order of `pattern`.

    seqio samples at random; the paper's batches are exactly half alt-text, half labels.

    Args:
        tasks: one for each source.
        pattern: int32 [b], the source of each row; one that has none is not read.
    """
    shares = np.bincount(pattern, minlength=len(tasks))
    place = np.argsort(np.argsort(pattern, kind="stable"), kind="stable")

    def mix(datasets: Sequence[tf.data.Dataset], rates: Any, seed: Any) -> tf.data.Dataset:
        def batch(*blocks: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            if len(blocks) == 1:
                return blocks[0]
            return {
                name: tf.gather(tf.concat([block[name] for block in blocks], 0), place)
                for name in blocks[0]
            }

        return tf.data.Dataset.zip(tuple(datasets)).map(batch)

    return seqio.Mixture(
        "train",
        [(task, float(share)) for task, share in zip(tasks, shares) if share],
        sample_fn=mix,
    )
