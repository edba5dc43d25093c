"""What the model is asked, in batches. Each class says what its items are, and what is answered.

Pixels are what `model.fit_image` gives. Answers are ready for JSON.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from coca_jax.inference import texts as text_arrays
from coca_jax.inference.explain import Explanation, Word
from coca_jax.inference.generation.settings import Settings
from coca_jax.inference.model import CoCaModel
from coca_jax.inference.texts import Caption


@dataclasses.dataclass(frozen=True)
class Captions:
    """Items: (pixels, prompt). Answers: {"captions": [...], "attention"}; with explain each caption
    has its words."""

    settings: Settings
    explain: bool = False

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        pixels, prompts = np.stack([one for one, _ in items]), [prompt for _, prompt in items]
        # The same number for all: an image's captions do not depend on its company.
        found = model.captions(
            pixels, prompts, seeds=[0] * len(items), **dataclasses.asdict(self.settings)
        )
        yield _captions(model, pixels, found, self.explain)


@dataclasses.dataclass(frozen=True)
class StreamedCaptions:
    """Items and the last answer: as of Captions. Before it comes {"tokens": [...]} after each
    token, one for each caption that is still written."""

    settings: Settings
    explain: bool = False

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        pixels, prompts = np.stack([one for one, _ in items]), [prompt for _, prompt in items]
        how = dataclasses.asdict(self.settings)
        written: list[list[Caption]] = []
        for now in model.stream_captions(pixels, prompts, seeds=[0] * len(items), **how):
            before = written or [[None] * len(row) for row in now]
            yield [_tokens(*pair) for pair in zip(before, now)]
            written = now
        for row in written:
            row.sort(key=lambda caption: -caption.log_prob)
        yield _captions(model, pixels, written, self.explain)


def _tokens(before: list[Any], now: list[Caption]) -> dict[str, Any] | None:
    new = [
        dict(
            caption=place,
            text=caption.text.rstrip("\ufffd"),
            probability=_probability(caption.log_prob - (old.log_prob if old else 0.0)),
            end=caption.finished,
        )
        for place, (old, caption) in enumerate(zip(before, now))
        if old is None or caption.num_tokens > old.num_tokens
    ]
    return dict(tokens=new) if new else None


@dataclasses.dataclass(frozen=True)
class Explain:
    """Items: (pixels, text). Answers: {"captions": [the text with its words], "attention"}; a text
    that was cut to fit is not finished."""

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        texts = [text for _, text in items]
        found = model.explain(np.stack([one for one, _ in items]), texts)
        room = model.max_len - 2  # the begin and the end symbol are always there
        whole = [len(ids) <= room for ids in model.vocabulary.encode_many(texts)]
        yield [
            dict(captions=[_explained(*told)], attention=_rounded(told[1].attention))
            for told in zip(texts, found, whole)
        ]


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Items: pixels. Answers: {"labels": [{"label", "probability"}], the most probable first,
    "cut": whether the model has read a beginning of a label in its sentence alone}.
    template: the sentence around a label; '': those of `model.zero_shot`."""

    labels: tuple[str, ...]
    template: str

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        with text_arrays.noting_cuts() as cuts:
            found = model.zero_shot(np.stack(items), self.labels, self.template or None)
        cut = any(cuts.rows)
        yield [dict(labels=_ranked(self.labels, row), cut=cut) for row in found]


@dataclasses.dataclass(frozen=True)
class Head:
    """Items: (pixels, of a head over pairs [2, ...]; question or ''). Answers: {"labels": [...]},
    the k most probable classes of the task head, and of one that reads a question "cut", as
    `Answer`."""

    k: int

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        reads = bool(model.head_kind and model.head_kind.reads_text)
        texts = [question for _, question in items] if reads else None
        found = model.classify(np.stack([one for one, _ in items]), texts)
        told = [dict(labels=_ranked(model.class_names, row)[: self.k]) for row in found]
        yield [one | cut for one, cut in zip(told, _cuts(model, texts))] if texts else told


@dataclasses.dataclass(frozen=True)
class Answer:
    """Items: (pixels, question). Answers: {"answer", as the decoder writes it, "cut": whether the
    model has read a beginning of the question alone}."""

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        pixels, questions = np.stack([one for one, _ in items]), [text for _, text in items]
        found = model.answer(pixels, questions)
        yield [dict(answer=text) | cut for text, cut in zip(found, _cuts(model, questions))]


def _cuts(model: CoCaModel, questions: list[str]) -> list[dict[str, bool]]:
    """{"cut": whether it is longer than what the model reads} of each question."""
    encode, words = model.vocabulary.encode_question, model.vocabulary.encode_many(questions)
    read = [len(encode(question, model.max_len)) - 1 for question in questions]
    return [dict(cut=count < len(ids)) for count, ids in zip(read, words)]


@dataclasses.dataclass(frozen=True)
class EmbedImages:
    """Items: pixels. Answers: embeddings float32 [E]."""

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        yield list(model.encode_image(np.stack(items)))


@dataclasses.dataclass(frozen=True)
class EmbedTexts:
    """Items: texts. Answers: (embedding float32 [E], whether the model has read a beginning of the
    text alone)."""

    def run(self, model: CoCaModel, items: list[Any]) -> Iterator[list[Any]]:
        """See the class."""
        with text_arrays.noting_cuts() as cuts:
            found = model.encode_text(items)
        yield list(zip(found, cuts.rows, strict=True))


def _captions(
    model: CoCaModel, pixels: np.ndarray, found: list[list[Caption]], explain: bool
) -> list[dict[str, Any]]:
    if not explain:
        return [dict(captions=[_caption(one) for one in row]) for row in found]
    which = [number for number, row in enumerate(found) for _ in row]
    every = iter(model.explain(pixels[which], [one for row in found for one in row]))
    answers = []
    for row in found:
        reasons = [next(every) for _ in row]
        captions = [_caption(one) | dict(words=_words(reason)) for one, reason in zip(row, reasons)]
        answers.append(dict(captions=captions, attention=_rounded(reasons[0].attention)))
    return answers


def _caption(caption: Caption) -> dict[str, Any]:
    return dict(text=caption.text, log_prob=round(caption.log_prob, 4), finished=caption.finished)


def _explained(text: str, reason: Explanation, whole: bool) -> dict[str, Any]:
    total = sum(word.log_prob for word in reason.words)
    return dict(text=text, log_prob=round(total, 4), finished=whole, words=_words(reason))


def _words(reason: Explanation) -> list[dict[str, Any]]:
    return [_word(word) for word in reason.words]


def _word(word: Word) -> dict[str, Any]:
    others = [dict(text=text, probability=_probability(p)) for text, p in word.alternatives]
    return dict(
        text=word.text,
        probability=_probability(word.log_prob),
        alternatives=others,
        attention=_rounded(word.attention),
    )


def _ranked(names: Any, probabilities: np.ndarray) -> list[dict[str, Any]]:
    order = np.argsort(-probabilities, kind="stable")
    return [dict(label=names[i], probability=_short(float(probabilities[i]))) for i in order]


def _probability(log_prob: float) -> float:
    return _short(math.exp(min(log_prob, 0.0)))


def _short(probability: float) -> float:
    """Six digits of it."""
    return float(f"{probability:.6g}")


def _rounded(attention: np.ndarray) -> list[Any]:
    return np.round(attention.astype(np.float64), 5).tolist()
