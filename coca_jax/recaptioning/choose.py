"""Which texts an image keeps: CapFilt (Li et al. 2022) with one model as captioner and filter.

better     the caption of the highest score where that is above the best original's by a margin,
           else the best original; always the original where the alarm says not to trust the model
synthetic  the caption of the highest score
original   the originals
all        the originals and the captions, each text once

Captions with a flag of flags.UNSOUND are taken for want of sound ones alone, and blank ones never.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from coca_jax.evaluators import collapse
from coca_jax.evaluators.caption_match import canonical_text
from coca_jax.recaptioning import flags

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
    sound = [one for one in written if not flags.UNSOUND & set(one["flags"])]
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
