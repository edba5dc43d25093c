"""Which texts an image keeps: CapFilt (Li et al. 2022) with one model as captioner and filter.

better     the caption of the highest score where that is above the best original's by a margin,
           else the best original; always the original where the alarm says not to trust the model
synthetic  the caption of the highest score
original   the originals
all        the originals and the captions, each text once

Captions with a flag of flags.UNSOUND are taken for want of sound ones alone, and blank ones never.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from coca_jax.evaluation.evaluators import collapse
from coca_jax.evaluation.evaluators.caption_match import canonical_text

# What is wrong with captions, as far as they tell themselves.
#
# cut        no end symbol came within max_new_tokens
# repeats    a word three times in a row, or three words in the same order three times
# duplicate  the image has the same text already
# collapsed  the same text stands at ALIKE or more images and at SHARE of all images of the part
# generic    its score with its own image is not above its mean score with the part's other images
#
# An image that a list names several times, as for each of its texts, is one image.


ALIKE, SHARE = 3, 0.1
UNSOUND = frozenset(("cut", "repeats", "collapsed"))  # such captions are kept for want of others


def repeats(text: str) -> bool:
    """Whether a text goes round and round."""
    words = canonical_text(text).split()
    if any(a == b == c for a, b, c in zip(words, words[1:], words[2:])):
        return True
    threes = collections.Counter(zip(words, words[1:], words[2:]))
    return max(threes.values(), default=0) >= 3


def of_part(
    texts: Sequence[Sequence[str]],
    originals: Sequence[Sequence[str]],
    finished: Sequence[Sequence[bool]],
    images: np.ndarray,
    captions: np.ndarray,
    owners: np.ndarray | None = None,
) -> list[list[list[str]]]:
    """The flags of each caption of each image of a part.

    texts: the captions of each image; originals: what the data say of it; finished: whether the
    end symbol came. images: float32 [N, E], captions: float32 [C, E], all captions one after the
    other, both L2-normalised. owners: int [N], the first that is the same image as each; by default
    all differ.
    """
    plain = [[canonical_text(text) for text in several] for several in texts]
    owners = np.arange(len(images)) if owners is None else owners
    seen = [set[str]() for _ in plain]
    for owner, several in zip(owners, plain):
        seen[owner].update(several)
    held = collections.Counter(itertools.chain.from_iterable(seen))
    own_images = images[np.unique(owners)]
    count = len(own_images)
    enough = max(ALIKE, SHARE * count)
    mean = own_images.mean(0) if count else np.zeros(captions.shape[1:], np.float32)
    found, at = [], 0
    for number, several in enumerate(plain):
        known = {canonical_text(text) for text in originals[number]}
        flags = []
        for place, text in enumerate(several):
            own = float(images[number] @ captions[at])
            others = (float(mean @ captions[at]) * count - own) / max(count - 1, 1)
            wrong = {
                "cut": not finished[number][place],
                "repeats": repeats(text),
                "duplicate": text in known,
                "collapsed": held[text] >= enough,
                "generic": count > 1 and own <= others,
            }
            flags.append([name for name, is_so in wrong.items() if is_so])
            known.add(text)
            at += 1
        found.append(flags)
    return found


# How often a text must fit its own image better than another one, in the model's opinion. Chance is
# 0.5; below this the scores say too little of a text to replace it. An emoji model on photographs
# has 0.55, and half of its captions beat the human ones, by 0.3 and more.
LEAST_MATCH = 0.75

Scored = tuple[str, float]
SEVERAL = ("original", "all")  # rules by which an image may keep several texts


def match(images: np.ndarray, embeddings: np.ndarray, texts: Sequence[str]) -> tuple[float, int]:
    """How well the model matches original texts to their images: for each text the share of the
    images with other texts that it fits less well than its own; their sum and number.

    images, embeddings: float32 [N, E] of different images and of a text of each.
    """
    plain = np.array([canonical_text(text) for text in texts], dtype=object)
    other = plain[:, None] != plain[None, :]  # [image, text]
    scores = images @ embeddings.T
    own = np.diagonal(scores)
    wins = (own > scores) + 0.5 * (own == scores)
    counts = other.sum(0)
    shares = (wins * other).sum(0)[counts > 0] / counts[counts > 0]
    return float(shares.sum()), len(shares)


def warning_of_match(share: float, count: int) -> str:
    """What is wrong with the scores of a model that matches `count` original texts so; '' where
    nothing is, or the texts are too few to tell."""
    if count < collapse.LEAST or share >= LEAST_MATCH:
        return ""
    return (
        "the model hardly matches the original texts to their images: a text fits its own image "
        f"better than another in {share:.0%} of cases (chance 50%, warned of below "
        f"{LEAST_MATCH:.0%})"
    )


def texts(
    result: dict[str, Any], rule: str, margin: float = 0.0, keep: bool = False
) -> list[Scored]:
    """The texts of an image that the rule chooses, with their scores.

    margin, keep: of 'better': by how much a caption must beat the originals; never replace one.
    """
    originals = [(one["text"], one["score"]) for one in result["originals"]]
    written = [one for one in result["captions"] if one["text"].strip()]
    sound = [one for one in written if not UNSOUND & set(one["flags"])]
    captions = [(one["text"], one["score"]) for one in sound or written]
    if rule == "original":
        return originals
    if rule == "all":
        both = originals + (captions if sound or not originals else [])
        return [one for i, one in enumerate(both) if one[0] not in {text for text, _ in both[:i]}]
    best = _best(captions)
    if rule == "synthetic" or not originals:
        return best
    own = _best(originals)
    wins = sound and not keep and best[0][1] > own[0][1] + margin
    return best if wins else own


def _best(found: Sequence[Scored]) -> list[Scored]:
    return sorted(found, key=lambda one: one[1], reverse=True)[:1]


def scores(results: Iterable[dict[str, Any]], rule: str, **how: Any) -> np.ndarray:
    """Of the texts of some images that the rule chooses, float64 [n]; how: as `texts`."""
    found = [score for result in results for _, score in texts(result, rule, **how)]
    return np.array(found, np.float64)


def quantile(scores: np.ndarray, share: float) -> float:
    """The score below which lies `share` of them; minus infinity without scores."""
    return round(float(np.quantile(scores, share)), 6) if len(scores) else float("-inf")
