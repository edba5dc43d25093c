"""What of a record trains: its captions, its labels, or the questions about it.

A source has one kind (`kind=` of its entry in config.data.sources). This file alone parses that
name; all else asks the kind: what its records need, which examples they are, their texts, what
scores them, how messages call them. To add one: a class here, in KINDS, and its name in
config/data.py.

Evaluators read a record's texts, not what `choose` makes: a kind whose texts retrieval or
captioning is to score divides each record into an example that has them. Which records train is
kept beside the data (view_index.py), by the name of the kind: files of a class that has changed
since are to be deleted.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from coca_jax.config import Data, Entry, Loss, shapes
from coca_jax.data import prompts as prompt_sets
from coca_jax.data import texts
from coca_jax.data.sources.records import Record, json_text
from coca_jax.data.texts import Draw
from coca_jax.data.vocabulary import Vocabulary

NO_CLASS = -1
Asked = tuple[str, tuple[str, ...]]  # a question and its answers
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, text_valid, prompt_len


class Kind(abc.ABC):
    """A kind of source.

    Attributes:
        name: in config.data.sources.
        wanted: the field that a record must have to train, as messages call it.
        counted: whether manifests count the records that have that, so that data can be told to be
            of this kind.
        has_classes: whether a record's labels are classes that a task head can learn.
        declared: whether these are the classes that a data set declares.
        is_label: whether its texts are made of class names.
        asks: whether a model learns to answer questions from it.
        drawn: what builtin='scenes' draws for it: 'captions', 'names', or '' for nothing.
        divides: whether a record is as many examples as `examples` says, and not one.
        gives: what each example has then, of 'text' and 'label'.
    """

    name: ClassVar[str]
    wanted: ClassVar[str] = "label"
    counted: ClassVar[bool] = False
    has_classes: ClassVar[bool] = True
    declared: ClassVar[bool] = True
    is_label: ClassVar[bool] = False
    asks: ClassVar[bool] = False
    drawn: ClassVar[str] = ""
    divides: bool = False
    gives: frozenset[str] = frozenset()

    @classmethod
    def of(cls, entry: Entry) -> Kind:
        """By what an entry of config.data.sources says of it."""
        del entry
        return cls()

    def configured(self, entry: Entry, data: Data) -> Kind:
        """This kind with what training alone takes of an entry and of config.data.

        Raises ValueError or FileNotFoundError for what cannot be read."""
        del entry, data
        return self

    @classmethod
    def remedy(cls) -> str:
        """Where a record's field may stand that trains, for messages."""
        field = f"{cls.wanted}_field"
        return f"--{field}=NAME ({field} of a source) where a field of another name holds it"

    @classmethod
    def tasks(cls, loss: Loss, data: Data) -> list[dict[str, Any]]:
        """What scores held-out data of this kind in a run without a task head: the evaluator of
        each task (`kind`) with its options, by the losses that have a weight."""
        del loss, data
        return []

    @classmethod
    def counted_as(cls, split: Mapping[str, Any]) -> str:
        """As what the records of a manifest's split train, and how many of them can, for people."""
        count = split.get(f"with_{cls.wanted}")
        return f" as {cls.name}s" + ("" if count is None else f" ({count} have one)")

    def trains(self, record: Record) -> bool:
        """Whether a record has what trains."""
        return bool(record.labels)

    def examples(self, record: Record) -> list[tuple[int, tuple[str, ...]]]:
        """Of a kind that divides: (number, labels) of each example that a record is. Raises
        ValueError naming a record that cannot be read so."""
        raise NotImplementedError(f"{type(self).__name__} divides no record")

    def example(self, record: Record, part: int, number: int) -> Record:
        """The example of this number in a record that is divided; number: among all."""
        raise NotImplementedError(f"{type(self).__name__} divides no record")

    def nothing(self, training: bool) -> str:
        """Why data that have records have no example of this kind, for people."""
        if self.divides or not training:
            return "it is empty"
        return (
            f"kind={self.name!r} but no record has a {self.wanted}; give the other kind, or "
            f"{self.remedy()}"
        )

    @abc.abstractmethod
    def choose(
        self, records: Sequence[Record], classes: Mapping[str, int], draw: Draw
    ) -> tuple[list[str], list[str]]:
        """The text that each record trains on at its visit, and what tells equal texts: two
        records whose second string is the same count as equal in the contrastive loss."""

    def shown(self, records: Sequence[Record], draw: Draw) -> list[str]:
        """The texts of `choose` for people to read; where only a head's classes say which answer
        is drawn, all answers."""
        return self.choose(records, {}, draw)[0]

    @abc.abstractmethod
    def vocabulary_texts(self, record: Record, number: int) -> Iterator[str]:
        """The texts of the record of this number that a vocabulary learns from."""

    def encode(
        self, vocabulary: Vocabulary, chosen: Sequence[str], max_len: int, label_token: bool
    ) -> Encoded:
        """What `choose` gave, as tokens int32 [n, L], text_valid bool [n, L], prompt_len int32 [n]
        (all of a text's tokens where there is no answer)."""
        marked = [True] * len(chosen) if self.is_label and label_token else None
        tokens, valid = vocabulary.encode_batch(chosen, max_len, marked)
        return tokens, valid, shapes.lengths(valid)

    def classes_of(
        self, records: Sequence[Record], classes: Mapping[str, int], draw: Draw
    ) -> np.ndarray:
        """The class of each record at its visit, int32 [n]; NO_CLASS: none of its labels is one."""
        if not classes or not self.has_classes:
            return np.full(len(records), NO_CLASS, np.int32)
        chosen = texts.choose_labels([record.labels for record in records], classes, draw)
        return np.array([classes.get(name, NO_CLASS) for name in chosen], np.int32)


class Caption(Kind):
    """Each image trains on one of its texts, another one at each visit.

    synthetic: of what `recaption` wrote, how often a caption is taken and not an original text,
    each by its score; None: all texts alike. divides: each text is an example of its own.
    """

    name, wanted, has_classes = "caption", "text", False
    counted, drawn = True, "captions"

    def __init__(self, synthetic: float | None = None, divides: bool = False):
        self.synthetic, self.divides = synthetic, divides
        self.gives = frozenset({"text"} if divides else ())

    @classmethod
    def of(cls, entry: Entry) -> Caption:
        """By `captions` and `synthetic`."""
        scored = entry.captions == "scored"
        return cls(entry.synthetic if scored else None, entry.captions == "all")

    @classmethod
    def tasks(cls, loss: Loss, data: Data) -> list[dict[str, Any]]:
        """Retrieval, and captions beside the references."""
        weights = dict(retrieval=loss.contrastive_weight, captioning=loss.captioning_weight)
        return [dict(kind=kind) for kind, weight in weights.items() if weight]

    def examples(self, record: Record) -> list[tuple[int, tuple[str, ...]]]:
        """Each of the texts."""
        return [(part, record.labels) for part in range(len(record.texts))]

    def example(self, record: Record, part: int, number: int) -> Record:
        """The record with one of its texts."""
        return record._replace(texts=(record.texts[part],))

    def trains(self, record: Record) -> bool:
        """Whether a record has a text."""
        return bool(record.texts)

    def choose(
        self, records: Sequence[Record], classes: Mapping[str, int], draw: Draw
    ) -> tuple[list[str], list[str]]:
        """One of the captions; equal captions are equal texts."""
        captions = [record.texts for record in records]
        if self.synthetic is None:
            chosen = texts.choose_captions(captions, draw)
        else:
            extras = [record.extra for record in records]
            chosen = texts.choose_scored(captions, extras, self.synthetic, draw)
        return chosen, chosen

    def vocabulary_texts(self, record: Record, number: int) -> Iterator[str]:
        """All captions."""
        yield from record.texts


class Label(Kind):
    """Class names as text: all of them, shuffled and joined behind a prompt, as in the paper."""

    name, is_label = "label", True
    counted, drawn = True, "names"

    def __init__(self, prompts: Sequence[str] = prompt_sets.BARE):
        self.prompts = prompts

    def configured(self, entry: Entry, data: Data) -> Label:
        """With the prompts of the entry, or those of all."""
        return Label(prompt_sets.load(entry.prompts or data.prompts))

    @classmethod
    def tasks(cls, loss: Loss, data: Data) -> list[dict[str, Any]]:
        """Classes by embedding, or by what the decoder thinks of each name."""
        prompts = "photo" if data.prompts == "varied" else data.prompts
        by = "zero_shot" if loss.contrastive_weight else "generative"
        return [dict(kind=by, prompts=prompts)]

    def choose(
        self, records: Sequence[Record], classes: Mapping[str, int], draw: Draw
    ) -> tuple[list[str], list[str]]:
        """Names behind a prompt; equal sets of names are equal texts, whatever their prompts."""
        return texts.label_texts([record.labels for record in records], self.prompts, draw)

    def vocabulary_texts(self, record: Record, number: int) -> Iterator[str]:
        """The names behind one of the prompts, which take turns."""
        prompt = self.prompts[number % len(self.prompts)]
        yield prompt.replace("{}", ", ".join(record.labels))


class Question(Kind):
    """A record's text is a question about its image, and its labels are the answers.

    field: of `extra`, which lists questions and answers; '': the texts and labels. answers: only
    questions that one of these answers; none: all.
    """

    name, declared, asks, divides = "question", False, True, True
    gives = frozenset({"text", "label"})

    def __init__(self, field: str = "", answers: Sequence[str] = ()):
        self.field, self.answers = field, frozenset(answers)

    @classmethod
    def of(cls, entry: Entry) -> Question:
        """By `questions` and `answers`."""
        return cls(entry.questions, entry.answers)

    @classmethod
    def tasks(cls, loss: Loss, data: Data) -> list[dict[str, Any]]:
        """The answers that the decoder writes."""
        return [dict(kind="answers")] if loss.captioning_weight else []

    @classmethod
    def counted_as(cls, split: Mapping[str, Any]) -> str:
        """Nothing: how many questions there are is not counted."""
        return ""

    def examples(self, record: Record) -> list[tuple[int, tuple[str, ...]]]:
        """Each question that one of the wanted answers answers."""
        return [
            (part, answers)
            for part, (_, answers) in enumerate(questions_of(record, self.field))
            if not self.answers or self.answers.intersection(answers)
        ]

    def example(self, record: Record, part: int, number: int) -> Record:
        """A question as text, its answers as labels; its number makes the key its own."""
        question, answers = questions_of(record, self.field)[part]
        key = f"{record.key}?{number}"
        return record._replace(texts=(question,), labels=answers, key=key)

    def nothing(self, training: bool) -> str:
        """Where questions were looked for."""
        place = f"in its field {self.field!r}" if self.field else "as text and label"
        among = f", one of {sorted(self.answers)}" if self.answers else ""
        return f"kind={self.name!r} but no record has a question and an answer ({place}{among})"

    def choose(
        self, records: Sequence[Record], classes: Mapping[str, int], draw: Draw
    ) -> tuple[list[str], list[str]]:
        """The question and one of its answers, in one string with texts.ANSWER between."""
        answers = texts.choose_labels([record.labels for record in records], classes, draw)
        asked = [record.texts[0].replace(texts.ANSWER, " ") for record in records]
        chosen = [f"{question}{texts.ANSWER}{answer}" for question, answer in zip(asked, answers)]
        return chosen, chosen

    def shown(self, records: Sequence[Record], draw: Draw) -> list[str]:
        """Each question with all its answers."""
        return [f"{record.texts[0]} {'|'.join(record.labels)}" for record in records]

    def vocabulary_texts(self, record: Record, number: int) -> Iterator[str]:
        """The question and the answers."""
        yield from (*record.texts, *record.labels)

    def encode(
        self, vocabulary: Vocabulary, chosen: Sequence[str], max_len: int, label_token: bool
    ) -> Encoded:
        """Question and answer in one row, each encoded by itself (Vocabulary.encode_answers)."""
        asked, _, answers = zip(*(text.partition(texts.ANSWER) for text in chosen))
        return vocabulary.encode_answers(asked, answers, max_len)


def questions_of(record: Record, field: str) -> list[Asked]:
    """The questions of a record: those that a field of its `extra` lists as {question, answer}, one
    answer or several; with field '' its texts, which its labels answer.

    Raises:
        ValueError: naming the record, whose field lists something else.
    """
    if not field:
        return [(text, record.labels) for text in record.texts if record.labels]
    found = json.loads(record.extra).get(field) or []
    try:
        pairs = [(item["question"], item["answer"]) for item in found]
    except (KeyError, TypeError):
        raise ValueError(
            f"field {field!r} of {record.key!r} must list {{question, answer}} objects"
        ) from None
    asked = [
        (_shown(q), tuple(filter(None, map(_shown, a if isinstance(a, list) else [a]))))
        for q, a in pairs
    ]
    return [(question, answers) for question, answers in asked if question and answers]


def _shown(value: Any) -> str:
    """'' where nothing is said: null, or blanks alone."""
    text = "" if value is None else json_text(value)
    return text if text.strip() else ""


KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (Caption, Label, Question)}


def of(entry: Entry) -> Kind:
    """The kind of an entry of config.data.sources."""
    return KINDS[entry.kind].of(entry)
