"""Texts as the text towers of dual encoders take them: each family has rules of its own.

The same function makes the rows of training batches and those of a loaded model: with other rules a
tower would train on ids that it never sees in use, and no error would show it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import numpy as np

from coca_jax.config import Model, heads, shapes
from coca_jax.data.vocabulary import Vocabulary, clip_bpe

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(texts: Sequence[str], model: Model) -> list[str]:
    """The texts as the family's tokenizer sees them: repaired, in lower case, without punctuation,
    as far as the model asks for it."""
    found = [clip_bpe.mend(text) for text in texts] if model.mend_texts else list(texts)
    if not heads.tower_kind(model.family).cleaned:
        return found
    return [canonical(text) if model.clean == "canonical" else text.lower() for text in found]


def canonical(text: str) -> str:
    """A text in lower case, without ASCII punctuation and with single spaces."""
    plain = text.replace("_", " ").translate(_PUNCTUATION).lower()
    return re.sub(r"\s+", " ", plain).strip()


def padded(
    texts: Sequence[str], vocabulary: Vocabulary, model: Model
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a tower that sees all of a text at once: tokens int32 and valid bool, [N, max_len];
    bool [N], which texts were cut.

    Such a tower reads its padding too, so texts are padded to the full length; where they have no
    end symbol, padding takes its place.
    """
    kind, length = heads.tower_kind(model.family), model.text.max_len
    begin = [vocabulary.bos_id] if kind.begins else []
    end = [vocabulary.eos_id] if kind.ends else []
    pad = vocabulary.pad_id if model.pad_id < 0 else model.pad_id
    tokens = np.full((len(texts), length), pad, np.int32)
    lengths, cut = np.zeros(len(texts), np.int64), np.zeros(len(texts), bool)
    room = length - len(begin) - 1
    for row, ids in enumerate(vocabulary.encode_many(clean(texts, model))):
        full = [*begin, *ids[:room], *end]
        tokens[row, : len(full)] = full
        lengths[row], cut[row] = len(full), len(ids) > room
    return tokens, np.arange(length) < lengths[:, None], cut


def encode(
    texts: Sequence[str], vocabulary: Vocabulary, model: Model
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows for training: tokens int32 and valid bool, [N, max_len]; their lengths, int32 [N]."""
    if heads.tower_kind(model.family).causal:
        tokens, valid = vocabulary.encode_batch(clean(texts, model), model.text.max_len)
    else:
        tokens, valid, _ = padded(texts, vocabulary, model)
    return tokens, valid, shapes.lengths(valid)
