"""Whether a caption says what it should: as one of its references does, or of what was drawn."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

from coca_jax.evaluators import Record, record_texts

Scorer = Callable[[str, Record], tuple[bool, float]]


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
    said = canonical_text(caption)
    references = [canonical_text(text) for text in record_texts(record, "captioning")]
    return said in references, max(_word_f1(said.split(), r.split()) for r in references)


def _word_f1(said: list[str], wanted: list[str]) -> float:
    common = sum(min(said.count(word), wanted.count(word)) for word in set(said))
    return 2 * common / (len(said) + len(wanted)) if said or wanted else 1.0
