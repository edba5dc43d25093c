"""Decoding against the plain forward pass, brute force and itself."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs_compiler, params_of, tiny_config

from coca_jax import partitioning
from coca_jax.inference.generation import choice, loop
from coca_jax.inference.generation.settings import Settings
from coca_jax.inference.generation.state import Plan
from coca_jax.models import coca, decoding
from coca_jax.ops.cpu import decode_kernels as cpu_kernels

EOS, VOCAB = 1, 7


PANELS, OPEN_CLIP_PANELS = (
    pytest.param(kind, marks=needs_compiler) for kind in ("panels", "open_clip_panels")
)


KINDS = ["paper", "open_clip", "reference", "open_clip_reference", "modern", "modern_open_clip"]
KINDS += [PANELS, OPEN_CLIP_PANELS]


MODERN = dict(
    modern=dict(
        qk_norm=True, norm="rms", bias=False, positions="rope", gated_mlp=True, layer_scale=0.5
    ),
    modern_open_clip=dict(
        norm_eps=1e-2,
        bias=False,
        positions="both",
        activation="silu",
        text=dict(block=dict(bias=True, qk_norm=True, qk_norm_kind="layer")),
    ),
)


@pytest.mark.parametrize(
    "change", [{}, dict(activation="silu"), dict(norm="rms"), dict(text=dict(kv_heads=2))], ids=str
)
def test_panels_are_left_to_blocks_that_their_kernels_know(change):
    """Of shapes alone: nothing is packed of a block that has what they do not compute."""
    config = tiny_config().model
    config.text.update(change.get("text", {}))
    config.update({k: v for k, v in change.items() if k != "text"})
    module, spec = coca.build(config), decoding.decoder(config, num_ids=64, eos_id=EOS)
    params = jax.eval_shape(lambda: partitioning.unbox(coca.init(module, jax.random.key(0))))
    weights = jax.eval_shape(lambda p: decoding.pack(spec, p, "panels"), params)
    packed = set() if change else {"attention", "cross_attention", "mlp"}
    assert set(weights["multimodal"][0]["packed"]) == packed
    assert ("panels" in weights["head"]) == ("norm" not in change)


@pytest.fixture(scope="module", params=KINDS)
def each_model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def model():
    return make("tied")


@pytest.fixture(scope="module")
def small():
    return make(vocab=4)


@pytest.fixture(scope="module")
def wide():
    return make(vocab=30)


def make(kind="paper", vocab=VOCAB, hidden_id=None, **text):
    """(spec, decoding weights, image tokens [3, Q, D], log probabilities of token rows)."""
    options = dict(
        paper={},
        open_clip=dict(cross="open_clip", head_bias=False),
        tied=dict(tie_embeddings=True),
        reference={},
        modern=dict(kv_heads=2),  # nothing of these two is packed
        modern_open_clip=dict(cross="open_clip", head_bias=False, kv_heads=1, multimodal_heads=2),
        open_clip_reference=dict(cross="open_clip", head_bias=False),
        panels=dict(num_heads=1),  # a head of 16
        open_clip_panels=dict(cross="open_clip", head_bias=False, num_heads=1),
    )[kind]
    config = tiny_config().model
    config.text.update(options | dict(vocab_size=vocab, unimodal_depth=1, multimodal_depth=1))
    config.text.update(text)
    config.image.depth = 1
    modern = dict(MODERN.get(kind, {}))
    config.text.update(modern.pop("text", {}))
    config.update(modern)
    module = coca.build(config)
    params = params_of(module)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    params = jax.tree.unflatten(tree, leaves)
    pixels = jax.random.normal(jax.random.key(2), (3, 16, 16, 3))
    encode = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode_image")[1])
    image_tokens = encode(params, pixels)

    @jax.jit
    def log_probs(rows, tokens):
        valid = tokens != (-1 if hidden_id is None else hidden_id)
        out = module.apply({"params": params}, pixels[rows], tokens, valid)
        return jax.nn.log_softmax(out.logits)

    spec = decoding.decoder(config, num_ids=vocab, eos_id=EOS, hidden_id=hidden_id)
    layout = next((name for name in ("panels", "reference") if kind.endswith(name)), "kernel")
    assert layout != "panels" or cpu_kernels.available()
    pack = jax.jit(lambda params: decoding.pack(spec, params, layout))
    return spec, pack(params), image_tokens, log_probs


PROMPT = np.array([[0, 0, 3], [0, 3, 5], [3, 6, 2]], np.int32)  # right-aligned
LENGTH = np.array([1, 2, 3], np.int32)


def run(model, prompt=PROMPT, length=LENGTH, rows=slice(None), numbers=None, **how):
    spec, weights, image_tokens, _ = model
    out = loop.generate(
        spec, weights, image_tokens[rows], prompt, length, Settings(**how), rows=numbers
    )
    return jax.tree.map(np.asarray, out)


def own(prompt, length, tokens, count):
    """One row's prompt and new tokens."""
    return np.concatenate([prompt[len(prompt) - length :], tokens[:count]]).astype(np.int32)


@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(num_beams=3, num_captions=3),
        dict(temperature=1.5, num_captions=2, top_k=5, top_p=0.95),
    ],
)
def test_log_probs_are_those_of_the_forward_pass_for_ragged_prompts(model, how):
    out = run(model, **how)
    for row, caption in itertools.product(range(3), range(out.tokens.shape[1])):
        count = out.length[row, caption]
        tokens = own(PROMPT[row], LENGTH[row], out.tokens[row, caption], count)
        padded = np.pad(tokens, (0, 8 - len(tokens)))[None]  # one shape to compile
        expected = model[3](np.array([row]), padded)[0]
        places = np.arange(LENGTH[row] - 1, len(tokens) - 1)
        total = np.asarray(expected)[places, tokens[places + 1]].sum()
        assert out.log_prob[row, caption] == pytest.approx(total, abs=2e-5)


@pytest.mark.parametrize("cls_mask", ["shifted", "exact"])
def test_an_id_that_counts_as_padding_is_hidden_in_prompts_and_captions(cls_mask):
    """As in the forward pass, whose text_valid is false wherever the id stands: the lower half
    does not see the key of the next token (shifted), or its own."""
    hidden = 6
    model = make("open_clip", hidden_id=hidden, cls_mask=cls_mask, unimodal_depth=2)
    blind = (dataclasses.replace(model[0], hidden_id=None), *model[1:])
    prompt = np.array([[3, 5, 6, 2], [0, 3, 2, 6], [0, 0, 0, 3]], np.int32)
    length = np.array([4, 3, 1], np.int32)
    produced = 0
    for how in ({}, dict(num_beams=3, num_captions=3), dict(temperature=1.5, num_captions=3)):
        out = run(model, prompt, length, **how)
        for row, caption in itertools.product(range(3), range(out.tokens.shape[1])):
            count = out.length[row, caption]
            tokens = own(prompt[row], length[row], out.tokens[row, caption], count)
            produced += hidden in out.tokens[row, caption, : count - 2]
            padded = np.pad(tokens, (0, 8 - len(tokens)))[None]
            expected = np.asarray(model[3](np.array([row]), padded)[0])
            places = np.arange(length[row] - 1, len(tokens) - 1)
            total = expected[places, tokens[places + 1]].sum()
            assert out.log_prob[row, caption] == pytest.approx(total, abs=2e-5)
            if not how:
                assert (expected[places].argmax(-1) == tokens[places + 1]).all()
    assert produced >= 3
    assert (
        np.abs(run(blind, prompt, length).log_prob - run(model, prompt, length).log_prob).max()
        > 0.01
    )


def test_cached_logits_equal_the_forward_pass_at_every_position(each_model):
    """Ragged prompts in one batch, then two beams of their own that share a cache."""
    spec, weights, image_tokens, log_probs = each_model
    slots, steps, width = PROMPT.shape[1], 4, 2
    image = jax.jit(lambda *args: decoding.image_caches(spec, *args))(weights, image_tokens)
    caches = decoding.empty_caches(spec, weights, 3, slots - 1 + steps * width)
    prefill = jax.jit(lambda *args: decoding.prefill(spec, *args))
    caches = prefill(weights, PROMPT, LENGTH, caches, image)
    run_tokens = jax.jit(lambda *args: decoding.run_tokens(spec, *args))
    new = np.random.default_rng(0).integers(0, VOCAB, (3, width, steps)).astype(np.int32)
    parents = np.array([[0, 1], [1, 0], [0, 0], [0, 1]])  # beams cross and die
    past = np.zeros((width, steps, width), bool)
    text = [[own(PROMPT[b], LENGTH[b], [], 0)] * width for b in range(3)]
    token = np.repeat(PROMPT[:, -1:], width, axis=1)
    prompt_mask = np.arange(slots - 1)[None] >= (slots - LENGTH)[:, None]
    for step in range(steps):
        past[:, step] = np.eye(width, dtype=bool)
        own_past = np.broadcast_to(past.reshape(1, width, -1), (3, width, steps * width))
        shared = np.broadcast_to(prompt_mask[:, None], (3, width, slots - 1))
        states, caches = run_tokens(
            weights,
            token,
            np.broadcast_to(LENGTH[:, None] - 1 + step, (3, width)),
            np.concatenate([shared, own_past], axis=2),
            slots - 1 + step * width,
            caches,
            image,
        )
        found = jax.jit(decoding.log_probs_of)(weights, states)
        for b, w in itertools.product(range(3), range(width)):
            padded = np.pad(text[b][w], (0, 8 - len(text[b][w])))[None]  # one shape to compile
            expected = log_probs(np.array([b]), padded)[0, len(text[b][w]) - 1]
            np.testing.assert_allclose(found[b, w], expected, atol=1e-5)
        past = past[parents[step]]
        for b in range(3):
            old = [text[b][parent] for parent in parents[step]]
            text[b] = [np.append(old[w], new[b, w, step]) for w in range(width)]
        token = new[:, :, step]


@pytest.mark.parametrize("layout", ["transposed", PANELS])
def test_layouts_of_the_weights_give_the_same_captions(layout):
    """Also where rows are padded to eight (6 of them), which is never seen."""
    config = tiny_config().model
    config.text.update(width=96, num_heads=2, mlp_dim=160, vocab_size=130)
    config.pooler.num_heads = 2
    module = coca.build(config)
    params = params_of(module)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    params = jax.tree.unflatten(tree, leaves)
    image_tokens = jax.random.normal(jax.random.key(2), (3, config.pooler.num_queries, 96))
    spec = decoding.decoder(config, num_ids=130, eos_id=EOS)
    assert layout == "transposed" or cpu_kernels.available()
    plain, other = (decoding.pack(spec, params, name) for name in ("kernel", layout))
    shape = dict(transposed=(288, 96), panels=(9, 96, 32))[layout]
    assert other["unimodal"][0]["packed"]["attention"]["qkv"][layout].shape == shape
    for beams in (1, 2):
        settings = Settings(num_beams=beams, max_tokens=8)
        ours, want = (
            loop.generate(spec, weights, image_tokens, PROMPT, LENGTH, settings)
            for weights in (other, plain)
        )
        np.testing.assert_array_equal(ours.tokens, want.tokens)
        np.testing.assert_allclose(ours.log_prob, want.log_prob, atol=2e-5)


def test_greedy_takes_the_most_probable_token(model):
    out = run(model)
    for row in range(3):
        tokens = list(own(PROMPT[row], LENGTH[row], [], 0))
        while len(tokens) < 8 and tokens[-1] != EOS:
            padded = np.pad(tokens, (0, 8 - len(tokens)))[None]
            logits = model[3](np.array([row]), padded)[0, len(tokens) - 1]
            tokens.append(int(logits.argmax()))
        expected = tokens[LENGTH[row] :]
        assert out.tokens[row, 0, : out.length[row, 0]].tolist() == expected


def test_one_beam_is_greedy(model):
    spec, weights, image_tokens, _ = model
    greedy = run(model)
    plan = Plan(1, 1, 7, True, False, False, False, 0, True)
    numbers = dict(
        limit=(8 - LENGTH).astype(np.int32),
        min_tokens=np.int32(0),
        length_penalty=np.float32(1),
        active=np.ones(3, bool),
    )
    beam = loop.decode(spec, plan, weights, image_tokens, PROMPT, LENGTH, numbers)
    np.testing.assert_array_equal(beam.tokens, greedy.tokens)
    np.testing.assert_allclose(beam.log_prob, greedy.log_prob, atol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beam_search_with_enough_beams_is_brute_force(small, penalty):
    model = small
    limit = 3
    prompt, length = np.full((3, 1), 3, np.int32), np.ones(3, np.int32)
    out = run(
        model,
        prompt,
        length,
        num_beams=64,
        num_captions=6,
        max_tokens=limit,
        length_penalty=penalty,
        early_stop=False,
    )
    every = np.array(list(itertools.product(range(4), repeat=limit)), np.int32)
    for row in range(3):
        tokens = np.pad(every, ((0, 0), (1, 0)), constant_values=3)
        logs = np.asarray(model[3](np.full(len(tokens), row), tokens))
        each = np.take_along_axis(logs[:, :-1], tokens[:, 1:, None], 2)[..., 0]
        captions = {}
        for new, parts in zip(every.tolist(), each):
            count = new.index(EOS) + 1 if EOS in new else limit
            captions[tuple(new[:count])] = parts[:count].sum()
        ranked = sorted(captions, key=lambda c: -captions[c] / len(c) ** penalty)[:6]
        found = [tuple(t[:n].tolist()) for t, n in zip(out.tokens[row], out.length[row])]
        assert found == ranked
        np.testing.assert_allclose(out.log_prob[row], [captions[c] for c in found], atol=2e-5)


def beam_search(next_logs, width, count, limit, penalty=1.0, early_stop=True):
    """[(tokens, log probability)], best first, as `Settings` says it; next_logs: lists of tokens ->
    [lists, V], -inf where a rule forbids."""

    def rank(score, length):
        return score / length**penalty

    alive, finished = [(0.0, [])], []
    for step in range(1, limit + 1):
        logs = next_logs([tokens for _, tokens in alive])
        grown = [
            (score + logs[beam, token], tokens + [token])
            for beam, (score, tokens) in enumerate(alive)
            for token in range(logs.shape[1])
        ]
        grown = sorted((g for g in grown if np.isfinite(g[0])), key=lambda g: -g[0])[: 2 * width]
        finished += [g for g in grown[:width] if g[1][-1] == EOS]
        alive = [g for g in grown if g[1][-1] != EOS][:width]
        if step == limit:
            finished += alive
        finished = sorted(finished, key=lambda g: -rank(g[0], len(g[1])))[:width]
        reach = max((rank(score, step) for score, _ in alive), default=-np.inf)
        if not early_stop:  # a score only falls: the best that a beam may become, next or last
            ends = [rank(score, n) for score, _ in alive for n in (step + 1, limit)]
            reach = max(ends, default=-np.inf)
        if (
            len(finished) >= count
            and rank(finished[count - 1][0], len(finished[count - 1][1])) >= reach
        ):
            break
    return finished[:count]


@pytest.mark.parametrize(
    "how",
    [
        dict(num_beams=2, num_captions=2),
        dict(num_beams=3, num_captions=1, length_penalty=0.0),
        dict(num_beams=3, num_captions=2, length_penalty=2.0, early_stop=False),
        dict(num_beams=6, num_captions=3, length_penalty=0.5, min_tokens=3),
        dict(num_beams=4, num_captions=4, no_repeat_ngram=1, length_penalty=1.5),
        dict(num_beams=5, num_captions=2, max_tokens=3, early_stop=False),
        dict(num_beams=3, num_captions=3, repetition_penalty=1.7),
    ],
)
def test_beam_search_is_that_of_its_definition(model, how):
    """With few beams: what they drop matters, and when they stop."""
    out = run(model, **how)
    for row in range(3):
        prompt = own(PROMPT[row], LENGTH[row], [], 0).tolist()
        said = {}

        def next_logs(rows, prompt=prompt, row=row, said=said):
            padded = np.zeros((how["num_beams"], 8), np.int32)  # one shape to compile
            for number, tokens in enumerate(rows):
                padded[number, : len(prompt) + len(tokens)] = prompt + tokens
            logs = np.asarray(model[3](np.full(len(padded), row), padded), np.float64)
            logs = logs[: len(rows), len(prompt) + len(rows[0]) - 1]
            said.update({tuple(t + [v]): x for t, xs in zip(rows, logs) for v, x in enumerate(xs)})
            ruled = logs.copy()
            for number, tokens in enumerate(rows):
                seen = list(set(prompt + tokens))
                ruled[number, seen] *= how.get("repetition_penalty", 1.0)
                if how.get("no_repeat_ngram"):
                    ruled[number, seen] = -np.inf
                if len(tokens) < how.get("min_tokens", 0):
                    ruled[number, EOS] = -np.inf
            return ruled

        options = {k: how[k] for k in ("early_stop",) if k in how}
        limit = min(how.get("max_tokens", 64), 8 - len(prompt))
        wanted = beam_search(
            next_logs,
            how["num_beams"],
            how["num_captions"],
            limit,
            how.get("length_penalty", 1.0),
            **options,
        )
        found = [t[:n].tolist() for t, n in zip(out.tokens[row], out.length[row])]
        assert found == [tokens for _, tokens in wanted]
        for tokens, log_prob in zip(found, out.log_prob[row]):  # the model's, whatever the rules
            total = sum(said[tuple(tokens[: n + 1])] for n in range(len(tokens)))
            assert log_prob == pytest.approx(total, abs=2e-5)


@pytest.mark.parametrize("how", [{}, dict(num_beams=3), dict(temperature=1.0, top_p=0.9)])
def test_a_caption_does_not_depend_on_the_others_in_the_batch(model, how):
    together = run(model, **how)
    for row in range(3):
        one = slice(row, row + 1)
        alone = run(model, PROMPT[one], LENGTH[one], one, numbers=np.array([row]), **how)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_sampling_is_reproducible_by_seed(model):
    first = [run(model, temperature=1.0, num_captions=2, seed=seed).tokens for seed in range(3)]
    again = [run(model, temperature=1.0, num_captions=2, seed=seed).tokens for seed in range(3)]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


@functools.cache
def sampler(plan):
    """Compiled once for all numbers; arguments all: of constants XLA would compute the draws while
    it compiles, a minute long."""
    return jax.jit(lambda *args: choice._sample(plan, *args))


def draws_of(logs, count, steps=1, width=1, seed=0, **how):
    """Tokens [count, width] of each step: `count` images with the same next token's logs [V]."""
    plan = Plan(width, width, 1, False, True, len(how) > 1, False, 0, True)
    numbers = dict(
        temperature=np.float32(how["temperature"]),
        top_k=np.int32(how.get("top_k", len(logs))),
        top_p=np.float32(how.get("top_p", 1.0)),
        seed=np.uint32(seed),
        rows=np.arange(count, dtype=np.uint32),
    )
    allowed = jnp.broadcast_to(jnp.asarray(logs, jnp.float32), (count, width, len(logs)))
    draw = sampler(plan)
    return [np.asarray(draw(numbers, allowed, jnp.int32(step))) for step in range(steps)]


def filtered(logs, temperature, top_k=0, top_p=1.0):
    """The distribution to sample from, float64 [V]: temperature, then top-k, then top-p of that."""
    probs = np.exp(logs / temperature - np.max(logs / temperature))
    order = np.argsort(-probs)
    probs[order[top_k or len(probs) :]] = 0
    probs /= probs.sum()
    enough = np.searchsorted(np.cumsum(probs[order]), top_p) + 1
    probs[order[enough:]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    "how",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=1.0, top_k=20),
        dict(temperature=2.0, top_p=0.7),
        dict(temperature=1.3, top_k=40, top_p=0.8),
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


def test_minimum_and_maximum_length(model):
    assert (run(model, min_tokens=4).length[:, 0] > 4).all()
    # Where the end is all but certain it comes as soon as it may.
    spec, weights, image_tokens, log_probs = model
    bias = jnp.zeros(VOCAB).at[EOS].set(100.0)
    sure = (spec, weights | dict(head=weights["head"] | dict(bias=bias)), image_tokens, log_probs)
    for least in (0, 3):
        out = run(sure, min_tokens=least)
        assert (out.length == least + 1).all() and (out.tokens[:, :, least:] == EOS).all()
    assert (run(model, max_tokens=2).length <= 2).all()
    assert (run(model, max_tokens=2, num_beams=2).length <= 2).all()


@pytest.mark.parametrize("size", [1, 2])
def test_no_ngram_repeats(wide, size):
    for how in ({}, dict(num_beams=3)) if size == 2 else ({},):
        out = run(wide, no_repeat_ngram=size, **how)
        for row in range(3):
            tokens = own(PROMPT[row], LENGTH[row], out.tokens[row, 0], out.length[row, 0]).tolist()
            grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
            assert len(set(grams)) == len(grams)


def test_repetition_penalty_never_repeats_when_it_is_large(wide):
    out = run(wide, repetition_penalty=1e6)
    for row in range(3):
        tokens = own(PROMPT[row], LENGTH[row], out.tokens[row, 0], out.length[row, 0])
        assert len(set(tokens.tolist())) == len(tokens)


def test_ids_beyond_the_vocabulary_are_never_chosen(wide):
    spec, weights, image_tokens, log_probs = wide
    model = (dataclasses.replace(spec, num_ids=6), weights, image_tokens, log_probs)
    for how in ({}, dict(num_beams=3)):
        assert run(model, **how).tokens.max() < 6


def test_one_program_serves_all_lengths_and_numbers(model):
    run(model)
    run(model, temperature=2.0)
    before = loop.decode._cache_size()
    run(model, max_tokens=3, min_tokens=1)
    run(model, prompt=PROMPT[::-1].copy(), length=LENGTH[::-1].copy())
    run(model, temperature=1.0)
    run(model, temperature=0.5, seed=3)
    assert loop.decode._cache_size() == before


@pytest.mark.parametrize(
    "how, name",
    [
        (dict(num_beams=2, temperature=1.0), "temperature"),
        (dict(num_captions=2), "num_captions"),
        (dict(num_captions=3, num_beams=2), "num_captions"),
        (dict(top_k=3), "top_k"),
        (dict(temperature=1.0, top_p=0.0), "top_p"),
        (dict(max_tokens=0), "max_tokens"),
    ],
)
def test_impossible_settings_are_named(how, name):
    with pytest.raises(ValueError, match=f"^{name}="):
        Settings(**how)


def test_rows_that_pad_a_batch_write_nothing(model):
    spec, weights, image_tokens, _ = model
    active = np.array([True, False, True])
    for how in ({}, dict(num_beams=2)):
        out = loop.generate(
            spec, weights, image_tokens, PROMPT, LENGTH, Settings(**how), active=active
        )
        assert (np.asarray(out.length)[:, 0] > 0).tolist() == active.tolist()
        np.testing.assert_array_equal(
            np.asarray(out.tokens)[active], run(model, **how).tokens[active]
        )


def test_a_prompt_that_fills_the_model_is_refused(model):
    with pytest.raises(ValueError, match="max_len"):
        run(model, np.full((3, 8), 3, np.int32), np.full(3, 8, np.int32))
