"""Text to token ids and back, for the tokenizers that a model may come with. No TensorFlow."""

from __future__ import annotations

import os

from coca_jax.data.sources import files
from coca_jax.data.vocabulary.base import LABEL_SYMBOL, Vocabulary
from coca_jax.data.vocabulary.clip_bpe import ClipBpe
from coca_jax.data.vocabulary.hf_tokenizer import HfTokenizer
from coca_jax.data.vocabulary.no_texts import DATA as NO_TEXTS
from coca_jax.data.vocabulary.no_texts import NoTexts
from coca_jax.data.vocabulary.sentence_piece import KINDS, SentencePiece, train

__all__ = [
    "KINDS",
    "LABEL_SYMBOL",
    "ClipBpe",
    "HfTokenizer",
    "NoTexts",
    "SentencePiece",
    "Vocabulary",
]
__all__ += ["load", "train"]
MAX_BYTES = 256 << 20  # of a vocabulary's file


def load(path: str | os.PathLike[str]) -> Vocabulary:
    """Loads a vocabulary; the content of the file says which kind it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a vocabulary that is known.
    """
    data = files.read_bounded(os.fspath(path), MAX_BYTES)
    if data[:2] == b"\x1f\x8b":
        return ClipBpe(data)
    if data == NO_TEXTS:
        return NoTexts()
    if data[:1] == b"{":
        return HfTokenizer(data)
    try:
        return SentencePiece(data)
    except RuntimeError:
        raise ValueError(
            f"vocabulary {os.fspath(path)}: neither a SentencePiece model, a tokenizer.json nor "
            "CLIP's merges (.txt.gz)"
        ) from None
