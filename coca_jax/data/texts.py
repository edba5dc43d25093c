"""Which text an example trains on: draws by (seed, source, position), without TensorFlow."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from coca_jax.data import order

# What a draw is for: keeps the choices made for one example independent of one another.
CAPTION, PROMPT, LABELS, AUGMENT, CLASS, FRAMES = range(1, 7)
# Between a question and its answer in one text: the head sees what is before it.
ANSWER = "\x1f"


def draw_keys(seed: int, source: int, positions: np.ndarray, purpose: int) -> np.ndarray:
    """uint64 [n]: a key for each position of a source's stream and each purpose."""
    return order.key(seed, source, positions, purpose)


def choose_captions(
    texts: Sequence[Sequence[str]], seed: int, source: int, positions: np.ndarray
) -> list[str]:
    """One caption of each image, another one at each visit."""
    draw = order.uniform(draw_keys(seed, source, positions, CAPTION), 1)[:, 0]
    return [choice[int(u * len(choice))] for choice, u in zip(texts, draw)]


def label_texts(
    labels: Sequence[Sequence[str]],
    prompts: Sequence[str],
    seed: int,
    source: int,
    positions: np.ndarray,
) -> tuple[list[str], list[str]]:
    """Labels as text, as in the paper: all names, shuffled and joined, behind a sampled prompt.

    Returns:
        The texts ("a photo of the cat, animal"), and what tells equal labels: the sorted names.
    """
    draw = order.uniform(draw_keys(seed, source, positions, PROMPT), 1)[:, 0]
    chosen = (draw * len(prompts)).astype(int)
    most = max(map(len, labels), default=0)
    shuffle = order.uniform(draw_keys(seed, source, positions, LABELS), max(most, 1)).tolist()
    texts, canonical = [], []
    for names, prompt, ranks in zip(labels, chosen, shuffle):
        shuffled = [name for _, name in sorted(zip(ranks, names))]
        texts.append(prompts[prompt].replace("{}", ", ".join(shuffled)))
        canonical.append("\0".join(sorted(names)))
    return texts, canonical


def choose_labels(
    labels: Sequence[Sequence[str]],
    classes: Mapping[str, int],
    seed: int,
    source: int,
    positions: np.ndarray,
) -> list[str]:
    """One label of each record, another one at each visit: of those that are classes if any are.
    '' for a record without labels."""
    draw = order.uniform(draw_keys(seed, source, positions, CLASS), 1)[:, 0]
    known = [[name for name in names if name in classes] or names for names in labels]
    return [names[int(u * len(names))] if names else "" for names, u in zip(known, draw)]


def text_hash(text: str) -> int:
    """64 bits that tell texts apart, as a signed integer."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
