"""What of a record trains: its captions, its labels, the questions about it, or its regions.

A source has one kind (`kind=` of its entry in config.data.sources). This file alone parses that
name; all else calls the methods.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from coca_jax.config import Data, Entry
from coca_jax.data import regions, texts
from coca_jax.data.records import Record
from coca_jax.data.texts import Draw
from coca_jax.data.vocabulary import Vocabulary

NO_CLASS = -1
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, text_valid, prompt_len


class Kind(abc.ABC):
    """A kind of source.

    Attributes:
        name: in config.data.sources.
        wanted: the field that a record must have to train, as messages call it.
        has_classes: whether a record's labels are classes that a task head can learn.
        is_label: whether its texts are made of class names.
    """

    name: ClassVar[str]
    wanted: ClassVar[str] = "label"
    has_classes: ClassVar[bool] = True
    is_label: ClassVar[bool] = False

    @classmethod
    def remedy(cls) -> str:
        """Where a record's field may stand that trains, for messages."""
        return f"--{cls.wanted}_field=NAME where a field of another name holds it"

    def check(self, data: Data) -> None:
        """Raises ValueError for what of config.data does not go with this kind."""
        return

    def trains(self, record: Record) -> bool:
        """Whether a record has what trains."""
        return bool(record.labels)

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
        return tokens, valid, valid.sum(1, dtype=np.int32)

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
    each by its score; None: all texts alike.
    """

    name, wanted, has_classes = "caption", "text", False

    def __init__(self, synthetic: float | None = None):
        self.synthetic = synthetic

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

    def __init__(self, prompts: Sequence[str] = ("{}",)):
        self.prompts = prompts

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
    """A record's text is a question about its image, and its labels are the answers."""

    name = "question"

    def choose(
        self, records: Sequence[Record], classes: Mapping[str, int], draw: Draw
    ) -> tuple[list[str], list[str]]:
        """The question and one of its answers, in one string with texts.ANSWER between."""
        answers = texts.choose_labels([record.labels for record in records], classes, draw)
        chosen = [
            f"{record.texts[0]}{texts.ANSWER}{answer}" for record, answer in zip(records, answers)
        ]
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
        questions, _, answers = zip(*(text.partition(texts.ANSWER) for text in chosen))
        return vocabulary.encode_answers(questions, answers, max_len)


class Region(Kind):
    """Each image trains on one of its regions, another at each visit, as what is at a place or as
    the place of what is named (see regions.py)."""

    name, wanted, has_classes = "region", "region", False

    @classmethod
    def remedy(cls) -> str:
        """Regions stand in a field of their own."""
        return "a field `regions` of {'text', 'box'} beside each image"

    def check(self, data: Data) -> None:
        """Raises ValueError for what moves pixels away from their boxes."""
        for name, value, good in (
            ("augment", data.augment, ("none",)),
            ("flip", data.flip, (False,)),
            ("resize", data.resize, ("squash", "native")),
            ("num_frames", data.num_frames, (0,)),
            ("loader", data.loader, ("direct",)),
        ):
            if value not in good:
                raise ValueError(
                    f"data.{name}={value!r} does not go with a source of kind={self.name!r}, whose "
                    f"boxes are of the whole image; set {' or '.join(map(repr, good))}"
                )

    def trains(self, record: Record) -> bool:
        """Whether a record has a region."""
        return bool(_regions(record))

    def choose(
        self, records: Sequence[Record], classes: Mapping[str, int], draw: Draw
    ) -> tuple[list[str], list[str]]:
        """A region in one of its forms; equal texts are equal."""
        chosen = []
        for record, (which, form) in zip(records, draw.uniform(texts.REGION, 2)):
            found = _regions(record)
            text = regions.forms(found[int(which * len(found))])[int(2 * form)] if found else ""
            chosen.append(text)
        return chosen, chosen

    def vocabulary_texts(self, record: Record, number: int) -> Iterator[str]:
        """Every region in both forms."""
        for region in _regions(record):
            yield from regions.forms(region)


def _regions(record: Record) -> list[regions.Region]:
    """The regions of a record. Raises ValueError naming it where one is none."""
    try:
        return regions.of(record.extra)
    except ValueError as error:
        raise ValueError(f"record {record.key!r}, {error}") from None


KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (Caption, Label, Question, Region)}


def of(entry: Entry) -> Kind:
    """The kind of an entry of config.data.sources."""
    if entry.kind == Caption.name:
        return Caption(entry.synthetic if entry.captions == "scored" else None)
    return KINDS[entry.kind]()
