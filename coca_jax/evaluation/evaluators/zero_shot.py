"""Zero-shot classification: by the nearest class text (Radford et al. 2021, section 3.1), or by the
class text that the captioner finds most likely."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from coca_jax.data import prompts as prompt_sets
from coca_jax.evaluation.evaluators import (
    LIKELIHOOD_TIE,
    Predictor,
    Record,
    check_finite,
    encode_texts,
    in_batches,
    inputs,
    stack_images,
    warn,
)
from coca_jax.evaluation.evaluators.base import Evaluator, Flag, Metric, Setting
from coca_jax.evaluation.evaluators.classification import HEADLINES, METRICS, Tally
from coca_jax.evaluation.evaluators.results import POINTS, PictureMap
from coca_jax.evaluation.metrics.intervals import with_interval

FLAGS = (
    Flag("prompts", "", "Prompt set or text file for classification."),
    inputs.FLAG,
)
_TEXTS_AT_ONCE = 256  # class texts whose decoder states are held at the same time


def class_texts(class_names: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Returns every prompt of the first class, of the second, ..: [classes * prompts]."""
    prompts = prompt_sets.check(prompts)
    return [prompt.replace("{}", name) for name in class_names for prompt in prompts]


def class_embeddings(
    predict: Predictor,
    class_names: Sequence[str],
    prompts: Sequence[str],
    batch_size: int = 256,
    *,
    show: str = "",
) -> np.ndarray:
    """Returns float32 [classes, E]: normalised mean over prompts of normalised text embeddings.

    Raises ValueError when a value is not finite. Memory is that of the classes: the embeddings of
    20,000 in 80 prompts are gigabytes.
    """
    sums, start = np.zeros((len(class_names), 0), np.float32), 0
    for batch in in_batches(class_texts(class_names, prompts), batch_size, show=show):
        found = normalise(encode_texts(predict, batch, len(batch), labels=True))
        if not start:
            sums = np.zeros((len(class_names), found.shape[1]), np.float32)
        np.add.at(sums, np.arange(start, start + len(batch)) // len(prompts), found)
        start += len(batch)
    return normalise(sums / np.float32(len(prompts)))


def read_alike(predict: Predictor, class_names: Sequence[str], prompts: Sequence[str]) -> str:
    """A warning where the model reads the same tokens in all prompts of two classes, which no score
    can tell apart, else ''."""
    groups = [list(class_names)]
    for prompt in prompts:
        found: dict[tuple[int, bytes], list[str]] = defaultdict(list)
        for number, names in enumerate(groups):
            tokens, _ = predict.tokenize_with_mask(class_texts(names, [prompt]), labels=True)
            for name, row in zip(names, tokens):
                found[number, row.tobytes()].append(name)
        groups = [names for names in found.values() if len(names) > 1]
    if not groups:
        return ""
    first, second = groups[0][:2]
    _, valid = predict.tokenize_with_mask(class_texts([first, second], prompts), labels=True)
    why = "the model's vocabulary does not tell their letters apart; give other class_names"
    if valid[:, -1].any():
        why = (
            f"the texts are cut at model.text.max_len={predict.max_len}; train with a larger one, "
            "or give shorter prompts or class_names"
        )
    return (
        f"{sum(map(len, groups))} of {len(class_names)} classes have the text of another one, as "
        f"{first!r} and {second!r}, and cannot be told apart: {why}"
    )


def normalise(x: np.ndarray) -> np.ndarray:
    """Returns x at unit length along its last axis; a zero vector stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class ByPrompts(Evaluator):
    """What classifies by texts made of class names."""

    needs, flags, metrics, headlines = "label", FLAGS, METRICS, HEADLINES
    options = dict(class_names=inputs.ClassNames, prompts=str)
    default_prompts = "photo"
    several_batches = True
    class_names: list[str]
    prompts: Sequence[str]

    def _warn_alike(self, predict: Predictor) -> list[str]:
        """`read_alike` of the task's classes, said and for the report's notes."""
        line = read_alike(predict, self.class_names, self.prompts)
        if line:
            warn(self.name, line)
        return [line] if line else []

    @classmethod
    def from_flags(cls, task: dict[str, Any], flags: Any) -> None:
        """Takes --prompts and --class_names."""
        super().from_flags(task, flags)
        task |= dict(prompts=flags.prompts, class_names=flags.class_names)

    @classmethod
    def prompts_of(cls, task: Mapping[str, Any]) -> Sequence[str]:
        """Raises ValueError for an unknown set."""
        return prompt_sets.load(task.get("prompts") or cls.default_prompts)

    @classmethod
    def check_task(cls, task: Mapping[str, Any]) -> None:
        super().check_task(task)
        cls.prompts_of(task)
        inputs.check(task)

    @classmethod
    def from_task(cls, task: Mapping[str, Any], setting: Setting) -> Evaluator:
        """task: class_names, a list or a file for `class_names.read_class_names`; prompts, a set
        or a file for `prompts.load`."""
        names, labels = inputs.names_and_labels(task)
        inputs.check_class_names(task, names)
        prompts = cls.prompts_of(task)
        common = setting.common(several=cls.several_batches)
        made: Any = cls
        return made(task["name"], names, prompts, labels=labels, **common)


class ZeroShot(ByPrompts):
    """Classifies images by text embeddings alone.

    Args:
      data_name: of the data set, the second part of the metrics' names.
      class_names: distinct names, [classes].
      prompts: texts with '{}' for the name; see data/prompts.py.
      labels: how the records call the classes; by default as `class_names`.
      batch_size: images or texts at a time.
      num_examples: pictures kept for the report.
      progress: shows bars.

    Raises ValueError when names repeat or there are fewer than two.
    """

    kind, order, title, usual = "zero_shot", 10, "Zero-shot classification", True
    programs = ("encode_image", "encode_text")

    def __init__(
        self,
        data_name: str,
        class_names: Sequence[str],
        prompts: Sequence[str] = prompt_sets.PHOTO,
        *,
        labels: Sequence[str] | None = None,
        batch_size: int = 256,
        num_examples: int = 16,
        progress: bool = False,
    ):
        super().__init__(data_name)
        self._new_tally = lambda: Tally(self.name, class_names, labels, num_examples=num_examples)
        self._new_tally()  # refuses unsuitable names now
        self.class_names = list(class_names)
        self.prompts = prompt_sets.check(prompts)
        self.batch_size, self.progress = batch_size, progress
        self.num_examples = num_examples

    def run(self, predict: Predictor, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields top1, top5 (of more than five classes), mean_per_class, and their intervals.

        A record needs `image` and `labels`: any of its names that are classes counts as right, and
        one with none raises ValueError. Of classes that score the same, the true one is ranked
        last, so that constant embeddings score 0 and not 1. Afterwards `examples` holds what the
        report shows and `classes` accuracy by class and the confusion matrix.
        """
        show = self.name if self.progress else ""
        notes = self._warn_alike(predict)
        tally, drawn = self._new_tally(), PictureMap(POINTS if self.num_examples else 0)
        classes = class_embeddings(
            predict, self.class_names, self.prompts, self.batch_size, show=show and f"{show} texts"
        )
        for batch in in_batches(records, self.batch_size, show=show and f"{show} images"):
            embeddings = np.asarray(predict.encode_image(stack_images(batch)))
            embeddings = normalise(check_finite(embeddings, "image embeddings"))
            right = tally.add(embeddings @ classes.T, batch)
            names = [", ".join(map(str, record["labels"])) for record in batch]
            drawn.add([record["image"] for record in batch], embeddings, names, right.tolist())
        yield from tally.results()
        self.examples = tally.examples() | dict(map=drawn.found(), notes=notes)
        self.classes = tally.classes()


class Generative(ByPrompts):
    """Classifies images by the likelihood of each class's text as a caption.

    A class's score is log(mean over prompts of p(prompt with the name | image)): the captioner's
    likelihood of the class when the prompts are equally likely. `top1_per_token` scores by the
    mean over prompts of log p / number of tokens instead, which does not favour short names.

    Args: as of `ZeroShot`; images are taken `batch_size` at a time with 256 class texts.
    """

    kind, order, title = "generative", 20, "Classification by caption likelihood"
    programs = ("score", "num_tokens")
    metrics = METRICS | {"top1_per_token": Metric("Top-1 by token")}
    default_prompts, several_batches = "plain", False

    def __init__(
        self,
        data_name: str,
        class_names: Sequence[str],
        prompts: Sequence[str] = prompt_sets.PLAIN,
        *,
        labels: Sequence[str] | None = None,
        batch_size: int = 64,
        num_examples: int = 16,
        progress: bool = False,
    ):
        super().__init__(data_name)
        # Log probabilities of one text in two batches differ by about 1e-5.
        self._new_tally = lambda shown=num_examples: Tally(
            self.name, class_names, labels, tie=LIKELIHOOD_TIE, num_examples=shown
        )
        self._new_tally()
        self.class_names = list(class_names)
        self.prompts = prompt_sets.check(prompts)
        self.batch_size, self.progress = batch_size, progress

    def run(self, predict: Predictor, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields what `ZeroShot.run` does, and top1_per_token."""
        notes = self._warn_alike(predict)
        texts = class_texts(self.class_names, self.prompts)
        shape = (-1, len(self.class_names), len(self.prompts))
        tokens = np.concatenate(
            [predict.num_tokens(part, labels=True) for part in in_batches(texts, _TEXTS_AT_ONCE)]
        )
        tally, by_token = self._new_tally(), self._new_tally(0)
        for batch in in_batches(
            records, self.batch_size, show=f"{self.name} images" if self.progress else ""
        ):
            images = stack_images(batch)
            parts = [
                predict.score(images, part, labels=True)
                for part in in_batches(texts, _TEXTS_AT_ONCE)
            ]
            sums = np.concatenate(parts, 1).astype(np.float64)
            check_finite(sums, f"caption likelihoods of {self.name}")
            top = sums.reshape(shape).max(2, keepdims=True)
            likely = np.log(np.exp(sums.reshape(shape) - top).mean(2)) + top[..., 0]
            tally.add(likely, batch)
            by_token.add((sums / tokens).reshape(shape).mean(2), batch)
        yield from tally.results()
        yield from with_interval(f"{self.name}/top1_per_token", by_token.hits())
        self.examples, self.classes = tally.examples() | dict(notes=notes), tally.classes()
