"""The vocabulary of a model without a text tower: it reads no texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from coca_jax.data.vocabulary.base import Vocabulary

DATA = b"no texts\n"  # the content of its file


class NoTexts(Vocabulary):
    """Stands where an image encoder alone has no tokenizer. Encoding a text is an error."""

    size = pad_id = bos_id = eos_id = unk_id = 0
    label_id = None
    data = DATA
    checksum = hashlib.sha256(DATA).hexdigest()

    def __init__(self, data: bytes = DATA):
        del data  # every file of this kind is the same

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Raises ValueError."""
        raise ValueError("this model is an image encoder alone and reads no texts")

    def decode(self, ids: Iterable[int]) -> str:
        """Raises ValueError."""
        raise ValueError("this model is an image encoder alone and writes no texts")
