"""Which texts an image keeps: CapFilt (Li et al. 2022) with one model as captioner and filter.

better     the one of the highest score, among the originals and the captions
synthetic  the caption of the highest score
original   the originals
all        the originals and the captions, each text once

Captions with a flag of flags.UNSOUND are taken for want of sound ones alone, and blank ones never.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from coca_jax.recaptioning import flags

Scored = tuple[str, float]
SEVERAL = ("original", "all")  # rules by which an image may keep several texts


def texts(result: dict[str, Any], rule: str) -> list[Scored]:
    """The texts of an image that the rule chooses, with their scores."""
    originals = [(one["text"], one["score"]) for one in result["originals"]]
    written = [one for one in result["captions"] if one["text"].strip()]
    sound = [one for one in written if not flags.UNSOUND & set(one["flags"])]
    captions = [(one["text"], one["score"]) for one in sound or written]
    if rule == "original":
        return originals
    if rule == "all":
        both = originals + (captions if sound or not originals else [])
        return [one for i, one in enumerate(both) if one[0] not in {text for text, _ in both[:i]}]
    pool = captions if rule == "synthetic" else originals + (captions if sound else [])
    return sorted(pool or captions, key=lambda one: one[1], reverse=True)[:1]


def kept(result: dict[str, Any], rule: str, threshold: float) -> list[Scored]:
    """Those at or above the threshold."""
    return [one for one in texts(result, rule) if one[1] >= threshold]


def scores(results: Iterable[dict[str, Any]], rule: str) -> np.ndarray:
    """Of the texts of some images that the rule chooses, float64 [n]."""
    return np.array([score for result in results for _, score in texts(result, rule)], np.float64)


def quantile(scores: np.ndarray, share: float) -> float:
    """The score below which lies `share` of them; minus infinity without scores."""
    return round(float(np.quantile(scores, share)), 6) if len(scores) else float("-inf")
