"""Zero-shot classification: by text embedding (Radford et al. 2021, section 3.1), or by the caption
likelihood of each class."""

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
    Flag("prompts", "", "Prompt set, or text file with prompts, for classification."),
    inputs.FLAG,
)
_TEXTS_AT_ONCE = 256  # class texts per decoder call, which bounds memory


def class_texts(class_names: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Returns all prompts of the first class, then of the second, ...: [classes * prompts]."""
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
    """Returns float32 [classes, E]: the normalized mean over prompts of normalized text embeddings.

    Raises ValueError if a value is not finite.
    """
    # Accumulate per class: all embeddings of 20,000 classes in 80 prompts would take gigabytes.
    sums, start = np.zeros((len(class_names), 0), np.float32), 0
    for batch in in_batches(class_texts(class_names, prompts), batch_size, show=show):
        found = normalise(encode_texts(predict, batch, len(batch), labels=True))
        if not start:
            sums = np.zeros((len(class_names), found.shape[1]), np.float32)
        np.add.at(sums, np.arange(start, start + len(batch)) // len(prompts), found)
        start += len(batch)
    return normalise(sums / np.float32(len(prompts)))


def read_alike(predict: Predictor, class_names: Sequence[str], prompts: Sequence[str]) -> str:
    """Returns a warning if all prompts of two classes have the same tokens, which makes them
    indistinguishable; '' otherwise."""
    groups = [list(class_names)]
    # Each prompt splits the groups of classes that were equal so far.
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
    why = "the vocabulary maps them to the same tokens. Use other class_names."
    if valid[:, -1].any():
        why = (
            f"the texts are cut at model.text.max_len={predict.max_len}. Use shorter prompts or "
            "class_names, or train with a larger max_len."
        )
    return (
        f"{sum(map(len, groups))} of {len(class_names)} classes have the same text as another one "
        f"(such as {first!r} and {second!r}): {why}"
    )


def normalise(x: np.ndarray) -> np.ndarray:
    """Scales x to unit length along its last axis; a zero vector stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class ByPrompts(Evaluator):
    """Base of evaluators that classify by texts made from class names."""

    needs, flags, metrics, headlines = "label", FLAGS, METRICS, HEADLINES
    options = dict(class_names=inputs.ClassNames, prompts=str)
    default_prompts = "photo"
    several_batches = True
    class_names: list[str]
    prompts: Sequence[str]

    def _warn_alike(self, predict: Predictor) -> list[str]:
        """Logs the warning of `read_alike`; returns it as notes for the report."""
        line = read_alike(predict, self.class_names, self.prompts)
        if line:
            warn(self.name, line)
        return [line] if line else []

    @classmethod
    def from_flags(cls, task: dict[str, Any], flags: Any) -> None:
        """Reads --prompts and --class_names."""
        super().from_flags(task, flags)
        task |= dict(prompts=flags.prompts, class_names=flags.class_names)

    @classmethod
    def prompts_of(cls, task: Mapping[str, Any]) -> Sequence[str]:
        """The prompts of a task. Raises ValueError for an unknown prompt set."""
        return prompt_sets.load(task.get("prompts") or cls.default_prompts)

    @classmethod
    def check_task(cls, task: Mapping[str, Any]) -> None:
        super().check_task(task)
        cls.prompts_of(task)
        inputs.check(task)

    @classmethod
    def from_task(cls, task: Mapping[str, Any], setting: Setting) -> Evaluator:
        """Options of a task: class_names (a list, or a file for `inputs.read_class_names`) and
        prompts (a set or a file for `prompts.load`)."""
        names, labels = inputs.names_and_labels(task)
        inputs.check_class_names(task, names)
        prompts = cls.prompts_of(task)
        common = setting.common(several=cls.several_batches)
        made: Any = cls
        return made(task["name"], names, prompts, labels=labels, **common)


class ZeroShot(ByPrompts):
    """Classifies images by the similarity of image and text embeddings.

    Args:
      data_name: name of the dataset, the second part of the metric names.
      class_names: distinct names, [classes].
      prompts: texts with '{}' for the name; see data/prompts.py.
      labels: names of the classes in the records; `class_names` by default.
      batch_size: images or texts per call of the model.
      num_examples: number of example images for the report.
      progress: show progress bars.

    Raises ValueError for duplicate names or fewer than two.
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
        self._new_tally()  # raises for invalid names
        self.class_names = list(class_names)
        self.prompts = prompt_sets.check(prompts)
        self.batch_size, self.progress = batch_size, progress
        self.num_examples = num_examples

    def run(self, predict: Predictor, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields top1, top5 (with more than five classes) and mean_per_class with their intervals.

        A record needs `image` and `labels`: any of its labels that is a class is correct; a record
        without one raises ValueError. Sets `examples` and `classes`.
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

    The score of a class is log(mean over prompts of p(prompt with the name | image)).
    `top1_per_token` uses the mean over prompts of log p / number of tokens instead, which does not
    favor short names. The arguments are those of `ZeroShot`.
    """

    kind, order, title = "generative", 20, "Classification by caption likelihood"
    programs = ("score", "num_tokens")
    metrics = METRICS | {"top1_per_token": Metric("Top-1, likelihood per token")}
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
        # The log probability of a text varies by about 1e-5 with the batch.
        self._new_tally = lambda shown=num_examples: Tally(
            self.name, class_names, labels, tie=LIKELIHOOD_TIE, num_examples=shown
        )
        self._new_tally()
        self.class_names = list(class_names)
        self.prompts = prompt_sets.check(prompts)
        self.batch_size, self.progress = batch_size, progress

    def run(self, predict: Predictor, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields the metrics of `ZeroShot.run`, and top1_per_token."""
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
            # log-mean-exp over the prompts  [N, classes]
            top = sums.reshape(shape).max(2, keepdims=True)
            likely = np.log(np.exp(sums.reshape(shape) - top).mean(2)) + top[..., 0]
            tally.add(likely, batch)
            by_token.add((sums / tokens).reshape(shape).mean(2), batch)
        yield from tally.results()
        yield from with_interval(f"{self.name}/top1_per_token", by_token.hits())
        self.examples, self.classes = tally.examples() | dict(notes=notes), tally.classes()
