"""Which text an example trains on, drawn by (seed, source, position), and its tokens."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from coca_jax.config import Entry
from coca_jax.data import order
from coca_jax.data.sources.source import Source, read_all

# What a draw is for: keeps the choices made for one example independent of one another. Kinds of
# sources that choose otherwise count on from here (kinds.py).
CAPTION, PROMPT, LABELS, AUGMENT, CLASS, FRAMES, FIXED = range(1, 8)
# Between a question and its answer in one text: the head sees what is before it.
ANSWER = "\x1f"
SCORE_SCALE = 0.05  # cosine by which a text has to be better to be drawn e times as often
_CACHED_TEXTS = 50_000  # about 1 KB each
_AT_ONCE = 256  # records


class Draw(NamedTuple):
    """The random choices of n examples: functions of where they stand, and of nothing else.

    Attributes:
        seed: of the run.
        source: number of the source in config.data.sources, one or int [n].
        positions: int64 [n], places in the source's endless stream.
    """

    seed: int
    source: int | np.ndarray
    positions: np.ndarray

    def keys(self, purpose: int) -> np.ndarray:
        """uint64 [n]: a key for each position and each purpose (CAPTION, PROMPT, ...)."""
        return order.key(self.seed, self.source, self.positions, purpose)

    def uniform(self, purpose: int, count: int = 1) -> np.ndarray:
        """float64 [n, count] in [0, 1)."""
        return order.uniform(self.keys(purpose), count)


def choose_captions(captions: Sequence[Sequence[str]], draw: Draw) -> list[str]:
    """One caption of each image, another one at each visit."""
    place = draw.uniform(CAPTION)[:, 0]
    return [choice[int(u * len(choice))] for choice, u in zip(captions, place)]


def choose_scored(
    captions: Sequence[Sequence[str]],
    extras: Sequence[str],
    synthetic: float,
    draw: Draw,
) -> list[str]:
    """One text of each image, another one at each visit: with probability `synthetic` one of its
    captions, else an original text (where it has both), by softmax(score / SCORE_SCALE) in either.

    extras: the JSON that `recaption` wrote with each image: the texts of its `originals`, and the
    `scores` of all texts that it kept. An image without them has its texts drawn alike.
    """
    chosen = []
    for choice, extra, (which, place) in zip(captions, extras, draw.uniform(CAPTION, 2)):
        made = made_of(extra)
        if made is None or len(made["scores"]) != len(choice):
            chosen.append(choice[int(place * len(choice))])
            continue
        known = {one["text"] for one in made["originals"]}
        original = np.array([text in known for text in choice])
        scores = np.asarray(made["scores"], np.float64) / SCORE_SCALE
        weights = np.exp(scores - scores.max())
        if original.any() and not original.all():
            group = original == (which >= synthetic)
            weights = np.where(group, np.exp(scores - scores[group].max()), 0.0)
        passed = np.cumsum(weights) > place * weights.sum()
        chosen.append(choice[int(np.argmax(passed))])
    return chosen


def made_of(extra: str) -> dict[str, Any] | None:
    """What `recaption` wrote into an image's JSON: the `scores` of the texts that it keeps, its
    `originals` and more; None where it has not been there."""
    made = json.loads(extra).get("recaption") if "recaption" in extra else None
    lists = isinstance(made, dict) and all(
        isinstance(made.get(name), list) for name in ("scores", "originals")
    )
    return made if lists else None  # else a field of the data's own


def check_scores(sources: Sequence[Source], entries: Sequence[Entry]) -> None:
    """Raises ValueError for a source of captions='scored' whose records have no scores, or those of
    other texts than are read: they would be drawn alike, whatever `synthetic` says. Reads texts
    until it finds scores, and judges by that block. entries: of the sources."""
    for source, entry in zip(sources, entries):
        if entry.captions == "scored" and entry.path and not _has_scores(source):
            raise ValueError(
                f"data source {source.name}: captions='scored', and its records have no scores of "
                "the texts that are read; give what `coca-jax recaption --to=array_record` wrote "
                "(of its tars with text_field='texts'), or leave captions out"
            )


def _has_scores(source: Source) -> bool:
    for start in range(0, len(source), _AT_ONCE):
        rows = np.arange(start, min(start + _AT_ONCE, len(source)))
        records, unread = read_all(source, rows, texts=True)
        read = [one for row, one in enumerate(records) if row not in unread and one.texts]
        known = [(one, made) for one in read if (made := made_of(one.extra))]
        if known:
            # An image may keep a single text, whose score is that of the only one that is read.
            fits = [len(made["scores"]) == len(one.texts) for one, made in known]
            several = any(ok and len(one.texts) > 1 for ok, (one, _) in zip(fits, known))
            return several or all(fits)
    return False


def label_texts(
    labels: Sequence[Sequence[str]], prompts: Sequence[str], draw: Draw
) -> tuple[list[str], list[str]]:
    """Labels as text, as in the paper: all names, shuffled and joined, behind a sampled prompt.

    Returns:
        The texts ("a photo of the cat, animal"), and what tells equal labels: the sorted names.
    """
    chosen = (draw.uniform(PROMPT)[:, 0] * len(prompts)).astype(int)
    most = max(map(len, labels), default=0)
    shuffle = draw.uniform(LABELS, max(most, 1)).tolist()
    texts, canonical = [], []
    for names, prompt, ranks in zip(labels, chosen, shuffle):
        shuffled = [name for _, name in sorted(zip(ranks, names))]
        texts.append(prompts[prompt].replace("{}", ", ".join(shuffled)))
        canonical.append("\0".join(sorted(names)))
    return texts, canonical


def choose_labels(
    labels: Sequence[Sequence[str]], classes: Mapping[str, int], draw: Draw
) -> list[str]:
    """One label of each record, another one at each visit: of those that are classes if any are.
    '' for a record without labels."""
    place = draw.uniform(CLASS)[:, 0]
    known = [[name for name in names if name in classes] or names for names in labels]
    return [names[int(u * len(names))] if names else "" for names, u in zip(known, place)]


def text_hash(text: str) -> int:
    """64 bits that tell texts apart, as a signed integer."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Tokenizer:
    """Tokenises each text once: rows of equal texts come from memory. Thread-safe.

    encode: texts -> tokens int32 [n, L], text_valid bool [n, L], prompt_len int32 [n].
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray, np.ndarray]]
    ):
        self._encode = encode
        self._rows: dict[str, tuple[np.ndarray, np.ndarray, np.integer]] = {}
        self._hashes: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str], canonical: Sequence[str]) -> dict[str, np.ndarray]:
        """Texts, and what tells equal ones, -> tokens int32 [n, L], text_valid bool [n, L],
        text_id int32 [n, 2], prompt_len int32 [n]."""
        with self._lock:
            new = list(dict.fromkeys(text for text in texts if text not in self._rows))
            if len(self._rows) + len(new) > _CACHED_TEXTS:
                self._rows.clear()
                new = list(dict.fromkeys(texts))
            if new:
                self._rows.update(zip(new, zip(*self._encode(new))))
            if len(self._hashes) > _CACHED_TEXTS:
                self._hashes.clear()
            for text in canonical:
                if text not in self._hashes:
                    self._hashes[text] = text_hash(text)
            found = [self._rows[text] for text in texts]
            hashes = np.array([self._hashes[text] for text in canonical], np.int64)
        tokens, valid, prompt_len = (np.stack(rows) for rows in zip(*found))
        text_id = hashes.view(np.int32).reshape(-1, 2)
        return dict(tokens=tokens, text_valid=valid, text_id=text_id, prompt_len=prompt_len)
