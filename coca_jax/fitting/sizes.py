"""Sizes of models that `fit` chooses from, what each is worth and what it costs."""

from __future__ import annotations

import dataclasses

from coca_jax.fitting.look import Facts
from coca_jax.fitting.machine import Machine

EFFICIENCY = 0.3  # of the machine's matrix products, that a train step of a small model reaches
# On CPUs those are of float32. In bfloat16, where a processor multiplies it, a step was 1.6 (AMD
# Zen 4) to 1.9 times (Intel with AMX) as fast; XLA's product of two matrices alone was not.
HALVES = 1.5


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of model, and what it takes to be worth its cost.

    Attributes:
        name: for people.
        image_size, patch_size: in pixels.
        stem: channels and residual blocks of the convolutional stem's stages; (): plain patches.
        width, depth, unimodal, multimodal, heads, queries: as in config.model, for both towers.
        pieces: of the vocabulary at most.
        pictures, pairs: to train on, and seen in all, from which on this size is chosen.
    """

    name: str
    image_size: int
    patch_size: int
    stem: tuple[tuple[int, int], ...]
    width: int
    depth: int
    unimodal: int
    multimodal: int
    heads: int
    queries: int
    pieces: int
    pictures: int = 0
    pairs: int = 0


_STEM = ((32, 0), (64, 1), (128, 0))
SIZES = (
    Size("tiny pictures", 28, 4, ((32, 0), (64, 1)), 96, 1, 1, 1, 3, 8, 2048),
    Size("small", 48, 8, _STEM, 160, 1, 2, 1, 4, 16, 4096),
    Size("medium", 96, 16, (*_STEM, (256, 0)), 256, 2, 3, 2, 4, 32, 8192, 5_000, 400_000),
    Size("large", 160, 16, (*_STEM, (256, 1)), 512, 6, 4, 4, 8, 64, 16_384, 100_000, 3_000_000),
    Size("base", 224, 16, (), 768, 12, 6, 6, 12, 256, 32_768, 1_000_000, 20_000_000),
)


def sizes_for(facts: Facts, machine: Machine, minutes: float) -> list[Size]:
    """The sizes that suit the pictures, and of which the machine sees enough pairs in the time;
    the largest first, never empty."""
    side = min(facts.width, facts.height) or 224
    if side <= 32:
        fitted = 4 * max(4, -(-side // 4))
        return [dataclasses.replace(SIZES[0], image_size=fitted)]
    found = [SIZES[1]]
    for size in SIZES[2:]:
        enough = facts.train >= size.pictures and side >= size.image_size // 2
        if enough and affordable(size, facts, machine, minutes) >= size.pairs:
            found.append(size)
    return found[::-1]


def affordable(size: Size, facts: Facts, machine: Machine, minutes: float) -> float:
    """About how many pairs the machine sees in the time, by arithmetic alone."""
    length = facts.tokens[1] or 16
    return 60 * minutes * step_flops(machine) / flops_a_pair(size, length)


def step_flops(machine: Machine) -> float:
    """Operations a second that a train step reaches, about."""
    halves = machine.platform == "cpu" and machine.dtype == "bfloat16"
    return machine.flops * EFFICIENCY * (HALVES if halves else 1)


def flops_a_pair(size: Size, length: int) -> float:
    """Operations of a train step for one picture and one text of `length` tokens: twice the
    multiplications of the forward pass, and again twice that for the gradient."""
    side, channels, total = size.image_size, 3, 0.0
    for width, blocks in size.stem:
        side //= 2
        total += side**2 * 9 * (channels * width + 2 * blocks * width**2)
        channels = width
    tokens, width = (size.image_size // size.patch_size) ** 2, size.width
    if not size.stem:
        total += tokens * size.patch_size**2 * 3 * width
    total += size.depth * tokens * (12 * width**2 + 2 * tokens * width)
    total += (size.unimodal * 12 + size.multimodal * 14) * length * width**2
    total += (size.multimodal + 1) * 2 * size.queries * width**2
    total += length * size.pieces * width
    return 3 * 2 * total


def vocabulary_size(facts: Facts, size: Size) -> int:
    """Ids of a byte-pair vocabulary for the texts: a piece for most of the words that occur.

    256 bytes, the symbols, twice the characters and one and a half times the words; the trainer
    stops by itself where nothing is left to join.
    """
    wanted = 300 + 2 * facts.characters + int(1.5 * facts.distinct_words)
    return max(320, min(-(-wanted // 32) * 32, size.pieces))
