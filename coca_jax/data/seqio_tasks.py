"""seqio: the sources of a run as registered Tasks, their exact mixture, and users' own Tasks.

`data.loader='seqio'` trains from what stands here; the batches equal those of 'direct'
(batches.py) bit for bit, since both call the same functions. `dict(seqio='name')` makes a Task that
the user has registered a source. The one file that imports TensorFlow and seqio, the extra 'seqio'.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from coca_jax.runtime import extras

try:
    import seqio
    import tensorflow as tf
except ImportError as missing:
    raise ValueError(
        f"seqio Tasks need seqio and TensorFlow ({missing}): {extras.remedy('seqio')}"
    ) from None

from coca_jax.config import Config
from coca_jax.data import batches as direct
from coca_jax.data.batches import Batches, Field, Made, Stream
from coca_jax.data.examples import Examples
from coca_jax.data.mixture import Mixture
from coca_jax.data.quarantine import Bad
from coca_jax.data.sources.records import Record
from coca_jax.data.texts import Draw
from coca_jax.data.vocabulary import Vocabulary

tf.config.set_visible_devices([], "GPU")  # the accelerators are JAX's

MIXTURE = "coca_jax.train"
_SPEC = seqio.FeatureConverter.FeatureSpec

_OF_TEXT = ("tokens", "text_valid", "text_id", "prompt_len")  # fields of Examples.tokens
_BLOCK = 64  # examples that a preprocessor takes at a time


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


def task_features(config: Config, vocabulary: Vocabulary) -> dict[str, seqio.Feature]:
    """The output features of every Task: those of a batch (batches.fields) but the pixels, the
    encoded image (of a pair `second` besides) and `position`, its place in the source's stream."""
    features: dict[str, seqio.Feature] = {
        name: seqio.ContinuousFeature(dtype=tf.string, rank=0) for name in ("image", "second")
    }
    features["position"] = seqio.ContinuousFeature(dtype=tf.int64, rank=0)
    for name, field in direct.fields(config).items():
        dtype, rank = tf.as_dtype(field.dtype), len(field.shape)
        if name == "tokens":
            features[name] = seqio.Feature(SeqioVocabulary(vocabulary), dtype=dtype, rank=rank)
        elif name != "image":
            features[name] = seqio.ContinuousFeature(dtype=dtype, rank=rank)
    return features


def _in_blocks(
    dataset: tf.data.Dataset,
    size: int,
    function: Callable,
    outputs: Mapping[str, tuple[Any, tuple]],
) -> tf.data.Dataset:
    """Examples with what a function of numpy arrays makes of `size` of them at a time, in order.

    One call of Python for an example each would cost more than the work that it does.

    Args:
        function: {name: array of n rows} -> the arrays of `outputs`, in their order.
        outputs: name -> dtype, and shape of a row.
    """

    def block(features: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        names = list(features)

        def call(*arrays: np.ndarray) -> Any:
            return function(dict(zip(names, arrays)))

        made = tf.numpy_function(call, list(features.values()), [d for d, _ in outputs.values()])
        features = dict(features)
        for (name, (_, shape)), value in zip(outputs.items(), made):
            features[name] = tf.ensure_shape(value, (None, *shape))
        return features

    return dataset.batch(size).map(block, num_parallel_calls=2, deterministic=True).unbatch()


class RecordSource(seqio.DataSource):
    """A seqio source of one source of a mixture: its examples in the order of training, without
    end, from a step on, each with the text that it trains on at this visit.

    Args:
        mixture: the training data.
        examples: of the source.
        start_step: the first step.
        fields: of a batch (batches.fields).
    """

    supports_arbitrary_sharding = True  # a shard is the rows of one process

    def __init__(
        self, mixture: Mixture, examples: Examples, start_step: int, fields: Mapping[str, Field]
    ):
        self._mixture, self._examples, self._start_step = mixture, examples, start_step
        made = (*_OF_TEXT, examples.pixels.field)  # by what follows
        self._marks = {name: field for name, field in fields.items() if name not in made}
        # No number of examples: seqio would keep a small set in memory, and this one never ends.
        super().__init__(splits=("train",))

    def list_shards(self, split: str) -> Sequence[str]:
        """One name; see `supports_arbitrary_sharding`."""
        return [self._examples.source.name]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = False,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Examples of {image, second, text, same, position}, and the fields of Examples.marks.

        They are in the shuffled order of the run already: `shuffle` and `seed` change nothing.
        """
        shard = shard_info or seqio.ShardInfo(0, 1)
        rows = self._mixture.rows(shard.index, shard.num_shards)
        examples, number = self._examples, self._examples.number
        raw = dict(image="string", second="string", text="string", same="string", position="int64")
        names: dict[str, tuple[Any, tuple[int, ...]]] = {
            name: (tf.as_dtype(dtype), ()) for name, dtype in raw.items()
        }
        names |= {name: (tf.as_dtype(f.dtype), f.shape) for name, f in self._marks.items()}

        def read(step: np.ndarray) -> list[np.ndarray]:
            part = examples.at(rows.positions(number, int(step)))
            chosen, same = examples.texts(part)
            found = examples.marks(part) | dict(
                image=np.array([record.image for record in part.records], object),
                second=np.array([record.second for record in part.records], object),
                text=np.array([text.encode() for text in chosen], object),
                same=np.array([text.encode() for text in same], object),
                position=part.draw.positions,
            )
            return [found[name] for name in names]

        def block(step: tf.Tensor) -> dict[str, tf.Tensor]:
            values = tf.numpy_function(read, [step], [dtype for dtype, _ in names.values()])
            shapes = [(None, *shape) for _, shape in names.values()]
            return {n: tf.ensure_shape(v, s) for n, v, s in zip(names, values, shapes)}

        steps = tf.data.Dataset.range(self._start_step, np.iinfo(np.int64).max)
        if not rows.here[number]:
            steps = steps.take(0)  # a process may have no row of a source with few
        return steps.map(block, num_parallel_calls=2, deterministic=True).unbatch()


def tokenize(examples: Examples, config: Config) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """seqio preprocessor: `text` to tokens, text_valid, text_id and prompt_len."""
    made = [(name, direct.fields(config)[name]) for name in _OF_TEXT]
    outputs = {name: (tf.as_dtype(field.dtype), field.shape) for name, field in made}

    def encode(block: dict[str, np.ndarray]) -> list[np.ndarray]:
        texts, same = ([t.decode() for t in block[name].tolist()] for name in ("text", "same"))
        found = examples.tokens(texts, same)
        return [found[name] for name in _OF_TEXT]

    def apply(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return _in_blocks(dataset, _BLOCK, encode, outputs)

    return apply


def register(
    config: Config, vocabulary: Vocabulary, batches: Batches, start_step: int = 0
) -> seqio.Mixture:
    """Registers a Task for each source, 'coca_jax.source_000' and so on, and their mixture.

    What an earlier call registered under these names is replaced. The mixture takes the sources'
    examples in turn, by the rows of a batch: seqio's own samples at random, and the paper's batches
    are exactly half alt-text, half labels.

    Args:
        config, vocabulary: of the run.
        batches: of a process; seqio has to be given the shard_info of that process.
        start_step: the first step.

    Returns:
        The mixture 'coca_jax.train', which `seqio.get_mixture_or_task` finds as well.
    """
    features = task_features(config, vocabulary)
    names = []
    for examples in batches.examples:
        name = f"coca_jax.source_{examples.number:03d}"  # mixtures sort their tasks by name
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=RecordSource(batches.mixture, examples, start_step, direct.fields(config)),
            preprocessors=[tokenize(examples, config)],
            output_features=features,
        )
        names.append(name)
    seqio.MixtureRegistry.remove(MIXTURE)
    rates = list(zip(names, map(float, batches.mixture.shares)))
    pattern = batches.rows.sources
    return seqio.MixtureRegistry.add(MIXTURE, rates, sample_fn=exactly(pattern))


def exactly(pattern: np.ndarray) -> Callable:
    """A seqio sample_fn that takes example n from the data set pattern[n mod len(pattern)]."""

    def sample(
        datasets: Sequence[tf.data.Dataset], rates: Sequence[float], seed: Any
    ) -> tf.data.Dataset:
        choice = tf.data.Dataset.from_tensor_slices(pattern.astype(np.int64)).repeat()
        return tf.data.Dataset.choose_from_datasets(datasets, choice)

    return sample


class CoCaFeatureConverter(seqio.FeatureConverter):
    """From a Task's features to those of a batch: decodes and augments the images.

    An image that does not decode is replaced, with all that belongs to it, by the next good one of
    its source; `found_bad` is told.

    Args:
        config: of the run.
        vocabulary: of the run.
        batches: that do the work.
        found_bad: called with the number of a source and {index: which and why}.
    """

    PACKING_FEATURE_DTYPES: Mapping[str, Any] = {}
    TASK_FEATURES: Mapping[str, Any] = {}  # of an instance; they depend on the config
    MODEL_FEATURES: Mapping[str, Any] = {}

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        batches: Batches,
        found_bad: Callable[[int, Mapping[int, Bad]], None],
    ):
        super().__init__(pack=False)
        self._batches, self._found_bad, self._seed = batches, found_bad, config.seed
        self._fields = direct.fields(config)
        features = task_features(config, vocabulary)
        self.TASK_FEATURES = {name: _SPEC(f.dtype, f.rank) for name, f in features.items()}
        self.MODEL_FEATURES = {
            name: _SPEC(tf.as_dtype(field.dtype), len(field.shape))
            for name, field in self._fields.items()
        }

    def lengths(self) -> dict[str, int | None]:
        """The task_feature_lengths to give to seqio; no Task yields longer features."""
        ranks = {name: spec.rank for name, spec in self.TASK_FEATURES.items()}
        return {name: self._fields[name].shape[0] if rank else None for name, rank in ranks.items()}

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        """The first axis of each field of a batch."""
        return {name: (*field.shape, 1)[0] for name, field in self._fields.items()}

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        outputs = {
            name: (tf.as_dtype(field.dtype), field.shape) for name, field in self._fields.items()
        }
        made = _in_blocks(ds, self._batches.rows.count, self._decode, outputs)
        return made.map(lambda example: {name: example[name] for name in self._fields})

    def _decode(self, block: dict[str, np.ndarray]) -> list[np.ndarray]:
        encoded = zip(block["image"].tolist(), block["second"].tolist())
        records = [Record(image, (), (), "", second=second) for image, second in encoded]
        draw = Draw(self._seed, block["source"], block["position"])
        pixels = self._batches.pixels
        image, failed = pixels.render(records, pixels.plan(records, draw))
        places = zip(block["source"].tolist(), block["index"].tolist())
        for row, place in enumerate(places):
            if found := self._batches.quarantine.find(*place):  # also of a file repaired since
                failed[row] = found.detail
        block = block | {"image": image}
        for row, why in sorted(failed.items()):
            number = int(block["source"][row])
            part = self._batches.examples[number].at(block["position"][row : row + 1])
            image[row] = part.replace(0, why)
            for name, values in part.fields().items():
                block[name] = block[name].copy()
                block[name][row] = values[0]
            self._found_bad(number, part.bad)
        return [block[name] for name in self._fields]


class SeqioStream(Stream):
    """The batches of a process from a step on, by seqio.

    Args:
        config, vocabulary: of the run.
        batches: of the process; the stream closes them.
        start_step: of the first batch.
    """

    def __init__(
        self, config: Config, vocabulary: Vocabulary, batches: Batches, start_step: int = 0
    ):
        super().__init__(batches, start_step)
        self._config, self._vocabulary = config, vocabulary
        self._bad: collections.deque[tuple[int, Mapping[int, Bad]]] = collections.deque()
        self._iterator: Iterator[dict[str, np.ndarray]] | None = None

    def _make(self) -> Made:
        self._iterator = self._iterator or self._build()
        try:
            arrays = next(self._iterator)
        except tf.errors.OpError as error:
            self._iterator = None  # asked again, it starts at this step again
            cause = re.search(r"ValueError: (.+?)\n\s*Traceback", error.message, re.DOTALL)
            if cause is None:
                raise
            raise ValueError(cause[1]) from None
        bad: dict[int, dict[int, Bad]] = {number: {} for number in np.unique(arrays["source"])}
        while self._bad:  # also of the batches that are made ahead
            number, found = self._bad.popleft()
            bad.setdefault(number, {}).update(found)
        return Made(arrays, bad)

    def _build(self) -> Iterator[dict[str, np.ndarray]]:
        batches, rows = self._batches, self._batches.rows
        register(self._config, self._vocabulary, batches, self.step)
        converter = CoCaFeatureConverter(
            self._config,
            self._vocabulary,
            batches,
            lambda number, bad: self._bad.append((number, bad)),
        )
        dataset = seqio.get_dataset(
            MIXTURE,
            converter.lengths(),
            converter,
            shard_info=seqio.ShardInfo(rows.process_index, rows.process_count),
            batch_size=rows.count,
            verbose=False,
        )
        options = tf.data.Options()
        options.threading.private_threadpool_size = batches.pixels.threads + 2
        options.deterministic = True
        options.autotune.enabled = False
        return dataset.prefetch(2).with_options(options).as_numpy_iterator()

    def close(self) -> None:
        """Ends the threads."""
        self._iterator = iter(())
        super().close()
