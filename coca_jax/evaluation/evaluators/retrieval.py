"""Image-text retrieval evaluator: R@1, R@5, R@10, mean recall and median rank in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np

from coca_jax.data.dedup import content_digest
from coca_jax.data.evaluation_data import Records
from coca_jax.evaluation.evaluators import (
    LIKELIHOOD_TIE,
    Predictor,
    Record,
    check_finite,
    encode_texts,
    in_batches,
    record_texts,
    results,
    stack_images,
)
from coca_jax.evaluation.evaluators.base import (
    Evaluator,
    Flag,
    Metric,
    RecordLimit,
    Scale,
    Setting,
    check_apart,
)
from coca_jax.evaluation.evaluators.baselines import among_first
from coca_jax.evaluation.evaluators.inputs import candidates
from coca_jax.evaluation.evaluators.results import POINTS, PictureMap, picture
from coca_jax.evaluation.metrics import querybank
from coca_jax.evaluation.metrics.intervals import (
    median_limits,
    resampled_sums,
    scored,
    share_limits,
)

# Reranking: comparing embeddings is cheap but coarse; the decoder is accurate but slow. So the first
# `count` candidates of each query are reordered by the sum of the contrastive logit, which is
# log p(text | image) within a batch up to a constant, and the captioner's log p(text | image).


_ROWS = 1024  # queries scored at a time


def shortlists(queries: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """The `count` nearest candidates of each query, nearest first; ties are in index order.

    queries, candidates: float32 [N, E], [M, E], unit length. Returns int64 [N, min(count, M)].
    """
    count = min(count, len(candidates))
    lists = []
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ candidates.T
        some = np.sort(np.argpartition(-scores, count - 1, axis=1)[:, :count], axis=1)
        order = np.argsort(-np.take_along_axis(scores, some, 1), axis=1, kind="stable")
        lists.append(np.take_along_axis(some, order, 1))
    return np.concatenate(lists).astype(np.int64)


class PairScores:
    """Scores of distinct image-text pairs.

    Args:
        images: number of images N.
        pairs: int [P, 2], (image, text), in any order and with repeats.
    """

    def __init__(self, images: int, pairs: np.ndarray):
        self._pairs = np.unique(np.asarray(pairs, np.int64).reshape(-1, 2), axis=0)
        self._first = np.searchsorted(self._pairs[:, 0], np.arange(images + 1))
        self._scores = np.zeros(len(self._pairs), np.float32)

    def texts(self, image: int) -> np.ndarray:
        """The texts of an image's pairs, int64, ascending."""
        return self._pairs[self._first[image] : self._first[image + 1], 1]

    def set(self, image: int, scores: np.ndarray) -> None:
        """Stores the scores of `texts(image)`."""
        self._scores[self._first[image] : self._first[image + 1]] = scores

    def get(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """Returns the scores float32 [...] of the known pairs (images[...], texts[...])."""
        width = int(self._pairs[:, 1].max(initial=0)) + 1
        keys = self._pairs[:, 0] * width + self._pairs[:, 1]
        return self._scores[np.searchsorted(keys, images * width + texts)]


def reranked(
    ranks: np.ndarray, lists: np.ndarray, scores: np.ndarray, matches: Sequence[set[int]]
) -> np.ndarray:
    """Returns the rank (0: first) of each query's best match after reranking, int64 [N].

    Ties count against the model.

    Args:
        ranks: int64 [N], ranks before; unchanged for queries without a match in the shortlist.
        lists, scores: [N, K], the shortlist of each query and its scores in nats.
        matches: the matching candidates of each query.
    """
    found = ranks.copy()
    for query, (some, score) in enumerate(zip(lists, scores)):
        right = np.asarray([candidate in matches[query] for candidate in some.tolist()])
        if right.any():
            found[query] = int((~right & (score >= score[right].max() - LIKELIHOOD_TIE)).sum())
    return found


CUTOFFS = (1, 5, 10)
_TITLES = {"image_to_text": "Image to text", "text_to_image": "Text to image"}
_METRICS = (
    {f"{to}_r{k}": Metric(f"{name} R@{k}") for to, name in _TITLES.items() for k in CUTOFFS}
    | {"mean_recall": Metric("Mean recall")}
    | {
        f"{to}_median_rank": Metric(f"{name} median rank", Scale.PLAIN, lower=True)
        for to, name in _TITLES.items()
    }
)
_AGAIN = ("normalised", "reranked")  # additional scores of the same queries
_KEPT_IMAGES = 1_000  # images that the text queries of the report search


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """Embeddings of the distinct images [I, D] and texts [T, D].

    image_of: image index of each record; texts_of: its text indices; pictures: thumbnails of the
    first images.
    """

    images: np.ndarray
    embeddings: np.ndarray
    texts: list[str]
    image_of: list[int]
    texts_of: list[list[int]]
    pictures: list[np.ndarray]

    def matches(self) -> np.ndarray:
        """Image and text index of each caption of each record, int64 [C, 2]."""
        counts = [len(numbers) for numbers in self.texts_of]
        caption = np.concatenate([np.asarray(numbers, np.int64) for numbers in self.texts_of])
        return np.stack([np.repeat(self.image_of, counts), caption], 1)

    def chance(self, matches: np.ndarray) -> dict[str, float]:
        """Expected scores of random ranking, {'image_to_text_r1': ...}. matches: see `matches`."""
        image, text = np.unique(matches, axis=0).T
        texts_of = np.bincount(image, minlength=len(self.images))
        images_of = np.bincount(text, minlength=len(self.texts))
        right = dict(
            image_to_text=(len(self.texts), texts_of[self.image_of]),
            text_to_image=(len(self.images), images_of[matches[:, 1]]),
        )
        return {
            f"{direction}_r{k}": among_first(count, answers, k)
            for direction, (count, answers) in right.items()
            for k in CUTOFFS
        }


class Retrieval(Evaluator):
    """Retrieves the text of an image and the image of a text.

    Equal texts, and images with equal content, are one candidate, because a model cannot
    distinguish copies; every image with the text is a match, and vice versa. Other candidates
    within 1e-6 of the score of the match are ranked above it.

    Args:
      data_name: name of the dataset, the second part of the metric names.
      extra_texts: candidates without an image.
      rerank: number of candidates per query that are reordered by similarity and captioner, for
        additional `reranked_` scores; 0: none.
      bank: records with the queries of a querybank (metrics/querybank.py), for additional
        `normalised_` scores.
      batch_size: images or texts per call of the model.
      chunk: side of a tile of the similarity matrix.
      num_examples: number of queries per direction in the report.
      progress: show progress bars.
    """

    kind, order, title, usual = "retrieval", 30, "Retrieval", True
    needs, programs = "caption", ("encode_image", "encode_text")
    flags = (
        Flag("rerank", 0, "Number of candidates that the captioner reranks (0 = none).", least=0),
        Flag("querybank", "", "Dataset whose train split is used for querybank normalization."),
    )
    options = dict(rerank=RecordLimit, querybank=Mapping[str, Any])
    headlines = ("image_to_text_r1", "text_to_image_r1", "mean_recall")
    metrics = _METRICS | {
        f"{how}_{name}": dataclasses.replace(metric, title=f"{metric.title}, {how}")
        for how in _AGAIN
        for name, metric in _METRICS.items()
    }

    def __init__(
        self,
        data_name: str,
        *,
        extra_texts: Sequence[str] = (),
        rerank: int = 0,
        bank: Iterable[Record] | None = None,
        batch_size: int = 256,
        chunk: int = 4096,
        num_examples: int = 8,
        progress: bool = False,
    ):
        super().__init__(data_name)
        self.extra_texts, self.rerank, self.bank = list(extra_texts), rerank, bank
        self.batch_size, self.chunk, self.num_examples = batch_size, chunk, num_examples
        self.progress = progress

    @classmethod
    def from_flags(cls, task: dict[str, Any], flags: Any) -> None:
        """Reads --rerank and --querybank."""
        super().from_flags(task, flags)
        if flags.rerank:
            task["rerank"] = flags.rerank
        if flags.querybank:
            fields = {k: v for k, v in task["data"].items() if k.endswith("_field")}
            task["querybank"] = dict(fields, path=flags.querybank)

    @classmethod
    def bank_data(cls, task: Mapping[str, Any]) -> dict[str, Any]:
        """The data entry of a task's querybank; {} if it has none."""
        given = task.get("querybank")
        return dict(dict(split="train", kind=cls.needs), **given) if given else {}

    @classmethod
    def more_data(cls, task: Mapping[str, Any]) -> list[dict[str, Any]]:
        bank = cls.bank_data(task)
        return super().more_data(task) + ([bank] if bank else [])

    @classmethod
    def check_data(cls, task: Mapping[str, Any]) -> None:
        """Raises ValueError if the querybank contains the test data."""
        if bank := cls.bank_data(task):
            check_apart(task, bank, "the querybank")

    @classmethod
    def check_model(cls, model: Any, task: Mapping[str, Any]) -> None:
        """Raises ValueError for reranking with a model without a captioner."""
        super().check_model(model, task)
        if task.get("rerank") and not hasattr(model, "score_some"):
            raise ValueError(
                f"task {cls.kind!r}: rerank={task['rerank']} needs a captioner, which this model "
                "does not have. Remove rerank."
            )

    @classmethod
    def from_task(cls, task: Mapping[str, Any], setting: Setting) -> Retrieval:
        """Options of a task: candidates (data entry whose texts are additional candidates), rerank,
        querybank (data entry)."""
        how = dict(setting.common(), extra_texts=candidates(task), rerank=task.get("rerank", 0))
        data = cls.bank_data(task)
        bank = Records(data, need=cls.needs) if data else None
        made = cls(task["name"], bank=bank, **how)
        made.further = (bank,) if bank else ()
        return made

    def run(self, predict: Predictor, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields image_to_text_r1, ..., text_to_image_r1, ..., mean_recall and median ranks, with
        intervals and chance; with `bank` and `rerank` also with the prefixes `normalised_` and
        `reranked_`.

        A record needs `image` and `text`: one or more captions, all of which match; a record
        without a caption raises ValueError. Every record is an image-to-text query, and every
        caption of every record a text-to-image query. The bootstrap resamples images, because the
        captions of an image are not independent. Reranking reads the records twice. Sets
        `examples`.
        """
        from coca_jax.evaluation.metrics.ranking import retrieval_ranks  # slow: imports JAX

        if self.rerank:
            records = records if isinstance(records, Sized) else list(records)
        found = self._encode(predict, records, self.extra_texts)
        matches = found.matches()
        ranks = retrieval_ranks(found.images, found.embeddings, matches, chunk=self.chunk)
        self.examples = results.examples(
            found.images, found.pictures, found.texts, found.embeddings, matches, self.num_examples
        )
        self.examples |= dict(map=self._map(found, matches, ranks[0] < 1))
        yield from self._metrics("", ranks, found, matches)
        if self.bank is not None:
            without_hubs = self._normalised(predict, found, matches)
            yield from self._metrics("normalised_", without_hubs, found, matches)
        if self.rerank:
            ranks = self._reranked(predict, records, found, matches, ranks)
            yield from self._metrics("reranked_", ranks, found, matches)
        yield f"{self.name}/num_images", float(len(found.images))
        yield f"{self.name}/num_texts", float(len(found.texts))

    def _normalised(
        self, predict: Predictor, found: _Encoded, matches: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ranks of each image and each text after querybank normalization."""
        from coca_jax.evaluation.metrics.ranking import retrieval_ranks

        bank, scale = self._encode(predict, self.bank, title=" querybank"), predict.scale
        to_text = querybank.normalised(found.images, found.embeddings, bank.images, scale)
        to_image = querybank.normalised(found.embeddings, found.images, bank.embeddings, scale)
        return (
            retrieval_ranks(*to_text, matches, chunk=self.chunk)[0],
            retrieval_ranks(*to_image[::-1], matches, chunk=self.chunk)[1],
        )

    def _reranked(
        self,
        predict: Predictor,
        records: Iterable[Record],
        found: _Encoded,
        matches: np.ndarray,
        ranks: tuple[np.ndarray, np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ranks of each image and each text after reranking."""
        texts = shortlists(found.images, found.embeddings, self.rerank)
        images = shortlists(found.embeddings, found.images, self.rerank)
        number = len(found.images)
        by_image = np.stack([np.repeat(np.arange(number), texts.shape[1]), texts.ravel()], 1)
        by_text = np.stack([images.ravel(), np.repeat(np.arange(len(images)), images.shape[1])], 1)
        pairs = PairScores(number, np.concatenate([by_image, by_text]))
        show = f"{self.name} reranked images" if self.progress else ""
        done, image_of = 0, iter(found.image_of)
        for batch in in_batches(records, self.batch_size, show=show):
            new: list[Record] = []
            for record in batch:
                if next(image_of) == done + len(new):  # the first record of its image
                    new.append(record)
            if new:
                chosen = [pairs.texts(done + i) for i in range(len(new))]
                scores = predict.score_some(stack_images(new), found.texts, chosen)
                for i, score in enumerate(scores):
                    check_finite(score, f"caption likelihoods of {self.name}")
                    similar = found.embeddings[chosen[i]] @ found.images[done + i]
                    pairs.set(done + i, score + predict.scale * similar)
            done += len(new)
        texts_of: list[set[int]] = [set() for _ in range(number)]
        images_of: list[set[int]] = [set() for _ in found.texts]
        for i, t in matches.tolist():
            texts_of[i].add(t)
            images_of[t].add(i)
        of_images = pairs.get(np.arange(number)[:, None], texts)
        of_texts = pairs.get(images, np.arange(len(images))[:, None])
        return (
            reranked(ranks[0], texts, of_images, texts_of),
            reranked(ranks[1], images, of_texts, images_of),
        )

    def _encode(
        self,
        predict: Predictor,
        records: Iterable[Record],
        extra: Sequence[str] = (),
        title: str = "",
    ) -> _Encoded:
        """Encodes each distinct image and text once, and the extra texts. title: suffix of the
        name in progress bars."""
        show = f"{self.name}{title}" if self.progress else ""
        text_numbers: dict[str, int] = {}
        image_numbers: dict[bytes, int] = {}
        image_of: list[int] = []
        texts_of: list[list[int]] = []
        parts: list[np.ndarray] = []
        pictures: list[np.ndarray] = []
        for batch in in_batches(records, self.batch_size, show=show and f"{show} images"):
            new: list[Record] = []
            for record in batch:
                texts = record_texts(record, self.name)
                texts_of.append([text_numbers.setdefault(t, len(text_numbers)) for t in texts])
                digest = content_digest(record["image"])
                if digest not in image_numbers:
                    image_numbers[digest] = len(image_numbers)
                    new.append(record)
                image_of.append(image_numbers[digest])
            if new:
                parts.append(np.asarray(predict.encode_image(stack_images(new)), np.float32))
            for record in new[: max(_KEPT_IMAGES - len(pictures), 0)]:
                pictures.append(picture(record["image"]))
        if not image_of:
            raise ValueError(f"{self.name}: no records. Check the dataset and its split.")
        for text in extra:
            text_numbers.setdefault(text, len(text_numbers))
        texts, named = list(text_numbers), show and f"{show} texts"
        images = check_finite(np.concatenate(parts), "image embeddings")
        embeddings = encode_texts(predict, texts, self.batch_size, show=named)
        return _Encoded(images, embeddings, texts, image_of, texts_of, pictures)

    def _metrics(
        self,
        prefix: str,
        ranks: tuple[np.ndarray, np.ndarray],
        found: _Encoded,
        matches: np.ndarray,
    ) -> Iterator[tuple[str, float]]:
        """Yields the metrics of the ranks of each image and each text. prefix: of their names."""
        image_of, size = np.asarray(found.image_of), len(found.images)
        by_direction = dict(  # (rank, image) of each query
            image_to_text=(ranks[0][image_of], image_of),
            text_to_image=(ranks[1][matches[:, 1]], matches[:, 0]),
        )
        # Per image: hits at each cutoff in each direction, and the number of queries  [I, 8]
        hits = np.stack(
            [
                np.bincount(owner, places < k, minlength=size)
                for places, owner in by_direction.values()
                for k in CUTOFFS
            ],
            1,
        )
        asked = [np.bincount(owner, minlength=size) for _, owner in by_direction.values()]
        stats = np.concatenate([hits, np.stack(asked, 1)], 1)
        drawn = resampled_sums(stats)
        shares = [
            np.concatenate([s[:, :3] / s[:, 6:7], s[:, 3:6] / s[:, 7:8]], 1)
            for s in (stats.sum(0, keepdims=True), drawn)
        ]
        names = [f"{prefix}{direction}_r{k}" for direction in by_direction for k in CUTOFFS]
        queries = [len(image_of)] * 3 + [len(matches)] * 3
        for column, (metric, number) in enumerate(zip(names, queries)):
            value = shares[0][0, column]
            interval = share_limits(shares[1][:, column], value, size)
            yield from scored(f"{self.name}/{metric}", value, interval, number)
        chance = found.chance(matches)
        chance["mean_recall"] = float(np.mean(list(chance.values())))
        for metric, share in chance.items():
            yield f"{self.name}/{prefix}{metric}_chance", share
        for direction, (places, owner) in by_direction.items():
            low, high = median_limits(places, owner)
            metric = f"{self.name}/{prefix}{direction}_median_rank"
            yield from scored(metric, np.median(places) + 1, (low + 1, high + 1), len(places))
        mean, means = shares[0].mean(), shares[1].mean(1)
        interval = share_limits(means, mean, size)
        yield from scored(f"{self.name}/{prefix}mean_recall", mean, interval, sum(queries) // 3)

    def _map(self, found: _Encoded, matches: np.ndarray, right: np.ndarray) -> dict[str, Any]:
        """The embedding map of the images. right: bool [I], whether the top text matches."""
        first_text = dict(reversed(matches.tolist()))
        texts = [found.texts[first_text[i]] for i in range(len(found.pictures))]
        made = PictureMap(POINTS if self.num_examples else 0)
        made.add(found.pictures, found.images, texts, right.tolist())
        return made.found()
