"""Logits processors are those of transformers; samples follow the distribution that they leave."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.inference.generation import driver, processors, strategies
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.inference.generation.processors.base import Context
from coca_jax.inference.generation.processors.min_p import MinP
from coca_jax.inference.generation.processors.top_p import TopP
from coca_jax.inference.generation.strategies import sampling
from coca_jax.inference.generation.strategies.beam_search import BeamSearch
from coca_jax.ops import decode_layouts

VOCAB, ROWS, SLOTS, WRITTEN, EOS = 40, 200, 3, 6, 1


@jax.jit
def _processed(parts, scores, tokens, written):
    return driver.processed(parts, scores, Context(tokens, written, SLOTS, EOS))


def processed(config, scores, tokens, written):
    """scores [N, V] after the processors of a config; tokens int [N, T], prompt and new ones."""
    parts = tuple(one.arrays() for one in config.processors())
    room = np.full((len(tokens), 4), -1)  # of the tokens to come
    history = np.concatenate([tokens, room], 1)[:, None].astype(np.int32)
    count = np.full(len(tokens), written, np.int32)
    return np.asarray(_processed(parts, jnp.float32(scores)[:, None], history, count))[:, 0]


def theirs(how, prompt_length):
    """The processors of transformers for a generation config."""
    transformers = pytest.importorskip("transformers")
    process = pytest.importorskip("transformers.generation.logits_process")
    prefix = how.pop("forced_prefix_ids", None)
    allowed = None
    if prefix:

        def allowed(_, ids):
            at = len(ids) - prompt_length
            return [prefix[at]] if at < len(prefix) else list(range(VOCAB))

    config = transformers.GenerationConfig(**{"top_k": 0} | how)
    mixin = transformers.GenerationMixin()
    mixin.config = transformers.PretrainedConfig(is_encoder_decoder=False)
    mixin.generation_config = config
    import torch

    config._eos_token_tensor = torch.tensor([EOS])
    found = mixin._get_logits_processor(
        config,
        input_ids_seq_length=prompt_length,
        prefix_allowed_tokens_fn=allowed,
        device="cpu",
        logits_processor=process.LogitsProcessorList(),
        encoder_input_ids=None,
    )
    return found


CASES = [
    dict(do_sample=True, temperature=0.3),
    dict(do_sample=True, top_k=7),
    dict(do_sample=True, top_k=500),
    dict(do_sample=True, top_p=0.6),
    dict(do_sample=True, min_p=0.1),
    dict(do_sample=True, typical_p=0.4),
    dict(do_sample=True, temperature=1.7, top_k=20, top_p=0.8, min_p=0.02, typical_p=0.9),
    dict(repetition_penalty=1.8),
    dict(repetition_penalty=0.6),
    dict(no_repeat_ngram_size=1),
    dict(no_repeat_ngram_size=2),
    dict(no_repeat_ngram_size=3),
    dict(min_new_tokens=7),
    dict(min_new_tokens=6),
    dict(bad_words_ids=[[5], [2, 3], [1, 2, 4], [0, 0, 0, 0]]),
    dict(forced_prefix_ids=[3, 4, 5, 6, 7, 8, 9]),
    dict(forced_prefix_ids=[3, 4]),
    dict(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=9, bad_words_ids=[[5]]),
]  # fmt: skip


@pytest.mark.parametrize("how", CASES, ids=str)
def test_processors_are_those_of_transformers(how):
    """The same ids are left, with the same probabilities; on random scores and few ids, so that
    n-grams and words come."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(len(str(how)))
    scores = 3 * rng.normal(size=(ROWS, VOCAB))
    tokens = rng.integers(0, 6, (ROWS, SLOTS + WRITTEN))
    config = GenerationConfig(**{"top_k": 0} | how)
    wanted = theirs(dict(how), SLOTS)(torch.tensor(tokens), torch.tensor(scores).float()).numpy()
    found = processed(config, scores, tokens, WRITTEN)
    np.testing.assert_array_equal(found > decode_layouts.NEVER / 2, np.isfinite(wanted))
    probs = [np.asarray(jax.nn.softmax(x, axis=-1)) for x in (found, wanted)]
    np.testing.assert_allclose(*probs, atol=1e-6)
    np.testing.assert_array_equal(found.argmax(1), wanted.argmax(1))


def test_each_processor_and_option_has_its_own_program():
    """jit tells processors apart by the structures of pytrees; values are arguments."""
    every = [one() for one in (*processors.ALL, *strategies.ALL)]
    structures = [jax.tree.structure(one) for one in every]
    assert all(a != b for a, b in itertools.combinations(structures, 2))
    assert jax.tree.structure(TopP(top_p=0.5)) == jax.tree.structure(TopP(top_p=0.7))
    assert jax.tree.structure(BeamSearch(num_beams=2)) != jax.tree.structure(
        BeamSearch(num_beams=3)
    )


def test_files_of_transformers_are_read_and_ours_by_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    how = dict(max_new_tokens=9, num_beams=3, early_stopping="never", bad_words_ids=[[4], [5, 6]])
    transformers.GenerationConfig(**how, eos_token_id=2).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig(**how)
    ours = GenerationConfig(do_sample=True, temperature=0.5, top_k=9, typical_p=0.3, seed=5)
    ours.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == ours
    read = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert all(getattr(read, name) == value for name, value in ours.to_dict().items())
    transformers.GenerationConfig(penalty_alpha=0.5).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="skipped penalty_alpha"):
        assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig()
    assert GenerationConfig.from_pretrained(tmp_path / "none") == GenerationConfig()


@jax.jit
def _draw(parts, scores, seed, rows, step):
    context = Context(jnp.full((*scores.shape[:2], 1), -1), jnp.zeros(len(rows), int), 0, EOS)
    scores = driver.processed(parts, scores, context)
    return sampling.sample(scores, seed, rows, step)


def draws_of(logs, count, steps=1, width=1, seed=0, **how):
    """Tokens [count, width] of each step: `count` images with the same next token's logs [V]."""
    config = GenerationConfig(**dict(do_sample=True, top_k=0) | how)
    parts = tuple(one.arrays() for one in config.processors())
    scores = jnp.broadcast_to(jnp.asarray(logs, jnp.float32), (count, width, len(logs)))
    rows = np.arange(count, dtype=np.uint32)
    return [
        np.asarray(_draw(parts, scores, np.uint32(seed), rows, jnp.int32(step)))
        for step in range(steps)
    ]


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
    (found,) = draws_of(logs, 50, temperature=temperature)
    assert logs.argmax() > 0 and (found == logs.argmax()).all()


def test_captions_are_the_same_with_64_bits():
    """With jax_enable_x64 indices and random numbers would have other types."""
    parts = (MinP(min_p=0.02).arrays(),)
    scores = np.random.default_rng(0).standard_normal((2, 8, 300)).astype(np.float32)
    rows, step = np.arange(2, dtype=np.uint32), np.zeros(2, np.int32)
    draw = functools.partial(_draw, parts, scores, np.uint32(3), rows, step)
    wanted = draw()
    cache, new = (
        decode_layouts.Cache(*np.zeros((2, 1, 1, 4, 2), np.float32)),
        np.ones((1, 1, 1, 2), "f"),
    )
    with jax.enable_x64(True):
        np.testing.assert_array_equal(draw(), wanted)
        written = jax.jit(decode_layouts.write)(cache, new, new, np.int32(2))
    assert written.key[0, 0, :, 0].tolist() == [0, 0, 1, 0]
