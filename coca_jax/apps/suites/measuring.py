"""What a model says of every example of a data set: the outcome that metrics.py counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from coca_jax.apps.suites import linear_probe, metrics
from coca_jax.apps.suites.folders import Folder
from coca_jax.data import dedup
from coca_jax.evaluation.evaluators import Predictor, check_finite, encode_texts, in_batches
from coca_jax.evaluation.evaluators.zero_shot import class_embeddings, normalise

Outcome = dict[str, np.ndarray]


def measure(model: Predictor, folder: Folder, *, batch_size: int, show: str = "") -> Outcome:
    """The outcome of a data set: arrays with an example a row. show: title of progress bars.

    Raises ValueError for a damaged or empty set, or embeddings or likelihoods that are not
    finite.
    """
    by_kind: dict[str, Callable[..., Outcome]] = dict(
        retrieval=_retrieval, selection=_selection, classification=_classes, multilabel=_classes
    )
    if next(folder.examples(), None) is None:
        raise ValueError(f"{folder.path} [{folder.split}] has no example")
    return by_kind[folder.kind](model, folder, batch_size, show)


def _embed(model: Predictor, batch: Sequence[Mapping[str, Any]]) -> np.ndarray:
    found = np.asarray(model.encode_image([one["image"] for one in batch]), np.float32)
    return check_finite(found, "image embeddings")


def probe(model: Predictor, folder: Folder, *, batch_size: int, show: str = "") -> Outcome:
    """`target` and `lp_guess` of a classification set with a split 'train': what CLIP_benchmark's
    linear probe guesses."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for split in ("train", folder.split):
        parts: list[np.ndarray] = []
        labels: list[int] = []
        title = show and f"{show} {split}"
        for batch in in_batches(folder.examples(split), batch_size, show=title):
            parts.append(normalise(_embed(model, batch)))
            labels += [one["target"] for one in batch]
        found[split] = np.concatenate(parts), np.asarray(labels)
    features, target = found[folder.split]
    return dict(target=target, lp_guess=linear_probe.guesses(*found["train"], features))


def _classes(model: Predictor, folder: Folder, size: int, show: str) -> Outcome:
    title = show and f"{show} texts"
    classes = class_embeddings(model, folder.class_names, folder.prompts, size, show=title)
    scores, target, group = [], [], []
    for batch in in_batches(folder.examples(), size, show=show and f"{show} images"):
        scores.append(normalise(_embed(model, batch)) @ classes.T)
        target += [one["target"] for one in batch]
        group += [one.get("group") for one in batch]
    if folder.kind == "multilabel":
        targets = np.stack(target)
        if targets.shape[1] != len(classes):
            raise ValueError(
                f"{folder.path}: rows of {targets.shape[1]} labels, and {len(classes)} class names"
            )
        return dict(scores=np.concatenate(scores), targets=targets)
    found = metrics.of_classes(np.concatenate(scores), np.asarray(target))
    return found if all(one is None for one in group) else dict(found, group=numbered(group))


def numbered(groups: Sequence[Any]) -> np.ndarray:
    """Names or numbers of groups as int [N]: names in their order, -1 for None."""
    if all(isinstance(one, int) for one in groups):
        return np.asarray(groups)
    names = sorted({str(one) for one in groups if one is not None})
    return np.asarray([-1 if one is None else names.index(str(one)) for one in groups])


def _retrieval(model: Predictor, folder: Folder, size: int, show: str) -> Outcome:
    images: list[np.ndarray] = []
    texts: list[str] = []
    image_of: list[int] = []
    numbers: dict[Any, int] = {}
    for batch in in_batches(folder.examples(), size, show=show and f"{show} images"):
        new = []
        for one in batch:
            # A list may name an image once a caption; an example of a tar is an image by itself.
            plain = folder.layout == "plain"
            image = dedup.content_digest(one["image"]) if plain else len(numbers)
            if image not in numbers:
                new.append(one)
            number = numbers.setdefault(image, len(numbers))
            texts += one["texts"]
            image_of += [number] * len(one["texts"])
        if new:
            images.append(_embed(model, new))
    found = normalise(np.concatenate(images))
    embeddings = normalise(encode_texts(model, texts, size, show=show and f"{show} texts"))
    return metrics.of_retrieval(found, embeddings, np.asarray(image_of))


def _selection(model: Predictor, folder: Folder, size: int, show: str) -> Outcome:
    """Right or not, of each pair: by embeddings and, of a model that writes captions, by how
    likely each text is for each image; `image`, int, whose example each is."""
    rows: dict[str, list[float]] = {}
    digests: list[bytes] = []
    for batch in in_batches(folder.examples(), max(size // 4, 1), show=show):
        digests += [one["of"] for one in batch if "of" in one]
        for name, values in _of_pairs(model, batch).items():
            rows.setdefault(name, []).extend(values)
    if max(rows.get("candidates", [metrics.MANY])) < metrics.MANY:  # a figure of none
        del rows["candidates"]
    found = {name: np.asarray(values) for name, values in rows.items()}
    return found | (dict(image=dedup.numbered(digests)) if digests else {})


def _of_pairs(model: Predictor, batch: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    images = [image for one in batch for image in one["images"]]
    texts = [text for one in batch for text in one.get("texts") or [cue_prompt(one["cue"])]]
    by_image = check_finite(np.asarray(model.encode_image(images), np.float32), "image embeddings")
    by_text = check_finite(np.asarray(model.encode_text(texts), np.float32), "text embeddings")
    tables, i, t = [], 0, 0
    for one in batch:
        n, m = len(one["images"]), len(one.get("texts") or [1])
        tables.append(by_image[i : i + n] @ by_text[t : t + m].T)
        i, t = i + n, t + m
    if "cue" in batch[0]:
        scores = [_jaccard(x[:, 0], one["right"]) for x, one in zip(tables, batch)]
        return dict(jaccard=scores, candidates=[float(len(x)) for x in tables])
    found = chosen(tables)
    if hasattr(model, "caption_log_likelihood"):
        likely = chosen(_likelihoods(model, batch))
        found |= {f"likelihood_{name}": values for name, values in likely.items()}
    return found


def _likelihoods(model: Predictor, batch: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    pairs = [(image, text) for one in batch for image in one["images"] for text in one["texts"]]
    sums, _ = model.caption_log_likelihood([image for image, _ in pairs], [t for _, t in pairs])
    sums = check_finite(np.asarray(sums), "caption likelihoods")
    tables, start = [], 0
    for one in batch:
        shape = (len(one["images"]), len(one["texts"]))
        tables.append(sums[start : start + shape[0] * shape[1]].reshape(shape))
        start += shape[0] * shape[1]
    return tables


def chosen(tables: Iterable[np.ndarray]) -> dict[str, list[float]]:
    """Of tables [images, texts], where image i belongs to text i: whether every image chooses its
    text (`text_acc`), every text its image (`image_acc`), both (`acc`). Winoground's text, image
    and group score (Thrush et al. 2022); of one image and two texts SugarCrepe's accuracy. To be
    chosen is to score more than every other: what a model cannot tell apart it does not choose."""
    found: dict[str, list[float]] = dict(image_acc=[], text_acc=[], acc=[])
    for table in tables:
        own, count = np.diagonal(table), min(table.shape)
        others = table.copy()
        np.fill_diagonal(others, -np.inf)
        text = bool((own > others[:count].max(1)).all())
        image = bool((own > others[:, :count].max(0)).all())
        for name, value in dict(image_acc=image, text_acc=text, acc=image and text).items():
            found[name].append(float(value))
    return found


def cue_prompt(cue: str) -> str:
    """The text of a cue of WinoGAViL (Bitton et al. 2022) as DataComp writes it: 'A dog', 'An
    apple'."""
    cue = cue.lower()
    return f"{'An' if cue[:1] in tuple('aeiou') else 'A'} {cue}"


def _jaccard(scores: np.ndarray, right: Sequence[int]) -> float:
    """Of the as many best images as there are right ones: those shared with the right ones, over
    all of both."""
    best = set(np.argsort(-scores, kind="stable")[: len(right)].tolist())
    return len(best & set(right)) / max(len(best | set(right)), 1)
