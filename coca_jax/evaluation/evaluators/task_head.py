"""What a task head and written answers get right: classification, questions, pairs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from coca_jax.config.heads import HeadKind
from coca_jax.data.dedup import content_digest, numbered
from coca_jax.evaluation.evaluators import (
    Record,
    check_finite,
    in_batches,
    record_texts,
    stack_images,
    warn,
)
from coca_jax.evaluation.evaluators.base import Evaluator, Flag, Metric, Pictured, Scale, Setting
from coca_jax.evaluation.evaluators.caption_match import VOICES, canonical_text, vqa_accuracy
from coca_jax.evaluation.evaluators.classification import HEADLINES, METRICS, Tally
from coca_jax.evaluation.evaluators.results import Spread, encode_png, picture
from coca_jax.evaluation.metrics.intervals import with_interval

VQA = Metric("VQA accuracy")
QUESTIONS = Flag("questions", "", "Field that lists {question, answer} objects.")


class Classifier(Protocol):
    """What the evaluators here ask of a model. Images are as in evaluators.Predictor."""

    class_names: list[str]
    head_kind: HeadKind

    def classify(self, images: Any, texts: Sequence[str] | None) -> np.ndarray:
        """N images, or a list of N pairs, and their texts -> probabilities float32 [N, C]."""

    def answer(self, images: Any, questions: Sequence[str]) -> list[str]:
        """N images and N questions -> N answers."""


def question_of(record: Record, name: str) -> str:
    """The record's only text; ValueError where it has none or several. name: who asks."""
    texts = record_texts(record, name)
    if len(texts) != 1:
        raise ValueError(
            f"record {record.get('key', '?')} has {len(texts)} texts where one question is needed; "
            "give the data as kind='question'"
        )
    return texts[0]


def by_voices(
    name: str, outputs: Sequence[str], answers: Sequence[Sequence[str]], owners: np.ndarray | None
) -> Iterator[tuple[str, float]]:
    """Yields vqa_accuracy of what was said, and its interval, where every question has the answers
    of several people, `VOICES` or more; nothing else. owners: as of `with_interval`."""
    if min(map(len, answers), default=0) >= VOICES:
        each = np.asarray([vqa_accuracy(*pair) for pair in zip(outputs, answers, strict=True)])
        yield from with_interval(f"{name}/vqa_accuracy", each, owners=owners)


class OfRecords(Pictured):
    """What takes a question or statement from each record."""

    flags = (QUESTIONS,)

    @classmethod
    def from_flags(cls, task: dict[str, Any], flags: Any) -> None:
        """Takes --questions."""
        super().from_flags(task, flags)
        if flags.questions:
            task["data"]["questions"] = flags.questions

    @classmethod
    def from_task(cls, task: Mapping[str, Any], setting: Setting) -> Evaluator:
        """Takes nothing of the task."""
        made: Any = cls
        return made(task["name"], **setting.common())


class Classification(OfRecords):
    """Scores the task head of a model."""

    kind, order, title = "classification", 50, "Classification by the task head"
    programs = ("classify",)
    metrics = METRICS | {
        "nll": Metric("Negative log-likelihood, nats", Scale.PLAIN, lower=True),
        "unknown_labels": Metric("Labels that the head lacks", Scale.PLAIN, lower=True),
        "vqa_accuracy": VQA,
    }
    headlines, pictures = HEADLINES, 16

    @classmethod
    def check_model(cls, model: Any, task: Mapping[str, Any]) -> None:
        """Refuses a model without a task head."""
        super().check_model(model, task)
        if model.head_kind is None:
            raise ValueError(
                f"task {cls.kind!r}: this model has no task head; score it with zero_shot, or "
                "train it with head.kind"
            )

    @classmethod
    def data_of(cls, task: Mapping[str, Any], model: Any) -> dict[str, Any]:
        """Questions, for a head that reads a text."""
        return dict(task["data"], kind="question") if model.head_kind.reads_text else task["data"]

    @classmethod
    def need_of(cls, model: Any) -> str:
        """Labels, of a head over images alone; questions and statements come with theirs."""
        return "" if model.head_kind.reads_text else "label"

    def run(self, predict: Classifier, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields what `ZeroShot.run` does, nll (nats, of records that have a class),
        unknown_labels: records none of whose labels is a class of the head (it cannot name those,
        so they count as wrong, and where they are all there is a warning says so); and of questions
        what `by_voices` does.

        A record needs `image` (of pairs `second` too), `labels` and, for heads that read a text,
        `text`. Afterwards `examples` and `classes` are as those of ZeroShot.
        """
        names = predict.class_names
        number = {name: i for i, name in enumerate(names)}
        how: dict[str, Any] = dict(missing=True, num_examples=self.num_examples)
        how["asked"] = predict.head_kind.reads_text
        tally = Tally(self.name, names, relative=True, **how)
        surprise: list[float] = []
        named: list[bool] = []  # of each record, whether it has a class of the head
        outputs, answers = list[str](), list[Sequence[str]]()  # of questions
        for batch in in_batches(records, self.batch_size, show=self.name if self.progress else ""):
            images = stack_images(batch)
            if predict.head_kind.images > 1:
                images = [(record["image"], record["second"]) for record in batch]
            texts = None
            if predict.head_kind.reads_text:
                texts = [question_of(record, self.name) for record in batch]
            found = check_finite(np.asarray(predict.classify(images, texts)), "class probabilities")
            tally.add(found, batch)
            for record, row in zip(batch, found):
                known = list({number[label] for label in record["labels"] if label in number})
                surprise += [-np.log(max(float(row[known].sum()), 1e-12))] if known else []
                named.append(bool(known))
                if predict.head_kind.reads_text:
                    outputs.append(names[int(row.argmax())])
                    answers.append(record["labels"])
        if named and not surprise:
            given = ", ".join(map(repr, list(record["labels"])[:3])) or "none"
            shown = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
            warn(
                self.name,
                f"none of {len(named)} records has a class of the head, so none can be right; "
                f"labels of the last are {given}, the head's {len(names)} classes {shown}; give "
                "data of these classes",
            )
        yield from tally.results()
        if surprise:
            owners = tally.owners()
            if owners is not None:  # without gaps
                owners = np.unique(owners[named], return_inverse=True)[1]
            nats = np.asarray(surprise)
            yield from with_interval(f"{self.name}/nll", nats, owners=owners, most=None)
        yield f"{self.name}/unknown_labels", float(len(named) - len(surprise))
        yield from by_voices(self.name, outputs, answers, tally.owners())
        self.examples, self.classes = tally.examples(), tally.classes()


class Answers(OfRecords):
    """Scores the answers that the decoder writes behind questions."""

    kind, order, title = "answers", 60, "Written answers"
    programs = ("answer",)
    metrics = {"exact_match": Metric("Exact match"), "vqa_accuracy": VQA}
    headlines = ("exact_match",)

    @classmethod
    def data_of(cls, task: Mapping[str, Any], model: Any) -> dict[str, Any]:
        """Questions, whatever the model."""
        return dict(task["data"], kind="question")

    def run(self, predict: Classifier, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields exact_match, and its interval: answers equal to one of the record's labels, in
        lower case and without punctuation; the interval draws images with all their questions.
        And what `by_voices` does. Afterwards `examples` holds pictures with answers."""
        exact: list[bool] = []
        written, wanted_of = list[str](), list[Sequence[str]]()
        image_of: list[bytes] = []
        shown = Spread(self.num_examples)
        for batch in in_batches(records, self.batch_size, show=self.name if self.progress else ""):
            questions = [question_of(record, self.name) for record in batch]
            answers = predict.answer(stack_images(batch), questions)
            for record, output in zip(batch, answers, strict=True):
                wanted = {canonical_text(label) for label in record["labels"]}
                exact.append(canonical_text(output) in wanted)
                image_of.append(content_digest(record["image"]))
                written.append(output)
                wanted_of.append(record["labels"])
                shown.offer(functools.partial(_item, record, output, exact[-1]))
        if not exact:
            raise ValueError(f"{self.name} has no record; check the data set and its split")
        self.examples = dict(kind="captioning", items=shown.items())
        owners = numbered(image_of)
        yield from with_interval(f"{self.name}/exact_match", np.asarray(exact), owners=owners)
        yield from by_voices(self.name, written, wanted_of, owners)


def _item(record: Record, output: str, exact: bool) -> dict[str, Any]:
    """One picture of the report, with the question, the answer and the labels."""
    return dict(
        image=encode_png(picture(record["image"])),
        caption=f"{question_of(record, '')} {output}",
        references=list(record["labels"])[:5],
        exact=exact,
    )
