"""The kernels of decoding in bfloat16 against those in float32, which have their own tests."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_cpu_kernels
from conftest import needs_bfloat16, needs_compiler, tiny_config
from decoding_cases import EOS, LENGTH, PROMPT, own, run, text_decoder
from kernel_forms import HAS_TILES, without_tiles
from test_cpu_kernels import packed, panels_of_heads

from coca_jax.models import text_decoder as decoding
from coca_jax.ops import decode_layouts as packing
from coca_jax.ops.cpu_kernels import build
from coca_jax.ops.cpu_kernels import decode as cpu_kernels
from coca_jax.runtime import machine

HALVES = jnp.bfloat16


@pytest.fixture(scope="module")
def kernels():
    assert cpu_kernels.available() and cpu_kernels.available_in_bfloat16()
    return cpu_kernels


@pytest.fixture(params=["own", "vectors"])
def form(request):
    """Of the kernels: the processor's own, and that of one without tiles where it has such."""
    other = request.param == "vectors"
    if other and not HAS_TILES:
        pytest.skip("the processor has no tiles: that is its own form")
    with without_tiles(cpu_kernels) if other else contextlib.nullcontext():
        yield request.param


class Numbers(test_cpu_kernels.Numbers):
    """Random numbers, and layers of them that lose nothing in bfloat16."""

    def dense(self, depth, width):
        layer = super().dense(depth, width)
        return layer | dict(kernel=layer["kernel"].astype(HALVES))


def assert_near(run, x=0.0, most=0.01):
    """What run(bfloat16) gives is what run(float32) gives: at most 1% of what is added to x apart,
    root mean square; a rounding is 0.2%."""
    found, want = (np.asarray(run(dtype)) for dtype in (HALVES, jnp.float32))
    assert found.shape == want.shape and found.dtype == np.float32
    apart = np.sqrt(np.square(found - want).mean() / np.square(want - x).mean())
    assert 0 < apart < most


def test_panels_are_pairs_of_rows():
    kernel = np.arange(4 * 33, dtype=np.float32).reshape(4, 33)
    found = np.asarray(cpu_kernels.panels(kernel, HALVES)).astype(np.float32)
    assert found.shape == (2, 2, 32, 2)
    np.testing.assert_array_equal(found[0, 1, 5], kernel[2:, 5])
    np.testing.assert_array_equal(found[1, 0, 0], kernel[:2, 32])
    assert not found[1, :, 1:].any()


SHAPES = [(1, 1, 16, 1), (2, 3, 48, 3), (16, 1, 80, 5), (3, 40, 64, 1), (9, 1, 544, 17)]


@needs_bfloat16
@pytest.mark.parametrize("batch, queries, width, heads", SHAPES)
def test_parts_equal_those_in_float32(kernels, form, batch, queries, width, heads):
    numbers = Numbers(width)
    x, norm, head = numbers(batch, queries, width), numbers.norm(width), width // heads
    for vocabulary in (17, 513):
        last = numbers.dense(width, vocabulary)
        assert_near(lambda dtype, last=last: kernels.log_probs(x, norm, packed(last, dtype)))
    up, down = numbers.dense(width, 3 * width + 8), numbers.dense(3 * width + 8, width)

    def mlp(dtype):
        weights = {"in": packed(up, dtype), "out": packed(down, dtype)}
        return kernels.mlp(x, norm, weights, "gelu_exact")

    assert_near(mlp, x)
    slots, slot = queries + 7, 4
    qkv, out = numbers.dense(width, 3 * width), numbers.dense(width, width)
    key, value = (numbers(batch, heads, slots, head) for _ in range(2))
    mask = numbers.rng.random((batch, queries, slots)) < 0.5
    mask[..., slot] = True

    def attention(which):
        return lambda dtype: kernels.self_attention(
            x, norm, packed(qkv, dtype), packed(out, dtype), mask, slot, key, value
        )[which]

    assert_near(attention(0), x)
    assert_near(attention(1))
    assert_near(attention(2))
    query = numbers.dense(width, width)
    assert_near(
        lambda dtype: kernels.cached_image_attention(
            x, norm, packed(query, dtype), packed(out, dtype), key, value
        ),
        x,
    )


def shared_attention(kernels, numbers, x, heads, tokens):
    """image_attention of random layers over tokens [B, Q, D], by dtype."""
    width, pad = x.shape[-1], -x.shape[-1] % 32
    head = width // heads
    norm, query, out = numbers.norm(width), *(numbers.dense(width, width) for _ in range(2))
    key, value = (numbers(width, heads, head, scale=width**-0.5) for _ in range(2))
    value = np.pad(value, ((0, pad), (0, 0), (0, 0)))
    across = value.transpose(1, 0, 2)
    image = np.pad(tokens, ((0, 0), (0, 0), (0, pad)))
    bias = numbers(width)

    def run(dtype):
        parts = (panels_of_heads(x, dtype) for x in (key.transpose(1, 2, 0), across))
        shared = dict(zip(("query", "value"), parts), bias=bias)
        layers = (packed(query, dtype), packed(out, dtype))
        return kernels.image_attention(x, norm, *layers, shared, image.astype(dtype))

    return run


@needs_bfloat16
@pytest.mark.parametrize("count", [1, 16, 50, 255])
@pytest.mark.parametrize("batch, queries, width, heads", SHAPES[:4])
def test_image_attention_equals_that_in_float32(kernels, batch, queries, width, heads, count):
    numbers = Numbers(width, count)
    x, tokens = numbers(batch, queries, width), numbers(batch, count, width)
    assert_near(shared_attention(kernels, numbers, x, heads, tokens), x, 0.015)


@needs_bfloat16
@pytest.mark.parametrize("count", [8, 15])
def test_an_image_is_read_alone_and_nan_stays(kernels, count):
    """An odd token is paired with zeros, not with the next image."""
    numbers = Numbers(count)
    x, tokens = numbers(2, 1, 64), numbers(2, count, 64)
    run = shared_attention(kernels, numbers, x, 2, tokens)
    tokens = tokens.copy()
    tokens[1] = np.nan
    found = np.asarray(shared_attention(kernels, Numbers(count), x, 2, tokens)(HALVES))
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()
    x[0, 0, 3] = np.nan
    assert np.isnan(np.asarray(run(HALVES))[0]).all()


@needs_bfloat16
@pytest.mark.parametrize("cross", ["paper", "open_clip"])
@pytest.mark.long
def test_a_model_chooses_the_tokens_of_float32(kernels, cross):
    """Wherever its two most probable ones are apart by more than rounding."""
    config = tiny_config().model
    config.text.update(width=96, num_heads=2, mlp_dim=160, vocab_size=130, cross=cross)
    config.pooler.num_heads = 2
    _, params, image_tokens = text_decoder(config, by=0.15)
    numbers, spec = Numbers(0), decoding.decoder(config, num_ids=130, eos_id=1)
    tokens, slots = numbers.rng.integers(130, size=(3, 8)), np.arange(8)
    mask = np.broadcast_to(slots <= slots[:, None], (3, 8, 8))

    @functools.partial(jax.jit, static_argnames="layout")
    def log_probs(params, layout):
        weights = decoding.pack(spec, params, layout)
        caches = decoding.empty_caches(spec, weights, 3, 8)
        image = decoding.image_caches(spec, weights, image_tokens)
        assert image.dtype == (HALVES if "bfloat16" in layout else jnp.float32)
        places = np.broadcast_to(slots, (3, 8))
        states = decoding.run_tokens(spec, weights, tokens, places, mask, 0, caches, image)[0]
        return decoding.log_probs_of(weights, states)

    layouts = ("bfloat16_panels", "panels")
    found, want = (np.asarray(log_probs(params, layout)) for layout in layouts)
    apart = np.sqrt(np.square(found - want).mean())
    assert 0 < apart < 0.03 * want.std()
    best = np.sort(want, -1)[..., -2:]
    sure = best[..., 1] - best[..., 0] > 6 * apart
    assert sure.mean() > 0.5
    np.testing.assert_array_equal(found.argmax(-1)[sure], want.argmax(-1)[sure])


@pytest.mark.parametrize(
    "cross, layout",
    [
        ("open_clip", "transposed"),
        pytest.param("paper", "panels", marks=needs_compiler),
        pytest.param("open_clip", "bfloat16_panels", marks=needs_bfloat16),
    ],
)
def test_several_captions_of_a_model_in_bfloat16(monkeypatch, cross, layout):
    """Beams and samples have the log probabilities that the plain layout gives their tokens in
    float32."""
    config = tiny_config(dtype="bfloat16").model
    config.text.update(num_heads=1, vocab_size=32, cross=cross)
    config.text.update(unimodal_depth=1, multimodal_depth=1)
    _, params, image_tokens = text_decoder(config, by=0.3)
    spec = decoding.decoder(config, num_ids=32, eos_id=EOS)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(packing, "STREAMED", 0)
    if layout != "bfloat16_panels":
        monkeypatch.setattr(cpu_kernels, "available_in_bfloat16", lambda: False)
    if layout == "transposed":
        monkeypatch.setattr(cpu_kernels, "available", lambda: False)
    chosen, name = decoding.fastest(spec, params)
    assert name == layout
    model = (chosen, decoding.pack(chosen, params, layout), image_tokens, None)
    config.dtype = "float32"
    spec = decoding.decoder(config, num_ids=32, eos_id=EOS)
    plain, places = decoding.pack(spec, params, "kernel"), np.arange(8)

    @jax.jit
    def log_probs(tokens):  # [3, 8], one caption an image
        caches = decoding.empty_caches(spec, plain, 3, 8)
        image = decoding.image_caches(spec, plain, image_tokens)
        each = np.broadcast_to(places, (3, 8))
        mask = np.broadcast_to(places <= places[:, None], (3, 8, 8))
        states = decoding.run_tokens(spec, plain, tokens, each, mask, 0, caches, image)[0]
        return decoding.log_probs_of(plain, states)

    for how in (dict(num_beams=2), dict(do_sample=True)):
        out = run(model, num_return_sequences=2, max_new_tokens=4, **how)
        assert (out.tokens[:, 0] != out.tokens[:, 1]).any()
        for caption in range(2):
            lengths = out.length[:, caption]
            texts = [
                own(PROMPT[b], LENGTH[b], out.tokens[b, caption], lengths[b]) for b in range(3)
            ]
            given = np.asarray(log_probs(np.stack([np.pad(t, (0, 8 - len(t))) for t in texts])))
            for b, text in enumerate(texts):
                at = np.arange(LENGTH[b] - 1, len(text) - 1)
                want = given[b, at, text[at + 1]].sum()
                assert out.log_prob[b, caption] == pytest.approx(want, abs=0.1)


def test_another_processor_gets_none_without_a_word(monkeypatch):
    monkeypatch.setattr(machine, "processor", lambda: "flags : avx2 avx512f")
    monkeypatch.setattr(build, "register", None)
    assert cpu_kernels.available_in_bfloat16() is False
