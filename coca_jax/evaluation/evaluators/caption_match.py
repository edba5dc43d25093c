"""Whether a caption says what it should: as one of its references does, or of what was drawn."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from coca_jax.evaluation.evaluators import Record, record_texts

Scorer = Callable[[str, Record], tuple[bool, float]]

VOICES = 4  # answers from which on `vqa_accuracy` can be 1
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}


def canonical_text(text: str) -> str:
    """Returns the text in lower case, without punctuation and symbols, with single spaces; of one
    of these alone, such as an emoji, nothing is left out. Equal letters are equal however they are
    composed, and marks on letters, as vowels of Hindi are, stay."""
    whole = unicodedata.normalize("NFC", text).lower()
    found = "".join(_letters(whole) if not whole.isascii() else re.sub(r"[^\w\s]", " ", whole))
    return " ".join(found.split()) or " ".join(whole.split())


def _letters(text: str) -> Iterator[str]:
    """Letters, numbers and the marks on them; a space in place of anything else."""
    last = " "
    for letter in text:
        kind = unicodedata.category(letter)
        if kind == "Cf":  # as what joins letters, which is not seen
            continue
        last = (
            letter if kind[0] in "LN" or letter == "_" or (kind[0] == "M" and last != " ") else " "
        )
        yield last


def score_scene(caption: str, record: Record) -> tuple[bool, float]:
    """Returns (all attributes right, attribute F1) for a drawn scene (data/scenes.py)."""
    from coca_jax.data import scenes

    return scenes.score_caption(caption, record["scene"])


def score_references(caption: str, record: Record) -> tuple[bool, float]:
    """Returns (equal to a reference, best F1 of words), both after `canonical_text`."""
    words = canonical_text(caption)
    references = [canonical_text(text) for text in record_texts(record, "captioning")]
    return words in references, max(_word_f1(words.split(), r.split()) for r in references)


def _word_f1(words: list[str], wanted: list[str]) -> float:
    common = sum(min(words.count(word), wanted.count(word)) for word in set(words))
    return 2 * common / (len(words) + len(wanted)) if words or wanted else 1.0


def vqa_accuracy(output: str, answers: Sequence[str]) -> float:
    """Returns the accuracy of VQA (Antol et al. 2015): an answer that three of the others' gave is
    right, that of fewer by a third each; the mean over leaving out one of the `answers`, one or
    more, at a time. Of ten: 0.3, 0.6, 0.9 and 1 where one, two, three and more gave it.

    Answers are compared after `canonical_text`, without articles and apostrophes, number words as
    digits, as VQA's own code does.
    """
    given = _plain_answer(output)
    count, agree = len(answers), sum(_plain_answer(answer) == given for answer in answers)
    without_one = agree * min(max(agree - 1, 0) / 3, 1.0)
    return (without_one + (count - agree) * min(agree / 3, 1.0)) / count


def _plain_answer(text: str) -> str:
    text = re.sub(r"['\u2019]|(?<=\d),(?=\d)", "", text)
    words = canonical_text(text).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)
