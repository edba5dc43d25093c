"""What a guesser would score in retrieval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coca_jax.evaluators import Record, record_texts
from coca_jax.evaluators.chance import among_first
from coca_jax.evaluators.retrieval import CUTOFFS
from coca_jax.evaluators.same_images import content_digest


def guessed(records: Iterable[Record], extra_texts: Sequence[str] = ()) -> dict[str, float]:
    """What the evaluator gives one as a rule: {'image_to_text_r1': ...}, at each cut-off.

    Raises ValueError for a record without a text.
    """
    texts_of: dict[bytes, set[str]] = {}
    images_of: dict[str, set[bytes]] = {text: set() for text in extra_texts}
    shown: list[bytes] = []  # the query of each record
    written: list[str] = []  # and of each caption
    for record in records:
        shown.append(content_digest(record["image"]))
        for text in record_texts(record, "retrieval"):
            texts_of.setdefault(shown[-1], set()).add(text)
            images_of.setdefault(text, set()).add(shown[-1])
            written.append(text)
    right = dict(
        image_to_text=(len(images_of), [len(texts_of[image]) for image in shown]),
        text_to_image=(len(texts_of), [len(images_of[text]) for text in written]),
    )
    return {
        f"{direction}_r{k}": among_first(count, answers, k)
        for direction, (count, answers) in right.items()
        for k in CUTOFFS
    }
