"""Why a caption reads as it does: how probable each word was, and where the model looked for it.

Shape letters: B images, L text length, T frames of a clip, R x C the grid of patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.config import Model
from coca_jax.data.vocabulary import Vocabulary
from coca_jax.inference.devices import Devices
from coca_jax.models import attention_maps, coca
from coca_jax.models.image_encoder import normalise_pixels

ALTERNATIVES = 5  # of each word, itself included where it is among them


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of a text beside its image.

    text: without spaces around it, '' for the end symbol. log_prob: of its tokens under the model,
    in nats. alternatives: the most probable tokens in the place of its first one, as (text, log
    probability). attention: float32 [R, C], of clips [T, R, C], over the picture as the model sees
    it; sums to 1, less the part of a class token.
    """

    text: str
    log_prob: float
    alternatives: list[tuple[str, float]]
    attention: np.ndarray


@dataclasses.dataclass(frozen=True)
class Explanation:
    """words: of the text, the end symbol last where it came. attention: float32 [R, C], of clips
    [T, R, C], what the image's embedding is made of."""

    words: list[Word]
    attention: np.ndarray


def program(module: coca.CoCa, model: Model, devices: Devices, num_ids: int) -> Callable:
    """(params, images uint8 [B, ...], tokens int32, valid bool [B, L]) -> attention of words
    [B, L - 1, M] and of the embedding [B, M], log probabilities of tokens 1.. [B, L - 1], and the
    most probable ids there with theirs [B, L - 1, ALTERNATIVES]. Compiled at its first call, once a
    shape. num_ids: of the vocabulary; models have padded softmax layers. The model runs by the
    reference form of the operations."""
    reference = attention_maps.recording(module)

    def run(params: dict, image: jax.Array, tokens: jax.Array, valid: jax.Array) -> tuple:
        pixels = normalise_pixels(image, model=model)
        out, words, whole = attention_maps.maps(reference, params, pixels, tokens, valid)
        log_probs = jax.nn.log_softmax(out.logits[:, :-1].astype(jnp.float32))
        chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=2)[..., 0]
        best, ids = jax.lax.top_k(log_probs[..., :num_ids], min(ALTERNATIVES, num_ids))
        return words[:, :-1], whole, chosen, ids, best

    return devices.jit(run)


def explanations(
    vocabulary: Vocabulary, ids: Sequence[Sequence[int]], found: tuple, shape: tuple[int, ...]
) -> list[Explanation]:
    """ids: of each text, begin symbol first; found: what `program` gave, as NumPy arrays; shape: of
    a map, (R, C) or (T, R, C)."""
    return [
        Explanation(_words(vocabulary, known, row, shape), row[1].reshape(shape))
        for known, *row in zip(ids, *found)
    ]


def _words(
    vocabulary: Vocabulary, ids: Sequence[int], row: Sequence, shape: tuple[int, ...]
) -> list[Word]:
    """Tokens joined to words: one begins where the text of all before it gets a space."""
    maps, _, log_probs, best_ids, best = row
    words: list[Word] = []
    for place, (token, piece) in enumerate(zip(ids[1:], _pieces(vocabulary, ids[1:]))):
        first = not words or piece.startswith(" ") or token == vocabulary.eos_id
        log_prob, attention = float(log_probs[place]), maps[place].reshape(shape)
        if first:
            others = zip(best_ids[place].tolist(), best[place].tolist())
            shown = [(vocabulary.decode([one]).strip(), float(p)) for one, p in others]
            words.append(Word(piece.strip(), log_prob, shown, attention))
        else:
            last = words[-1]
            words[-1] = dataclasses.replace(
                last, text=last.text + piece, log_prob=last.log_prob + log_prob
            )
    return words


def _pieces(vocabulary: Vocabulary, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it; '' of a symbol, or of half a character,
    which comes with the token that completes it, or where none does with the last of the text."""
    pieces, before, last = [], "", 0
    for place, token in enumerate(ids):
        text = vocabulary.decode(ids[: place + 1])
        whole = text.startswith(before) and not text.endswith("\ufffd")
        pieces.append(text[len(before) :] if whole else "")
        before += pieces[-1]
        last = last if token == vocabulary.eos_id else place
    if pieces:
        pieces[last] += vocabulary.decode(ids)[len(before) :]
    return pieces
