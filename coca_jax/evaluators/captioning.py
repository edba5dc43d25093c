"""Captioning: perplexity of the references, and greedy captions compared with them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from coca_jax.evaluators import Predictor, Record, in_batches, stack_images
from coca_jax.evaluators.intervals import bootstrap, with_interval
from coca_jax.evaluators.results import encode_png

Scorer = Callable[[str, Record], tuple[bool, float]]


def canonical_text(text: str) -> str:
    """Returns the text in lower case, without punctuation, with single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def score_scene(caption: str, record: Record) -> tuple[bool, float]:
    """Returns (all attributes right, attribute F1) for a drawn scene (data/scenes.py)."""
    from coca_jax.data import scenes

    return scenes.score_caption(caption, record["scene"])


def score_references(caption: str, record: Record) -> tuple[bool, float]:
    """Returns (equal to a reference, best F1 of words), both after `canonical_text`."""
    said = canonical_text(caption)
    references = [canonical_text(text) for text in reference_texts(record)]
    return said in references, max(_word_f1(said.split(), r.split()) for r in references)


def reference_texts(record: Record) -> list[str]:
    """Returns the record's captions as a list; ValueError when it has none."""
    texts = record["text"]
    texts = [texts] if isinstance(texts, str) else list(texts or ())
    if not texts:
        raise ValueError(f"record {record.get('key', '?')} has no text to compare captions with")
    return texts


def _word_f1(said: list[str], wanted: list[str]) -> float:
    common = sum(min(said.count(word), wanted.count(word)) for word in set(said))
    return 2 * common / (len(said) + len(wanted)) if said or wanted else 1.0


class Captioning:
    """Scores a model's captions.

    Args:
      data_name: of the data set, the second part of the metrics' names.
      scorer: (caption, record) -> (exact, F1); `score_references` or `score_scene`.
      perplexity, captions: which halves to run.
      batch_size: images at a time.
      num_examples: pictures kept for the report.
    """

    def __init__(
        self,
        data_name: str,
        *,
        scorer: Scorer = score_references,
        perplexity: bool = True,
        captions: bool = True,
        batch_size: int = 128,
        num_examples: int = 24,
    ):
        self.name = f"captioning/{data_name}"
        self.scorer = scorer
        self.perplexity, self.captions = perplexity, captions
        self.batch_size, self.num_examples = batch_size, num_examples
        self.examples: dict[str, Any] = {}

    def run(self, predict: Predictor, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields perplexity (of a token, over all references), exact_match and f1, with intervals.

        A record needs `image` and `text`, and what the scorer reads. Perplexity is
        exp(-sum of log likelihoods / number of predicted tokens), the end of text included.
        Afterwards `examples` holds pictures with captions and references.
        """
        sums: list[np.ndarray] = []
        tokens: list[np.ndarray] = []
        exact: list[bool] = []
        f1: list[float] = []
        items: list[dict[str, Any]] = []
        count = 0
        for batch in in_batches(records, self.batch_size):
            images = stack_images(batch)
            count += len(batch)
            if self.perplexity:
                rows = [(i, t) for i, record in enumerate(batch) for t in reference_texts(record)]
                for part in in_batches(rows, self.batch_size):
                    index = [i for i, _ in part]
                    found = predict.caption_log_likelihood(images[index], [t for _, t in part])
                    sums.append(np.asarray(found[0], np.float64))
                    tokens.append(np.asarray(found[1], np.float64))
            if not self.captions:
                continue
            captions = predict.caption(images)
            if len(captions) != len(batch):
                raise ValueError(f"{len(captions)} captions for {len(batch)} images in {self.name}")
            for image, caption, record in zip(images, captions, batch):
                right, score = self.scorer(caption, record)
                exact.append(right)
                f1.append(score)
                if len(items) < self.num_examples:
                    texts = reference_texts(record)
                    items.append(
                        dict(
                            image=encode_png(image),
                            caption=caption,
                            references=texts[:5],
                            exact=bool(right),
                            f1=float(score),
                        )
                    )
        if not count:
            raise ValueError(f"{self.name} has no record; check the data set and its split")
        self.examples = dict(kind="captioning", items=items)
        if self.perplexity:
            total, length = np.concatenate(sums), np.concatenate(tokens)
            name = f"{self.name}/perplexity"
            for suffix, nats in zip(("", "_low", "_high"), bootstrap(-total, length)):
                yield name + suffix, math.exp(nats)
            yield f"{name}_count", float(len(total))
        if self.captions:
            yield from with_interval(f"{self.name}/exact_match", np.asarray(exact))
            f1_name = "attribute_f1" if self.scorer is score_scene else "word_f1"
            yield from with_interval(f"{self.name}/{f1_name}", np.asarray(f1))
