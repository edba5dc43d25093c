"""What is wrong with captions, as far as they tell themselves.

cut        no end symbol came within max_tokens
repeats    a word three times in a row, or three words in the same order three times
duplicate  the image has the same text already
collapsed  the same text stands at ALIKE or more images and at SHARE of all images of the part
generic    its score with its own image is not above its mean score with the part's other images

An image that a list names several times, as for each of its texts, is one image.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence

import numpy as np

from coca_jax.evaluators.caption_match import canonical_text

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
    said = [set[str]() for _ in plain]
    for owner, several in zip(owners, plain):
        said[owner].update(several)
    held = collections.Counter(itertools.chain.from_iterable(said))
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
