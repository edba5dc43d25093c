"""Evaluators of task heads (classification, questions, image pairs) and of generated answers."""

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
QUESTIONS = Flag("questions", "", "Field with a list of {question, answer} objects.")


class Classifier(Protocol):
    """Model interface of these evaluators. Images are as in evaluators.Predictor."""

    class_names: list[str]
    head_kind: HeadKind

    def classify(self, images: Any, texts: Sequence[str] | None) -> np.ndarray:
        """Returns class probabilities float32 [N, C] for N images or N image pairs, and texts."""

    def answer(self, images: Any, questions: Sequence[str]) -> list[str]:
        """Generates an answer for each image and question."""


def question_of(record: Record, name: str) -> str:
    """The only text of a record. Raises ValueError if it has none or several. name: evaluator."""
    texts = record_texts(record, name)
    if len(texts) != 1:
        raise ValueError(
            f"record {record.get('key', '?')}: {len(texts)} texts instead of one question. Set "
            "kind='question' in the data entry."
        )
    return texts[0]


def by_voices(
    name: str, outputs: Sequence[str], answers: Sequence[Sequence[str]], owners: np.ndarray | None
) -> Iterator[tuple[str, float]]:
    """Yields vqa_accuracy and its interval if every question has at least `VOICES` answers, and
    nothing otherwise. owners: see `with_interval`."""
    if min(map(len, answers), default=0) >= VOICES:
        each = np.asarray([vqa_accuracy(*pair) for pair in zip(outputs, answers, strict=True)])
        yield from with_interval(f"{name}/vqa_accuracy", each, owners=owners)


class OfRecords(Pictured):
    """Base of evaluators whose records may contain a question or statement."""

    flags = (QUESTIONS,)

    @classmethod
    def from_flags(cls, task: dict[str, Any], flags: Any) -> None:
        """Reads --questions."""
        super().from_flags(task, flags)
        if flags.questions:
            task["data"]["questions"] = flags.questions

    @classmethod
    def from_task(cls, task: Mapping[str, Any], setting: Setting) -> Evaluator:
        """There are no options."""
        made: Any = cls
        return made(task["name"], **setting.common())


class Classification(OfRecords):
    """Scores the task head of a model."""

    kind, order, title = "classification", 50, "Classification by the task head"
    programs = ("classify",)
    metrics = METRICS | {
        "nll": Metric("Negative log-likelihood, nats", Scale.PLAIN, lower=True),
        "unknown_labels": Metric("Records without a class of the head", Scale.PLAIN, lower=True),
        "vqa_accuracy": VQA,
    }
    headlines, pictures = HEADLINES, 16

    @classmethod
    def check_model(cls, model: Any, task: Mapping[str, Any]) -> None:
        """Raises ValueError for a model without a task head."""
        super().check_model(model, task)
        if model.head_kind is None:
            raise ValueError(
                f"task {cls.kind!r}: this model has no task head. Use the task zero_shot, or train "
                "with head.kind."
            )

    @classmethod
    def data_of(cls, task: Mapping[str, Any], model: Any) -> dict[str, Any]:
        """Reads the data as questions if the head has a text input."""
        return dict(task["data"], kind="question") if model.head_kind.reads_text else task["data"]

    @classmethod
    def need_of(cls, model: Any) -> str:
        """Labels for a head without text input; questions include their answers."""
        return "" if model.head_kind.reads_text else "label"

    def run(self, predict: Classifier, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields the metrics of `ZeroShot.run`, nll (nats, over records with a known class),
        unknown_labels (number of records without a class of the head, which count as wrong), and
        for questions the metric of `by_voices`.

        A record needs `image` (and `second` for image pairs), `labels`, and `text` for heads with a
        text input. Sets `examples` and `classes`.
        """
        names = predict.class_names
        number = {name: i for i, name in enumerate(names)}
        how: dict[str, Any] = dict(missing=True, num_examples=self.num_examples)
        how["asked"] = predict.head_kind.reads_text
        tally = Tally(self.name, names, relative=True, **how)
        surprise: list[float] = []
        named: list[bool] = []  # whether each record has a class of the head
        outputs, answers = list[str](), list[Sequence[str]]()  # for questions
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
                f"none of {len(named)} records has a class of the head. Labels of the last record: "
                f"{given}; the head's {len(names)} classes: {shown}",
            )
        yield from tally.results()
        if surprise:
            owners = tally.owners()
            if owners is not None:  # renumber without gaps
                owners = np.unique(owners[named], return_inverse=True)[1]
            nats = np.asarray(surprise)
            yield from with_interval(f"{self.name}/nll", nats, owners=owners, most=None)
        yield f"{self.name}/unknown_labels", float(len(named) - len(surprise))
        yield from by_voices(self.name, outputs, answers, tally.owners())
        self.examples, self.classes = tally.examples(), tally.classes()


class Answers(OfRecords):
    """Scores the answers that the decoder generates for questions."""

    kind, order, title = "answers", 60, "Generated answers"
    programs = ("answer",)
    metrics = {"exact_match": Metric("Exact match"), "vqa_accuracy": VQA}
    headlines = ("exact_match",)

    @classmethod
    def data_of(cls, task: Mapping[str, Any], model: Any) -> dict[str, Any]:
        """Reads the data as questions."""
        return dict(task["data"], kind="question")

    def run(self, predict: Classifier, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields exact_match (answer equal to one of the record's labels after `canonical_text`)
        and the metric of `by_voices`; intervals resample images. Sets `examples`."""
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
            raise ValueError(f"{self.name}: no records. Check the dataset and its split.")
        self.examples = dict(kind="captioning", items=shown.items())
        owners = numbered(image_of)
        yield from with_interval(f"{self.name}/exact_match", np.asarray(exact), owners=owners)
        yield from by_voices(self.name, written, wanted_of, owners)


def _item(record: Record, output: str, exact: bool) -> dict[str, Any]:
    """An example image for the report with the question, the answer and the labels."""
    return dict(
        image=encode_png(picture(record["image"])),
        caption=f"{question_of(record, '')} {output}",
        references=list(record["labels"])[:5],
        exact=exact,
    )
