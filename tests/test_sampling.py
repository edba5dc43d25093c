"""Samples follow the distribution that temperature, top-k and top-p leave."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.inference.generation import generate, sampling
from coca_jax.inference.generation.base import Plan
from coca_jax.ops import decode_layouts


@functools.cache
def sampler(plan):
    """Compiled once for all numbers; arguments all: of constants XLA would compute the draws while
    it compiles, a minute long."""
    return jax.jit(lambda *args: sampling._sample(plan, *args))


def draws_of(logs, count, steps=1, width=1, seed=0, **how):
    """Tokens [count, width] of each step: `count` images with the same next token's logs [V]."""
    plan = Plan(width, width, 1, False, True, len(how) > 1, False, 0, True)
    numbers = dict(
        temperature=np.float32(how["temperature"]),
        top_k=np.int32(how.get("top_k", len(logs))),
        top_p=np.float32(how.get("top_p", 1.0)),
        min_p=np.float32(how.get("min_p", 0.0)),
        seed=np.uint32(seed),
        rows=np.arange(count, dtype=np.uint32),
    )
    allowed = jnp.broadcast_to(jnp.asarray(logs, jnp.float32), (count, width, len(logs)))
    draw = sampler(plan)
    return [np.asarray(draw(numbers, allowed, jnp.int32(step))) for step in range(steps)]


def filtered(logs, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution to sample from, float64 [V]: temperature, then top-k, top-p and min-p of
    what each leaves."""
    probs = np.exp(logs / temperature - np.max(logs / temperature))
    order = np.argsort(-probs)
    probs[order[top_k or len(probs) :]] = 0
    probs /= probs.sum()
    enough = np.searchsorted(np.cumsum(probs[order]), top_p) + 1
    probs[order[enough:]] = 0
    probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    "how",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=1.0, top_k=20),
        dict(temperature=2.0, top_p=0.7),
        dict(temperature=1.3, top_k=40, top_p=0.8),
        dict(temperature=1.5, min_p=0.3),
        dict(temperature=1.3, top_p=0.8, min_p=0.2),
    ],
)
@pytest.mark.parametrize("vocab", [5, 600])
def test_samples_follow_the_filtered_distribution(vocab, how):
    """Chi-square of 8,000 draws within 3.3 standard deviations (Wilson and Hilferty 1931), no token
    outside the set; also of more tokens than one block of the running sum holds."""
    logs = 1.5 * np.random.default_rng(vocab).normal(size=vocab)
    how = how | (dict(top_k=3) if vocab == 5 and "top_k" in how else {})
    found = np.bincount(draws_of(logs, 8_000, **how)[0][:, 0], minlength=vocab)
    even = 8_000 * filtered(logs, **how)
    assert (found[even == 0] == 0).all()
    few = even < 5
    cells = [(found[~few], even[~few]), (found[few].sum(), even[few].sum())]
    found, even = (np.concatenate([a, [b]]) for a, b in zip(*cells))
    free = (even > 0).sum() - 1
    ratio = ((found - even) ** 2 / np.maximum(even, 1e-9)).sum() / free
    assert abs(ratio ** (1 / 3) - 1 + 2 / (9 * free)) / np.sqrt(2 / (9 * free)) < 3.3


def test_images_captions_steps_and_seeds_draw_apart():
    """Of two equally probable tokens, half of the pairs agree."""
    a, b = draws_of(np.zeros(2), 2_000, steps=2, width=2, temperature=1.0)
    (other,) = draws_of(np.zeros(2), 2_000, width=2, seed=1, temperature=1.0)
    for one, two in ((a[1:], a[:-1]), (a[:, 0], a[:, 1]), (a, b), (a, other)):
        assert 0.45 < (one == two).mean() < 0.55


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-45, 1e-60])
def test_a_temperature_towards_zero_takes_the_most_probable(temperature):
    logs = np.log(np.random.default_rng(0).dirichlet(np.ones(600)))
    cold = np.maximum(np.float32(temperature), generate._COLDEST)  # as `loop.planned` gives it
    (found,) = draws_of(logs, 50, temperature=cold)
    assert logs.argmax() > 0 and (found == logs.argmax()).all()


def test_captions_are_the_same_with_64_bits():
    """With jax_enable_x64 indices and random numbers would have other types."""
    plan = types.SimpleNamespace(filter=False)
    numbers = dict(temperature=np.float32(1), seed=np.uint32(3), rows=np.arange(2, dtype=np.uint32))
    numbers["min_p"] = np.float32(0.02)
    allowed = np.random.default_rng(0).standard_normal((2, 8, 300)).astype(np.float32)
    step = np.zeros(2, np.int32)
    draw = jax.jit(lambda *of: sampling._sample(plan, *of))
    wanted = draw(numbers, allowed, step)
    cache, new = (
        decode_layouts.Cache(*np.zeros((2, 1, 1, 4, 2), np.float32)),
        np.ones((1, 1, 1, 2), "f"),
    )
    with jax.enable_x64(True):
        np.testing.assert_array_equal(draw(numbers, allowed, step), wanted)
        written = jax.jit(decode_layouts.write)(cache, new, new, np.int32(2))
    assert written.key[0, 0, :, 0].tolist() == [0, 0, 1, 0]
