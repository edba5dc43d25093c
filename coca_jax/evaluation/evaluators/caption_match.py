"""Compares a caption or an answer with its references, or with a synthetic scene."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from coca_jax.evaluation.evaluators import Record, record_texts

Scorer = Callable[[str, Record], tuple[bool, float]]

VOICES = 4  # minimum number of answers for `vqa_accuracy` to reach 1
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}


def canonical_text(text: str) -> str:
    """Returns the text in NFC and lower case, without punctuation and symbols, with single spaces.
    A text of symbols only (such as an emoji) keeps them."""
    lower = unicodedata.normalize("NFC", text).lower()
    found = "".join(_letters(lower) if not lower.isascii() else re.sub(r"[^\w\s]", " ", lower))
    return " ".join(found.split()) or " ".join(lower.split())


def _letters(text: str) -> Iterator[str]:
    """Yields letters, digits and their combining marks (such as Hindi vowels); spaces for the rest."""
    last = " "
    for letter in text:
        kind = unicodedata.category(letter)
        if kind == "Cf":  # invisible format characters such as joiners
            continue
        last = (
            letter if kind[0] in "LN" or letter == "_" or (kind[0] == "M" and last != " ") else " "
        )
        yield last


def score_scene(caption: str, record: Record) -> tuple[bool, float]:
    """Returns (all attributes correct, attribute F1) for a synthetic scene (data/scenes.py)."""
    from coca_jax.data import scenes

    return scenes.score_caption(caption, record["scene"])


def score_references(caption: str, record: Record) -> tuple[bool, float]:
    """Returns (equal to a reference, best word F1 over the references) after `canonical_text`."""
    words = canonical_text(caption)
    references = [canonical_text(text) for text in record_texts(record, "captioning")]
    return words in references, max(_word_f1(words.split(), r.split()) for r in references)


def _word_f1(words: list[str], wanted: list[str]) -> float:
    common = sum(min(words.count(word), wanted.count(word)) for word in set(words))
    return 2 * common / (len(words) + len(wanted)) if words or wanted else 1.0


def vqa_accuracy(output: str, answers: Sequence[str]) -> float:
    """Returns the VQA accuracy (Antol et al. 2015): min(matching answers / 3, 1), averaged over all
    subsets that leave out one of the `answers`. With ten answers, 1, 2, 3 and more matches score
    0.3, 0.6, 0.9 and 1.

    As in the VQA code, answers are compared without articles and apostrophes, with number words as
    digits.
    """
    given = _plain_answer(output)
    # Leaving out a matching answer leaves agree - 1 matches; leaving out another one, agree.
    count, agree = len(answers), sum(_plain_answer(answer) == given for answer in answers)
    without_one = agree * min(max(agree - 1, 0) / 3, 1.0)
    return (without_one + (count - agree) * min(agree / 3, 1.0)) / count


def _plain_answer(text: str) -> str:
    text = re.sub(r"['\u2019]|(?<=\d),(?=\d)", "", text)
    words = canonical_text(text).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)
