"""The decoder with caches against the forward pass, for every kind of block and layout."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from conftest import tiny_config
from decoding_cases import (
    EOS,
    LENGTH,
    OPEN_CLIP_PANELS,
    PANELS,
    PROMPT,
    VOCAB,
    make,
    own,
    run,
    text_decoder,
)

from coca_jax.inference.generation import driver
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.models import coca
from coca_jax.models import text_decoder as decoding
from coca_jax.ops.cpu_kernels import decode as cpu_kernels
from coca_jax.parallel import sharding

KINDS = ["paper", "open_clip", "reference", "modern", PANELS, OPEN_CLIP_PANELS]
KINDS += [
    pytest.param(kind, marks=pytest.mark.long)
    for kind in ("open_clip_reference", "modern_open_clip")
]


@pytest.mark.parametrize(
    "change", [{}, dict(activation="silu"), dict(norm="rms"), dict(text=dict(kv_heads=2))], ids=str
)
def test_panels_are_left_to_blocks_that_their_kernels_know(change):
    """Of shapes alone: nothing is packed of a block that has what they do not compute."""
    config = tiny_config().model
    config.text.update(change.get("text", {}))
    config.update({k: v for k, v in change.items() if k != "text"})
    module, spec = coca.build(config), decoding.decoder(config, num_ids=64, eos_id=EOS)
    params = jax.eval_shape(lambda: sharding.unbox(coca.init(module, jax.random.key(0))))
    weights = jax.eval_shape(lambda p: decoding.pack(spec, p, "panels"), params)
    packed = set() if change else {"attention", "cross_attention", "mlp"}
    assert set(weights["multimodal"][0]["packed"]) == packed
    assert ("panels" in weights["head"]) == ("norm" not in change)


@pytest.fixture(scope="module", params=KINDS)
def each_model(request):
    return make(request.param)


@pytest.mark.parametrize("cls_mask", ["shifted", "exact"])
@pytest.mark.long
def test_an_id_that_counts_as_padding_is_hidden_in_prompts_and_captions(cls_mask):
    """As in the forward pass, whose text_valid is false wherever the id stands: the unimodal half
    does not see the key of the next token (shifted), or its own."""
    hidden = 6
    how = dict(hidden_id=hidden, cls_mask=cls_mask, unimodal_depth=2)
    model = make("open_clip", seed=4, **how)  # of these weights, which write that id often
    blind = (dataclasses.replace(model[0], hidden_id=None), *model[1:])
    prompt = np.array([[3, 5, 6, 2], [0, 3, 2, 6], [0, 0, 0, 3]], np.int32)
    length = np.array([4, 3, 1], np.int32)
    produced = 0
    for how in (
        {},
        dict(num_beams=3, num_return_sequences=3),
        dict(do_sample=True, temperature=1.5, num_return_sequences=3),
    ):
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

    @jax.jit
    def begin(weights, image_tokens):
        image = decoding.image_caches(spec, weights, image_tokens)
        caches = decoding.empty_caches(spec, weights, 3, slots - 1 + steps * width)
        return image, decoding.prefill(spec, weights, PROMPT, LENGTH, caches, image)

    @jax.jit
    def run_tokens(weights, *args):
        states, caches = decoding.run_tokens(spec, weights, *args)
        return decoding.log_probs_of(weights, states), caches

    image, caches = begin(weights, image_tokens)
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
        found, caches = run_tokens(
            weights,
            token,
            np.broadcast_to(LENGTH[:, None] - 1 + step, (3, width)),
            np.concatenate([shared, own_past], axis=2),
            slots - 1 + step * width,
            caches,
            image,
        )
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
@pytest.mark.long
def test_layouts_of_the_weights_give_the_same_captions(layout):
    """Also where rows are padded to eight (6 of them), which is never seen."""
    config = tiny_config().model
    config.text.update(width=96, num_heads=2, mlp_dim=160, vocab_size=130)
    config.pooler.num_heads = 2
    _, params, image_tokens = text_decoder(config, by=0.15)
    spec = decoding.decoder(config, num_ids=130, eos_id=EOS)
    assert layout == "transposed" or cpu_kernels.available()
    plain, other = (decoding.pack(spec, params, name) for name in ("kernel", layout))
    shape = dict(transposed=(288, 96), panels=(9, 96, 32))[layout]
    assert other["unimodal"][0]["packed"]["attention"]["qkv"][layout].shape == shape
    for beams in (1, 2):
        settings = GenerationConfig(num_beams=beams, max_new_tokens=8)
        ours, want = (
            driver.generate(spec, weights, image_tokens, PROMPT, LENGTH, settings)
            for weights in (other, plain)
        )
        np.testing.assert_array_equal(ours.tokens, want.tokens)
        np.testing.assert_allclose(ours.log_prob, want.log_prob, atol=2e-5)
