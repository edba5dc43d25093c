"""Decoding against the plain forward pass, brute force and itself."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from decoding_cases import EOS, LENGTH, PROMPT, VOCAB, make, own, run

from coca_jax.inference.generation import driver
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.inference.generation.strategies.beam_search import BeamSearch


@pytest.fixture(scope="module")
def model():
    return make("tied")


@pytest.fixture(scope="module")
def small():
    return make(vocab=4)


@pytest.fixture(scope="module")
def wide():
    return make(vocab=30)


@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(num_beams=3, num_return_sequences=3),
        dict(do_sample=True, temperature=1.5, num_return_sequences=2, top_k=5, top_p=0.95),
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
    steps, _, images = driver.prepare(spec, GenerationConfig(), LENGTH, None, None)
    method = driver.Method(BeamSearch(num_beams=1).arrays(), ())
    beam = driver.decode(spec, steps, method, weights, image_tokens, PROMPT, LENGTH, images)
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
        num_return_sequences=6,
        max_new_tokens=limit,
        length_penalty=penalty,
        early_stopping="never",
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


def beam_search(next_logs, width, count, limit, penalty=1.0, early_stopping=False):
    """[(tokens, log probability)], best first, as `GenerationConfig` says it; next_logs: lists of tokens ->
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
        if (
            early_stopping == "never"
        ):  # a score only falls: the best that a beam may become, next or last
            ends = [rank(score, n) for score, _ in alive for n in (step + 1, limit)]
            reach = max(ends, default=-np.inf)
        if early_stopping is True and len(finished) >= width:
            break
        if (
            early_stopping is not True
            and len(finished) >= count
            and rank(finished[count - 1][0], len(finished[count - 1][1])) >= reach
        ):
            break
    return finished[:count]


@pytest.mark.parametrize(
    "how",
    [
        dict(num_beams=2, num_return_sequences=2),
        dict(num_beams=3, num_return_sequences=1, length_penalty=0.0),
        dict(num_beams=3, num_return_sequences=2, length_penalty=2.0, early_stopping="never"),
        dict(num_beams=6, num_return_sequences=3, length_penalty=0.5, min_new_tokens=3),
        dict(num_beams=4, num_return_sequences=4, no_repeat_ngram_size=1, length_penalty=1.5),
        dict(num_beams=5, num_return_sequences=2, max_new_tokens=3, early_stopping="never"),
        dict(num_beams=3, num_return_sequences=2, length_penalty=2.0, early_stopping=True),
        dict(num_beams=3, num_return_sequences=3, repetition_penalty=1.7),
        dict(num_beams=3, num_return_sequences=3, no_repeat_ngram_size=2),
        dict(num_beams=1, num_return_sequences=1, no_repeat_ngram_size=3),
        dict(num_beams=1, num_return_sequences=1, min_new_tokens=3, repetition_penalty=1.7),
    ],
)
def test_beam_search_is_that_of_its_definition(model, how):
    """With few beams: what they drop matters, and when they stop. One beam is greedy decoding."""
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
                past, size = prompt + tokens, how.get("no_repeat_ngram_size", 0)
                ruled[number, list(set(past))] *= how.get("repetition_penalty", 1.0)
                for end in range(size - 1, len(past)) if size else ():
                    if past[end - size + 1 : end] == past[len(past) - size + 1 :]:
                        ruled[number, past[end]] = -np.inf
                if len(tokens) < how.get("min_new_tokens", 0):
                    ruled[number, EOS] = -np.inf
            return ruled

        options = {k: how[k] for k in ("early_stopping",) if k in how}
        limit = min(how.get("max_new_tokens", 64), 8 - len(prompt))
        wanted = beam_search(
            next_logs,
            how["num_beams"],
            how["num_return_sequences"],
            limit,
            how.get("length_penalty", 1.0),
            **options,
        )
        found = [t[:n].tolist() for t, n in zip(out.tokens[row], out.length[row])]
        assert found == [tokens for _, tokens in wanted]
        for tokens, log_prob in zip(found, out.log_prob[row]):  # the model's, whatever the rules
            total = sum(said[tuple(tokens[: n + 1])] for n in range(len(tokens)))
            assert log_prob == pytest.approx(total, abs=2e-5)


def test_early_stop_is_at_what_stands_and_not_at_what_may_come():
    """A model that would rather end, and a penalty that prefers long captions."""
    model, prompt, length = (
        make(vocab=4, seed=8),
        np.full((3, 1), 3, np.int32),
        np.ones(3, np.int32),
    )
    how = dict(num_beams=2, length_penalty=2.0, max_new_tokens=4)
    outs = [run(model, prompt, length, early_stopping=early, **how) for early in (False, "never")]
    for row in range(3):

        def next_logs(rows, row=row):
            padded = np.zeros((2, 8), np.int32)
            padded[: len(rows), : 1 + len(rows[0])] = [[3, *tokens] for tokens in rows]
            logs = np.asarray(model[3](np.full(2, row), padded), np.float64)
            return logs[: len(rows), len(rows[0])]

        both = [beam_search(next_logs, 2, 1, 4, 2.0, early)[0][1] for early in (False, "never")]
        found = [out.tokens[row, 0, : out.length[row, 0]].tolist() for out in outs]
        assert found == both and len(both[0]) < len(both[1])


@pytest.mark.parametrize("how", [{}, dict(num_beams=3), dict(do_sample=True, top_p=0.9)])
def test_a_caption_does_not_depend_on_the_others_in_the_batch(model, how):
    together = run(model, **how)
    for row in range(3):
        one = slice(row, row + 1)
        alone = run(model, PROMPT[one], LENGTH[one], one, numbers=np.array([row]), **how)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_sampling_is_reproducible_by_seed(model):
    first = [
        run(model, do_sample=True, num_return_sequences=2, seed=seed).tokens for seed in range(3)
    ]
    again = [
        run(model, do_sample=True, num_return_sequences=2, seed=seed).tokens for seed in range(3)
    ]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


def test_minimum_and_maximum_length(model):
    assert (run(model, min_new_tokens=4).length[:, 0] > 4).all()
    # Where the end is all but certain it comes as soon as it may.
    spec, weights, image_tokens, log_probs = model
    bias = jnp.zeros(VOCAB).at[EOS].set(100.0)
    sure = (spec, weights | dict(head=weights["head"] | dict(bias=bias)), image_tokens, log_probs)
    for least in (0, 3):
        out = run(sure, min_new_tokens=least)
        assert (out.length == least + 1).all() and (out.tokens[:, :, least:] == EOS).all()
    assert (run(model, max_new_tokens=2).length <= 2).all()
    assert (run(model, max_new_tokens=2, num_beams=2).length <= 2).all()


def test_of_equal_tokens_the_first_is_taken(model):
    spec, weights, image_tokens, log_probs = model
    bias = jnp.zeros(VOCAB).at[3:5].set(1e9)  # so large that float32 has no more room
    equal = (spec, weights | dict(head=weights["head"] | dict(bias=bias)), image_tokens, log_probs)
    out = run(equal)
    assert all((row[0, : n[0]] == 3).all() for row, n in zip(out.tokens, out.length))


def test_a_program_has_room_for_all_tokens_and_serves_several_lengths(model):
    spec, lengths = dataclasses.replace(model[0], max_len=64), np.ones(3, np.int32)
    room = {
        tokens: driver.prepare(spec, GenerationConfig(max_new_tokens=tokens), lengths, None, None)[
            0
        ]
        for tokens in (1, 16, 17, 40, 60)
    }
    assert room == {1: 16, 16: 16, 17: 32, 40: 48, 60: 63}  # 64 with the begin symbol


@pytest.mark.parametrize("size", [1, 2])
def test_no_ngram_repeats(wide, size):
    for how in ({}, dict(num_beams=3)) if size == 2 else ({},):
        out = run(wide, no_repeat_ngram_size=size, **how)
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
    run(model, min_new_tokens=2, do_sample=True, temperature=2.0)
    before = driver.decode._cache_size()
    run(model, max_new_tokens=3)
    run(model, prompt=PROMPT[::-1].copy(), length=LENGTH[::-1].copy())
    run(model, min_new_tokens=1, do_sample=True, temperature=0.5, top_k=3, seed=3)
    assert driver.decode._cache_size() == before


@pytest.mark.parametrize(
    "how, name",
    [
        (dict(num_beams=2, do_sample=True), "do_sample=True: only sampling uses it"),
        (dict(temperature=0.5), "temperature=0.5: only sampling uses it. Set do_sample=True"),
        (dict(do_sample=True, temperature=0.0), "temperature=0.0: give a number above 0"),
        (dict(num_return_sequences=2), "num_return_sequences"),
        (dict(num_return_sequences=3, num_beams=2), "num_return_sequences"),
        (dict(top_k=3), "top_k"),
        (dict(length_penalty=2.0), "length_penalty=2.0: only beam search uses it. Set num_beams"),
        (dict(early_stopping="never"), "early_stopping='never': only beam search uses it"),
        (dict(do_sample=True, top_p=0.0), "top_p"),
        (dict(do_sample=True, min_p=1.5), "min_p"),
        (dict(min_p=0.1), "min_p"),
        (dict(num_beams=2, min_p=0.1), "min_p"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(min_new_tokens=9, max_new_tokens=8), "min_new_tokens"),
        (dict(seed=-1), "seed=-1: give a whole number from 0 to 4,294,967,295"),
        (dict(seed=2**70), "seed"),
    ],
)
def test_impossible_settings_are_named(how, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        GenerationConfig(**how)


def test_rows_that_pad_a_batch_write_nothing(model):
    spec, weights, image_tokens, _ = model
    active = np.array([True, False, True])
    for how in ({}, dict(num_beams=2)):
        out = driver.generate(
            spec, weights, image_tokens, PROMPT, LENGTH, GenerationConfig(**how), active=active
        )
        assert (np.asarray(out.length)[:, 0] > 0).tolist() == active.tolist()
        np.testing.assert_array_equal(
            np.asarray(out.tokens)[active], run(model, **how).tokens[active]
        )
