"""What a Task does to blocks of records: choose a text, tokenise it, plan the augmentation.

A block is the part of one batch that comes from one source (of this process): every feature has
the examples as its first axis. Working on blocks keeps TensorFlow's cost per element away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from coca_jax.data import augment, images, order, videos
from coca_jax.data import texts as choices
from coca_jax.data.vocabulary import Vocabulary

_CACHED_TEXTS = 50_000  # about 1 KB each

Preprocessor = Callable[[tf.data.Dataset], tf.data.Dataset]


class Tokenizer:
    """Tokenises each text once: rows of equal texts come from memory. Thread-safe.

    A text with texts.ANSWER in it is a question and its answer (Vocabulary.encode_answers).
    """

    def __init__(self, vocabulary: Vocabulary, max_len: int, is_label: bool):
        self._vocabulary, self._max_len, self._is_label = vocabulary, max_len, is_label
        self._rows: dict[str, tuple[np.ndarray, np.ndarray, np.integer]] = {}
        self._hashes: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(
        self, texts: Sequence[str], canonical: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Texts -> tokens int32 [n, L], valid bool [n, L], text_id int32 [n, 2], and how many of
        the tokens come before an answer, int32 [n]."""
        with self._lock:
            new = list(dict.fromkeys(text for text in texts if text not in self._rows))
            if len(self._rows) + len(new) > _CACHED_TEXTS:
                self._rows.clear()
                new = list(dict.fromkeys(texts))
            if new:
                self._rows.update(zip(new, zip(*self._encode(new))))
            if len(self._hashes) > _CACHED_TEXTS:
                self._hashes.clear()
            for text in canonical:
                if text not in self._hashes:
                    self._hashes[text] = choices.text_hash(text)
            found = [self._rows[text] for text in texts]
            hashes = np.array([self._hashes[text] for text in canonical], np.int64)
        tokens, valid, prompt_len = (np.stack(rows) for rows in zip(*found))
        return tokens, valid, hashes.view(np.int32).reshape(-1, 2), prompt_len

    def _encode(self, new: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if choices.ANSWER in new[0]:
            questions, _, answers = zip(*(text.partition(choices.ANSWER) for text in new))
            return self._vocabulary.encode_answers(questions, answers, self._max_len)
        labels = [True] * len(new) if self._is_label else None
        tokens, valid = self._vocabulary.encode_batch(new, self._max_len, labels)
        return tokens, valid, valid.sum(1, dtype=np.int32)


def _lists(values: np.ndarray, lengths: np.ndarray) -> list[list[str]]:
    """Strings [m] and the number that each of n records has -> n lists."""
    flat = [value.decode() for value in values.tolist()]
    ends = np.cumsum(lengths).tolist()
    return [flat[end - count : end] for end, count in zip(ends, lengths.tolist())]


def _map(
    block: dict[str, Any],
    function: Callable,
    inputs: Sequence[str],
    outputs: dict[str, tuple[Any, tuple]],
) -> dict[str, Any]:
    """Adds to a block what a numpy function makes of some of its features."""
    results = tf.numpy_function(
        function, [block[name] for name in inputs], [dtype for dtype, _ in outputs.values()]
    )
    block = dict(block)
    for (name, (_, shape)), value in zip(outputs.items(), results):
        value.set_shape((None, *shape))
        block[name] = value
    return block


def caption_text(seed: int, source: int) -> Preprocessor:
    """seqio preprocessor: `text` is one of the captions."""

    def choose(values: np.ndarray, lengths: np.ndarray, positions: np.ndarray) -> Any:
        texts = choices.choose_captions(_lists(values, lengths), seed, source, positions)
        encoded = np.array([text.encode() for text in texts], object)
        return encoded, encoded

    return lambda ds: ds.map(
        lambda block: _map(
            block,
            choose,
            ("texts", "text_counts", "position"),
            {"text": (tf.string, ()), "canonical": (tf.string, ())},
        )
    )


def label_text(prompts: Sequence[str], seed: int, source: int) -> Preprocessor:
    """seqio preprocessor: `text` is made of the class names."""

    def choose(values: np.ndarray, lengths: np.ndarray, positions: np.ndarray) -> Any:
        texts, same = choices.label_texts(_lists(values, lengths), prompts, seed, source, positions)
        return (
            np.array([text.encode() for text in texts], object),
            np.array([text.encode() for text in same], object),
        )

    return lambda ds: ds.map(
        lambda block: _map(
            block,
            choose,
            ("labels", "label_counts", "position"),
            {"text": (tf.string, ()), "canonical": (tf.string, ())},
        )
    )


def question_text(classes: Mapping[str, int], seed: int, source: int) -> Preprocessor:
    """seqio preprocessor: `text` is a question and one of its answers."""

    def choose(
        questions: np.ndarray, labels: np.ndarray, counts: np.ndarray, positions: np.ndarray
    ) -> Any:
        names = _lists(labels, counts)
        answers = choices.choose_labels(names, classes, seed, source, positions)
        texts = [q + choices.ANSWER.encode() + a.encode() for q, a in zip(questions, answers)]
        encoded = np.array(texts, object)
        return encoded, encoded

    return lambda ds: ds.map(
        lambda block: _map(
            block,
            choose,
            ("texts", "labels", "label_counts", "position"),
            {"text": (tf.string, ()), "canonical": (tf.string, ())},
        )
    )


def tokenize(tokenizer: Tokenizer, max_len: int) -> Preprocessor:
    """seqio preprocessor: `text` to `tokens`, `text_valid`, `text_id` and `prompt_len`."""

    def encode(texts: np.ndarray, canonical: np.ndarray) -> Any:
        return tokenizer([t.decode() for t in texts], [t.decode() for t in canonical])

    return lambda ds: ds.map(
        lambda block: _map(
            block,
            encode,
            ("text", "canonical"),
            {
                "tokens": (tf.int32, (max_len,)),
                "text_valid": (tf.bool, (max_len,)),
                "text_id": (tf.int32, (2,)),
                "prompt_len": (tf.int32, ()),
            },
        )
    )


def plan_augmentation(
    mode: str,
    size: int,
    seed: int,
    source: int,
    *,
    flip: bool,
    resize: str,
    fast: bool,
    randaugment: tuple[int, float],
    num_frames: int = 0,
    jitter: bool = False,
) -> Preprocessor:
    """seqio preprocessor: how to decode each image or clip, and the numbers of its augmentation.

    `frame_offsets` say which frames of a clip are taken (videos.sample); all get the same numbers.
    """
    sniff = videos.sniff if num_frames else images.sniff
    layers = randaugment[0] if mode == "randaugment" else 1

    def draw(encoded: np.ndarray, positions: np.ndarray) -> Any:
        found = np.array([sniff(data) for data in encoded.tolist()], np.int64).reshape(-1, 3)
        how, height, width = found.T
        keys = choices.draw_keys(seed, source, positions, choices.AUGMENT)
        plan = augment.plan(
            mode,
            how,
            height,
            width,
            keys,
            size,
            flip=flip,
            resize=resize,
            fast=fast,
            randaugment=randaugment,
        )
        offsets = np.tile(videos.middles(num_frames), (len(keys), 1))
        if jitter:
            frame_keys = choices.draw_keys(seed, source, positions, choices.FRAMES)
            offsets = order.uniform(frame_keys, num_frames)
        return how.astype(np.int32), *plan.values(), offsets

    outputs = {
        "how": (tf.int32, ()),
        "box": (tf.int32, (4,)),
        "ratio": (tf.int32, ()),
        "shrink": (tf.bool, ()),
        "warp": (tf.float32, (2, 3)),
        "colour": (tf.float32, (3, 4)),
        "background": (tf.float32, (3,)),
        "op": (tf.int32, (layers,)),
        "strength": (tf.float32, (layers,)),
        "frame_offsets": (tf.float64, (num_frames,)),
    }
    return lambda ds: ds.map(lambda block: _map(block, draw, ("image", "position"), outputs))


def keep(features: Sequence[str]) -> Preprocessor:
    """seqio preprocessor: drops all other features."""
    return lambda ds: ds.map(lambda block: {name: block[name] for name in features})
