"""What `coca_jax.load` returns for image and text towers without a decoder: CLIP, SigLIP."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from coca_jax.inference import texts as text_arrays
from coca_jax.inference.encoders import Encoders
from coca_jax.models import roles, two_towers

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TwoTowerModel(Encoders):
    """Embeddings, similarity, zero-shot and features; see `model.CoCaModel` for its arguments.

    It writes no captions and scores no texts by likelihood: such methods are missing.
    """

    def __getattr__(self, name: str) -> Any:
        if name in ("caption", "captions", "answer", "score", "caption_log_likelihood", "forward"):
            family = self.config.model.family
            raise AttributeError(
                f"{name}: a model of the family {family!r} has no decoder and writes no texts"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _module(self, params: dict) -> two_towers.TwoTowers:
        sigmoid = roles.sigmoid_bias(params) is not None
        return two_towers.build(self.config.model, sigmoid=sigmoid)

    def _tokenize(
        self, texts: Sequence[str], labels: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """SigLIP's texts have no begin symbol and are padded to the whole length, which the tower
        reads; without punctuation and in lower case, as it was trained (big_vision's
        'canonicalize')."""
        if self.config.model.family == "clip":
            return text_arrays.tokenize(self.vocabulary, texts, self.max_len)
        words, pad = self.vocabulary, self.config.model.pad_id
        tokens = np.full((len(texts), self.max_len), words.pad_id if pad < 0 else pad, np.int32)
        lengths = np.zeros(len(texts), np.int64)
        for row, ids in enumerate(words.encode_many([canonical(text) for text in texts])):
            whole = [*ids[: self.max_len - 1], words.eos_id]
            tokens[row, : len(whole)] = whole
            lengths[row] = len(whole)
        return tokens, np.arange(self.max_len)[None] < lengths[:, None]


def canonical(text: str) -> str:
    """A text in lower case, without ASCII punctuation and with single spaces."""
    plain = text.replace("_", " ").translate(_PUNCTUATION).lower()
    return re.sub(r"\s+", " ", plain).strip()
