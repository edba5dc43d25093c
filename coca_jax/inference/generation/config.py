"""How to write a caption; apart from the decoding, so that a command checks it without JAX."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coca_jax.config import base


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to write a caption.

    max_tokens: new tokens at most, the end symbol included; never past the model's max_len.
    min_tokens: new tokens that must come before the end symbol, at most max_tokens, and within the
        model's max_len.
    num_captions: captions per image, best first, fewer where beams find no more; more than one
        needs beams or a temperature.
    num_beams: beams of beam search, at most the ids of the vocabulary; 1: none.
    temperature: 0 takes the most probable token, more samples.
    top_k, top_p: sample among the k most probable tokens (0: all), among the fewest most probable
        ones that together have probability p (Holtzman et al. 2020).
    min_p: sample among tokens at least this share as probable as the most probable one, at the
        temperature (Nguyen et al. 2024); 0: all.
    length_penalty: beams are ranked by log probability / tokens^length_penalty.
    early_stop: an image's beam search ends when no unfinished beam ranks above its finished
        captions as it stands; False: only when none could any more, however it went on.
    repetition_penalty: multiplies the log probability of tokens already there, prompt included;
        above 1 discourages them (Keskar et al. 2019, on log probabilities).
    no_repeat_ngram: n-grams of this size appear at most once, prompt included; 0: no rule.
    seed: of sampling, from 0 to 2**32-1.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    num_captions: int = 1
    num_beams: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    length_penalty: float = 1.0
    early_stop: bool = True
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        beams, sampled = self.num_beams > 1, self.temperature > 0
        for name, good, remedy in (
            ("max_tokens", self.max_tokens >= 1, "must be at least 1"),
            ("min_tokens", self.min_tokens >= 0, "must not be negative"),
            ("num_beams", self.num_beams >= 1, "must be at least 1"),
            ("num_captions", self.num_captions >= 1, "must be at least 1"),
            ("temperature", self.temperature >= 0, "must not be negative"),
            ("top_k", self.top_k >= 0, "must not be negative; 0 keeps all tokens"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "a share from 0 to 1; 0 keeps all tokens"),
            ("repetition_penalty", self.repetition_penalty > 0, "must be above 0; 1 is neutral"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "must not be negative"),
            ("temperature", not (beams and sampled), "beam search does not sample; set it to 0"),
            (
                "num_captions",
                not beams or self.num_captions <= self.num_beams,
                f"at most num_beams={self.num_beams}; raise num_beams",
            ),
            (
                "num_captions",
                beams or sampled or self.num_captions == 1,
                "greedy decoding has one caption per image; set num_beams or temperature",
            ),
            ("top_k", sampled or self.top_k == 0, "only sampling uses it; set temperature above 0"),
            ("top_p", sampled or self.top_p == 1, "only sampling uses it; set temperature above 0"),
            ("min_p", sampled or self.min_p == 0, "only sampling uses it; set temperature above 0"),
            (
                "length_penalty",
                beams or self.length_penalty == 1,
                "only beam search uses it; set num_beams above 1",
            ),
            (
                "early_stop",
                beams or self.early_stop,
                "only beam search uses it; set num_beams above 1",
            ),
            (
                "min_tokens",
                self.min_tokens <= self.max_tokens,
                f"at most max_tokens={self.max_tokens}; raise max_tokens",
            ),
            ("seed", 0 <= self.seed < 2**32, "give a whole number from 0 to 4294967295 (2**32-1)"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)}: {remedy}")

    def check_beams(self, ids: int) -> None:
        """Raises ValueError for more beams than the vocabulary has ids: each takes memory, and they
        all begin with other tokens."""
        if self.num_beams > ids:
            raise ValueError(f"num_beams={self.num_beams}: at most {ids}, the vocabulary's ids")

    @classmethod
    def of(cls, how: Mapping[str, Any]) -> Settings:
        """Settings by their names. Raises ValueError for a name that there is not, a value of
        another type, and what `Settings` refuses."""
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        for name, value in how.items():
            if name not in kinds:
                near = [group[0] for group in SAME if name in group]
                near += difflib.get_close_matches(name, kinds, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"caption: unknown field {name!r}.{hint} Fields: {', '.join(kinds)}."
                )
            base.check_value(kinds[name], value, name)
        return cls(**how)


# What other programs call a field, behind the field.
SAME = (
    ("num_beams", "beams", "beam_size", "generation_type"),
    ("max_tokens", "max_length", "max_len", "max_new_tokens", "seq_len"),
    ("min_tokens", "min_length", "min_len", "min_new_tokens", "min_seq_len"),
    ("num_captions", "num_return_sequences"),
    ("temperature", "do_sample"),
    ("no_repeat_ngram", "no_repeat_ngram_size"),
)
# What each means, for the flags of commands and the fields of forms.
NOTES = dict(
    max_tokens="New tokens at most.",
    min_tokens="New tokens before the caption may end.",
    num_captions="Captions per image; needs beams or a temperature.",
    num_beams="Beams of beam search; 1: none.",
    temperature="0 takes the most probable token, more samples.",
    top_k="Sample among this many tokens; 0: all.",
    top_p="Sample among the fewest tokens with this probability.",
    min_p="Sample among tokens at least this share as probable as the first; 0: all.",
    length_penalty="Beams rank by log probability / tokens^this.",
    early_stop="Stop beams when none ranks above the finished captions as it stands.",
    repetition_penalty="Above 1: discourages tokens already there.",
    no_repeat_ngram="N-grams of this size appear at most once; 0: no rule.",
    seed="Of sampling.",
)


def own_seeds(seeds: Sequence[int] | None, count: int) -> np.ndarray:
    """What makes the random numbers of each of `count` images its own, uint32 [count]: `seeds`, or
    its place in the list. Raises ValueError for too few, too many, or one that does not fit."""
    if seeds is None:
        return np.arange(count, dtype=np.uint32)
    seeds = list(seeds)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} images; give one each")
    wrong = [seed for seed in seeds if not (base.is_whole(seed) and 0 <= seed < 1 << 32)]
    if wrong:
        raise ValueError(f"seeds: {wrong[0]!r}; give whole numbers from 0 and below 2**32")
    return np.asarray(seeds, np.uint32)
