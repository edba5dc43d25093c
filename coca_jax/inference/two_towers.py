"""What `coca_jax.load` returns for image and text towers without a decoder, as CLIP's."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from coca_jax.data.vocabulary import clip_bpe
from coca_jax.inference import texts as text_arrays
from coca_jax.inference.encoders import Encoders
from coca_jax.models import roles, tower_kinds, two_towers

OF_A_DECODER = (
    *("caption", "captions", "stream_captions", "explain", "answer", "score"),
    *("caption_log_likelihood", "forward"),
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TwoTowerModel(Encoders):
    """Embeddings, similarity, zero-shot and features; see `model.CoCaModel` for its arguments.

    It writes no captions and scores no texts by likelihood: such methods are missing.
    """

    @property
    def family(self) -> str:
        """Whose towers they are, a name of models/tower_kinds.py."""
        return self.config.model.family

    def __getattr__(self, name: str) -> Any:
        if name in OF_A_DECODER:
            raise AttributeError(
                f"{name}: a model of the family {self.family!r} has no decoder and writes no texts"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _module(self, params: dict) -> two_towers.TwoTowers:
        sigmoid = roles.sigmoid_bias(params) is not None
        platform = self._devices.platform
        return two_towers.build(self.config.model, sigmoid=sigmoid, platform=platform)

    def _tokenize(
        self, texts: Sequence[str], labels: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """A tower that sees all of a text reads its padding too, so texts are padded to the whole
        length; where they have no end symbol, padding is in its place."""
        model, words, kind = self.config.model, self.vocabulary, tower_kinds.of(self.family)
        if model.mend_texts:
            texts = [clip_bpe.mend(text) for text in texts]
        if kind.causal:
            return text_arrays.tokenize(words, texts, self.max_len)
        if kind.cleaned:
            texts = [canonical(t) if model.clean == "canonical" else t.lower() for t in texts]
        begin = [words.bos_id] if kind.begins else []
        end = [words.eos_id] if kind.ends else []
        pad = words.pad_id if model.pad_id < 0 else model.pad_id
        tokens = np.full((len(texts), self.max_len), pad, np.int32)
        lengths = np.zeros(len(texts), np.int64)
        room, cut = self.max_len - len(begin) - 1, []
        for row, ids in enumerate(words.encode_many(texts)):
            whole = [*begin, *ids[:room], *end]
            tokens[row, : len(whole)] = whole
            lengths[row] = len(whole)
            cut.append(len(ids) > room)
        text_arrays.note_cuts(cut, self.max_len)
        return tokens, np.arange(self.max_len)[None] < lengths[:, None]

    def _trimmed(self, tokens: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All of it where the tower sees the padding too."""
        causal = tower_kinds.of(self.family).causal
        return super()._trimmed(tokens, valid) if causal else (tokens, valid)


def refuse(model: Encoders, checkpoint: str) -> None:
    """Raises ValueError for a model without a decoder, where captions are to be written;
    checkpoint: the flag's value."""
    if not model.writes_captions:
        raise ValueError(
            f"--checkpoint={checkpoint}: a model of the family {model.config.model.family!r} has "
            "no decoder; it writes no captions"
        )


def canonical(text: str) -> str:
    """A text in lower case, without ASCII punctuation and with single spaces."""
    plain = text.replace("_", " ").translate(_PUNCTUATION).lower()
    return re.sub(r"\s+", " ", plain).strip()
