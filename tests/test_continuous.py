"""Rows that are taken again as captions end: the same captions as a batch at once."""

import jax
import numpy as np
import pytest
from decoding_cases import LENGTH, PANELS, PROMPT, make

from coca_jax.inference.generation import continuous, driver
from coca_jax.inference.generation.config import GenerationConfig

KINDS = {
    "tied": dict(num_beams=3, num_return_sequences=2),
    "hidden": dict(min_new_tokens=2, no_repeat_ngram_size=2, repetition_penalty=1.3),
    "panels": dict(do_sample=True, num_return_sequences=2, seed=3),
}


@pytest.mark.parametrize("kind", [*list(KINDS)[:2], PANELS])
@pytest.mark.long
def test_captions_are_those_of_one_batch(kind):
    how = KINDS[kind]
    hidden = dict(hidden_id=4, cls_mask="shifted")
    spec, weights, tokens, _ = make(**hidden) if kind == "hidden" else make(kind)
    every = np.concatenate([np.asarray(tokens) + 0.3 * i for i in range(5)])
    prompt, length = np.tile(PROMPT, (5, 1)), np.tile(LENGTH, 5)
    wanted = driver.generate(spec, weights, every, prompt, length, GenerationConfig(**how))
    wanted = jax.tree.map(lambda x: np.asarray(x)[:14], wanted)
    assert len(set(wanted.length[:, 0].tolist())) > 1  # or there would be nothing to refill

    def block(i):
        rows = slice(3 * i, 3 * i + 3)
        numbers = np.arange(15, dtype=np.uint32)[rows]
        return continuous.Block(every[rows], prompt[rows], length[rows], numbers, 3 if i < 4 else 2)

    found = continuous.generate(spec, weights, map(block, range(5)), GenerationConfig(**how), 5)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.length, wanted.length)
    np.testing.assert_allclose(found.log_prob, wanted.log_prob, atol=1e-5)


def test_no_image_has_no_caption():
    assert continuous.generate(None, {}, [], GenerationConfig(), 4).length.shape == (0, 1)
