"""A caption as people read it, from the tokens that a decode gave."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from coca_jax.data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Caption:
    """text: prompt included; log_prob: of the new tokens under the model, in nats; num_tokens: how
    many those are, the end symbol included; finished: whether the end symbol came."""

    text: str
    log_prob: float
    num_tokens: int
    finished: bool


def read(
    vocabulary: Vocabulary, prompt_ids: list[list[int]], decoded: Any, by_log_prob: bool
) -> list[list[Caption]]:
    """The captions of each image, most probable first where asked, else in the decode's order.

    prompt_ids: of each image, begin symbol first. decoded: `generation.loop.Captions`.
    """
    tokens, lengths, log_probs = (np.asarray(x) for x in decoded)
    captions = []
    for row, known in enumerate(prompt_ids):
        found = [
            Caption(
                text=vocabulary.decode(known[1:] + new[:n].tolist()),
                log_prob=float(log_prob),
                num_tokens=int(n),
                finished=bool(n) and int(new[n - 1]) == vocabulary.eos_id,
            )
            for new, n, log_prob in zip(tokens[row], lengths[row], log_probs[row])
        ]
        if by_log_prob:
            found.sort(key=lambda caption: -caption.log_prob)
        captions.append(found)
    return captions
