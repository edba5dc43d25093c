"""Zero-shot classification by the nearest class text (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from coca_jax.data import prompts as prompt_sets
from coca_jax.evaluators import (
    Predictor,
    Record,
    check_finite,
    encode_texts,
    in_batches,
    stack_images,
)
from coca_jax.evaluators.intervals import with_interval
from coca_jax.evaluators.results import encode_png, thumbnail

_MAX_CONFUSION = 100  # classes; more would be a picture nobody reads


def class_embeddings(
    predict: Predictor, class_names: Sequence[str], prompts: Sequence[str], batch_size: int = 256
) -> np.ndarray:
    """Returns float32 [classes, E]: normalised mean over prompts of normalised text embeddings."""
    prompts = prompt_sets.check(prompts)
    texts = [prompt.replace("{}", name) for name in class_names for prompt in prompts]
    embeddings = normalise(encode_texts(predict, texts, batch_size))
    return normalise(embeddings.reshape(len(class_names), len(prompts), -1).mean(1))


def normalise(x: np.ndarray) -> np.ndarray:
    """Returns x at unit length along its last axis; a zero vector stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class ZeroShot:
    """Classifies images by text alone.

    Args:
      data_name: of the data set, the second part of the metrics' names.
      class_names: distinct names, [classes].
      prompts: texts with '{}' for the name; see data/prompts.py.
      batch_size: images or texts at a time.
      num_examples: pictures kept for the report.

    Raises ValueError when names repeat or there are fewer than two.
    """

    def __init__(
        self,
        data_name: str,
        class_names: Sequence[str],
        prompts: Sequence[str] = prompt_sets.PHOTO,
        *,
        batch_size: int = 256,
        num_examples: int = 16,
    ):
        if len(class_names) < 2 or len(set(class_names)) != len(class_names):
            distinct = len(set(class_names))
            raise ValueError(
                f"class_names holds {len(class_names)} names, {distinct} distinct; "
                "give two or more, each once"
            )
        self.name = f"zeroshot/{data_name}"
        self.class_names = list(class_names)
        self.prompts = prompt_sets.check(prompts)
        self.batch_size, self.num_examples = batch_size, num_examples
        self.examples: dict[str, Any] = {}

    def run(self, predict: Predictor, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields top1, top5 (of more than five classes), mean_per_class, and their intervals.

        A record needs `image` and `labels`: any of its names that are classes counts as right, and
        one with none raises ValueError. Of classes that score the same, the true one is ranked
        last, so that constant embeddings score 0 and not 1. Afterwards `examples` holds
        confusions, accuracies by class and pictures for the report.
        """
        number = {name: i for i, name in enumerate(self.class_names)}
        classes = class_embeddings(predict, self.class_names, self.prompts, self.batch_size)
        ranks: list[np.ndarray] = []
        truths: list[int] = []  # the first name, for accuracy by class and confusion
        guesses: list[np.ndarray] = []
        shown: list[tuple[np.ndarray, list[str], np.ndarray]] = []
        for batch in in_batches(records, self.batch_size):
            images = stack_images(batch)
            embeddings = check_finite(np.asarray(predict.encode_image(images)), "image")
            scores = normalise(embeddings) @ classes.T
            right = np.zeros(scores.shape, bool)
            for row, record in enumerate(batch):
                known = [number[name] for name in record["labels"] if name in number]
                if not known:
                    raise ValueError(
                        f"labels of {record.get('key', 'a record')} are {list(record['labels'])}; "
                        f"none is among the {len(number)} classes of {self.name}"
                    )
                right[row, known] = True
                truths.append(known[0])
            ranks.append(rank_of_best(scores, right))
            # Among equal scores a wrong class is the guess, as in the rank.
            best = scores >= scores.max(1, keepdims=True) - 1e-6
            guesses.append(np.where(best & ~right, 2, np.where(best, 1, 0)).argmax(1))
            for row in range(min(len(batch), self.num_examples - len(shown))):
                names = list(batch[row]["labels"])
                shown.append((thumbnail(images[row]), names, scores[row]))
        if not truths:
            raise ValueError(f"{self.name} has no record; check the data set and its split")
        rank, truth = np.concatenate(ranks), np.asarray(truths)
        # With several names, a guess of any of them stands on the diagonal.
        guess = np.where(rank < 1, truth, np.concatenate(guesses))
        self.examples = self._examples(rank, truth, guess, shown)
        yield from with_interval(f"{self.name}/top1", rank < 1)
        if len(self.class_names) > 5:
            yield from with_interval(f"{self.name}/top5", rank < 5)
        total = np.bincount(truth, minlength=len(self.class_names))
        hits = np.bincount(truth, rank < 1, minlength=len(self.class_names))
        yield f"{self.name}/mean_per_class", float((hits[total > 0] / total[total > 0]).mean())
        yield f"{self.name}/num_classes", float(len(self.class_names))

    def _examples(
        self, rank: np.ndarray, truth: np.ndarray, guess: np.ndarray, shown: list
    ) -> dict[str, Any]:
        names = self.class_names
        present = np.unique(truth)
        by_class = {
            names[c]: dict(
                accuracy=float((rank[truth == c] < 1).mean()), count=int((truth == c).sum())
            )
            for c in present
        }
        wrong = rank >= 1
        pairs, counts = np.unique(
            np.stack([truth[wrong], guess[wrong]], 1), axis=0, return_counts=True
        )
        worst = np.argsort(-counts, kind="stable")[:15]
        examples: dict[str, Any] = dict(
            kind="zeroshot",
            per_class=by_class,
            confused=[
                dict(truth=names[pairs[i][0]], guess=names[pairs[i][1]], count=int(counts[i]))
                for i in worst
            ],
            items=[
                dict(
                    image=encode_png(image),
                    truth=labels,
                    guesses=[(names[c], float(scores[c])) for c in np.argsort(-scores)[:3]],
                )
                for image, labels, scores in shown
            ],
        )
        rows, columns = present, np.unique(np.concatenate([present, guess]))
        if len(columns) <= _MAX_CONFUSION:
            table = np.zeros((len(names), len(names)), int)
            np.add.at(table, (truth, guess), 1)
            examples["confusion"] = dict(
                rows=[names[c] for c in rows],
                columns=[names[c] for c in columns],
                counts=table[np.ix_(rows, columns)].tolist(),
            )
        return examples


def rank_of_best(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns how many wrong candidates score no less than the best right one, int [N].

    Args:
      scores: [N, C].
      right: bool [N, C], at least one in each row.

    Equality is up to 1e-6, below which float32 dot products of the same vectors may differ.
    """
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    return ((scores >= best - 1e-6) & ~right).sum(1)
