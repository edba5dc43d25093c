"""The kernels of decoding on a CPU against NumPy in float64."""

import functools
from concurrent import futures

import jax
import numpy as np
import pytest
from conftest import needs_compiler

from coca_jax.models import coca, text_decoder
from coca_jax.ops.cpu_kernels import decode as cpu_kernels
from coca_jax.ops.reference import ACTIVATIONS as REFERENCE
from coca_jax.parallel import sharding
from coca_jax.recipes import coca_base, demo, finetune_open_clip


@pytest.fixture(scope="module")
def kernels():
    assert cpu_kernels.available()
    return cpu_kernels


SHAPES = [(1, 1, 16, 1), (2, 3, 48, 3), (16, 1, 80, 5), (3, 40, 64, 1), (1, 6, 128, 1)]
each_shape = pytest.mark.parametrize("batch, queries, width, heads", SHAPES)


class Numbers:
    """Random float32 numbers and layers of them."""

    def __init__(self, *seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape, scale=1.0):
        return (scale * self.rng.normal(size=shape)).astype(np.float32)

    def norm(self, width):
        return dict(scale=1 + self(width, scale=0.1), bias=self(width, scale=0.1))

    def dense(self, depth, width):
        return dict(kernel=self(depth, width, scale=depth**-0.5), bias=self(width, scale=0.1))


# Operation by operation they would be half a dozen programs for each shape.
panels = jax.jit(cpu_kernels.panels, static_argnums=1)
panels_of_heads = jax.jit(
    lambda kernels, dtype: jax.vmap(lambda kernel: cpu_kernels.panels(kernel, dtype))(kernels),
    static_argnums=1,
)


def packed(layer, dtype=np.float32):
    return dict(panels=panels(layer["kernel"], dtype), bias=layer["bias"])


def normed(norm, x):
    x = x.astype(float)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * norm["scale"] + norm["bias"]


def dense(layer, x):
    return x @ layer["kernel"].astype(float) + layer["bias"]


def attention(query, key, value, mask):
    """Without a scale: [B, N, H, K] over [B, M, H, K]; mask [B, N, M] -> [B, N, H K]."""
    scores = np.einsum("bnhk,bmhk->bhnm", query, key, dtype=float)
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhnm,bmhk->bnhk", weights, value, dtype=float)
    return out.reshape(*out.shape[:2], -1)


@needs_compiler
@pytest.mark.parametrize("depth, width", [(16, 1), (16, 17), (48, 64), (304, 513)])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 17, 40])
def test_log_probs_equal_numpy(kernels, rows, depth, width):
    numbers = Numbers(rows, depth)
    x, norm, head = numbers(rows, 1, depth), numbers.norm(depth), numbers.dense(depth, width)
    packs = packed(head)
    assert packs["panels"].shape == (-(-width // 32), depth, 32)
    found = kernels.log_probs(x, norm, packs)
    logits = dense(head, normed(norm, x))
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert found.shape == (rows, 1, width)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@needs_compiler
def test_log_probs_of_any_size(kernels):
    """Logits apart by more than float32's exponent holds."""
    numbers = Numbers(0)
    x, norm, head = numbers(2, 3, 32), numbers.norm(32), numbers.dense(32, 100)
    head["bias"] = np.where(np.arange(100) % 2, -1e4, 1e4).astype(np.float32)
    found = kernels.log_probs(x, norm, packed(head))
    logits = dense(head, normed(norm, x))
    logits -= logits.max(-1, keepdims=True)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=2e-3)  # 1e4 is known to 1e-3


@needs_compiler
@pytest.mark.parametrize("activation", cpu_kernels.ACTIVATIONS)
@each_shape
def test_mlp_equals_numpy(kernels, batch, queries, width, heads, activation):
    numbers = Numbers(width)
    x, norm = numbers(batch, queries, width), numbers.norm(width)
    up, down = numbers.dense(width, 3 * width + 8), numbers.dense(3 * width + 8, width)
    up["bias"] *= 40  # far into both tails of the activation
    weights = {"in": packed(up), "out": packed(down)}
    found = kernels.mlp(x, norm, weights, activation)
    with jax.enable_x64():
        hidden = REFERENCE[activation](dense(up, normed(norm, x)))
    want = x + dense(down, np.asarray(hidden))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@needs_compiler
@each_shape
def test_self_attention_equals_numpy(kernels, batch, queries, width, heads):
    """And writes the new keys and values, and no others."""
    numbers = Numbers(width)
    slots, slot = queries + 7, 4
    x, norm = numbers(batch, queries, width), numbers.norm(width)
    qkv, out = numbers.dense(width, 3 * width), numbers.dense(width, width)
    key, value = (numbers(batch, heads, slots, width // heads) for _ in range(2))
    mask = numbers.rng.random((batch, queries, slots)) < 0.5
    mask[..., numbers.rng.integers(slots)] = True
    parts = dense(qkv, normed(norm, x)).reshape(batch, queries, 3, heads, -1)
    wanted = []
    for old, new in zip((key, value), (parts[:, :, 1], parts[:, :, 2])):
        old = old.transpose(0, 2, 1, 3).astype(float)
        old[:, slot : slot + queries] = new
        wanted.append(old)
    want = x + dense(out, attention(parts[:, :, 0], *wanted, mask))
    found = kernels.self_attention(x, norm, packed(qkv), packed(out), mask, slot, key, value)
    np.testing.assert_allclose(found[0], want, rtol=0, atol=1e-5)
    for ours, cache in zip(found[1:], wanted):
        np.testing.assert_allclose(ours, cache.transpose(0, 2, 1, 3), rtol=0, atol=1e-5)


@needs_compiler
def test_self_attention_does_not_read_what_the_mask_hides(kernels):
    numbers = Numbers(0)
    norm, qkv, out = numbers.norm(32), numbers.dense(32, 96), numbers.dense(32, 32)
    x = numbers(1, 2, 32)
    key, value = (numbers(1, 2, 6, 16) for _ in range(2))
    mask = np.array([[[1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0]]], bool)
    call = (x, norm, packed(qkv), packed(out), mask, 4)
    want = kernels.self_attention(*call, key.copy(), value.copy())[0]
    key[:, :, [1, 3]], value[:, :, [1, 3]] = np.nan, np.nan
    np.testing.assert_array_equal(kernels.self_attention(*call, key, value)[0], want)
    assert np.isfinite(want).all()


@needs_compiler
def test_self_attention_of_a_row_that_sees_nothing_is_finite(kernels):
    """As padding before a short prompt, which blocks without kernels multiply by 0."""
    numbers = Numbers(0)
    norm, qkv, out = numbers.norm(32), numbers.dense(32, 96), numbers.dense(32, 32)
    x = numbers(1, 2, 32)
    key, value = (numbers(1, 2, 6, 16) for _ in range(2))
    mask = np.array([[[0] * 6, [0, 0, 1, 0, 0, 0]]], bool)
    found = kernels.self_attention(x, norm, packed(qkv), packed(out), mask, 4, key, value)[0]
    np.testing.assert_allclose(found[:, 0], (x + dense(out, np.zeros(32)))[:, 0], atol=1e-6)
    assert np.isfinite(found).all()


@needs_compiler
@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0, 1e5])
@pytest.mark.parametrize("slots", [1, 9, 255])
@pytest.mark.parametrize("head", [16, 64, 128])
def test_image_attention_by_keys_of_any_sharpness(kernels, head, slots, scale):
    """Scores apart by next to nothing and by more than float32's exponent holds."""
    numbers = Numbers(slots, head)
    width = 2 * head
    x, norm = numbers(3, 5, width), numbers.norm(width)
    query, out = numbers.dense(width, width), numbers.dense(width, width)
    query = {name: (scale * a).astype(np.float32) for name, a in query.items()}
    key, value = (numbers(3, 2, slots, head) for _ in range(2))
    found = kernels.cached_image_attention(x, norm, packed(query), packed(out), key, value)
    asked = dense(query, normed(norm, x)).reshape(3, 5, 2, head)
    mask = np.ones((3, 5, slots), bool)
    seen = attention(asked, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), mask)
    # A score of 1e5 is known to 1e-2, so its softmax is too.
    atol = 1e-5 + 1e-5 * scale
    np.testing.assert_allclose(found, x + dense(out, seen), rtol=0, atol=atol)


@needs_compiler
@each_shape
@pytest.mark.parametrize("count", [1, 16, 50, 255])
def test_image_attention_equals_numpy(kernels, batch, queries, width, heads, count):
    numbers = Numbers(width, count)
    head = width // heads
    x, norm, tokens = (
        numbers(batch, queries, width),
        numbers.norm(width),
        numbers(batch, count, width),
    )
    query, out = numbers.dense(width, width), numbers.dense(width, width)
    key, value = (numbers(width, heads, head, scale=width**-0.5) for _ in range(2))
    key *= head**-0.5  # the score's scale
    bias = numbers(width)
    pad = -width % 32
    padded = np.pad(value, ((0, pad), (0, 0), (0, 0)))
    shared = dict(
        query=panels_of_heads(key.transpose(1, 2, 0), np.float32),
        value=panels_of_heads(padded.transpose(1, 0, 2), np.float32),
        bias=bias,
    )
    image = np.pad(tokens, ((0, 0), (0, 0), (0, pad)))
    found = kernels.image_attention(x, norm, packed(query), packed(out), shared, image)
    asked = dense(query, normed(norm, x)).reshape(batch, queries, heads, head)
    keys, values = (np.einsum("bmd,dhk->bmhk", tokens, w, dtype=float) for w in (key, value))
    seen = attention(asked, keys, values, np.ones((batch, queries, count), bool)) + bias
    np.testing.assert_allclose(found, x + dense(out, seen), rtol=0, atol=1e-5)


@needs_compiler
def test_nan_in_gives_nan_out(kernels):
    numbers = Numbers(0)
    x, norm, head = numbers(2, 1, 16), numbers.norm(16), numbers.dense(16, 20)
    x[0, 0, 3] = np.nan
    found = np.asarray(kernels.log_probs(x, norm, packed(head)))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()
    weights = {"in": packed(numbers.dense(16, 64)), "out": packed(numbers.dense(64, 16))}
    for activation in cpu_kernels.ACTIVATIONS:
        found = np.asarray(kernels.mlp(x, norm, weights, activation))
        assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


@needs_compiler
def test_callers_at_once_do_not_disturb_each_other(kernels):
    """Kernels of several callers share the threads of one pool."""
    numbers = Numbers(0)
    norm, up, down = numbers.norm(64), numbers.dense(64, 256), numbers.dense(256, 64)
    weights = {"in": packed(up), "out": packed(down)}
    inputs = [numbers(rows, 1, 64) for rows in range(1, 17)]
    run = jax.jit(lambda x: kernels.mlp(x, norm, weights, "gelu"))
    want = [np.asarray(run(x)) for x in inputs]

    def again(i):
        for _ in range(100):
            np.testing.assert_array_equal(run(inputs[i]), want[i])

    with futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(again, range(len(inputs))))


@pytest.mark.long
def test_where_the_kernels_are_used(monkeypatch):
    """Large models on a single CPU device, with heads that the kernels take."""
    monkeypatch.setattr(cpu_kernels, "available", lambda: True)
    monkeypatch.setattr(cpu_kernels, "available_in_bfloat16", lambda: False)

    @functools.cache  # once for all dtypes, and of the decoder alone
    def shapes(recipe, **text):
        config = recipe.get_config()
        config.model.text.update(text)
        decoder, row = coca.build(config.model).decoder, np.zeros((1, 4), np.int32)
        given = jax.random.key(0), row, row == 0, np.zeros((1, 4, config.model.text.width))
        return dict(text_decoder=sharding.unbox(jax.eval_shape(decoder.init, *given)["params"]))

    def layout(recipe, devices=1, dtype="float32", **text):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        config = recipe.get_config()
        config.model.dtype = dtype
        config.model.text.update(text)
        params = shapes(recipe, **text)
        spec = text_decoder.decoder(config.model, num_ids=config.model.text.vocab_size, eos_id=1)
        spec, layout = text_decoder.fastest(spec, params)
        assert spec.dtype == ("float32" if "panels" in layout else config.model.dtype)
        return layout

    assert layout(coca_base) == layout(finetune_open_clip) == "panels"
    assert layout(coca_base, dtype="bfloat16") == "panels"  # in float32
    monkeypatch.setattr(cpu_kernels, "available_in_bfloat16", lambda: True)
    assert layout(coca_base, dtype="bfloat16") == "bfloat16_panels"
    assert layout(coca_base, dtype="bfloat16", mlp_dim=3001) == "panels"  # pairs alone
    assert layout(coca_base) == "panels"
    assert layout(demo, dtype="bfloat16") == "transposed"
    assert layout(coca_base, devices=2) == "transposed"
    assert layout(coca_base, num_heads=32) == "transposed"  # heads of 24
    assert layout(demo) == "transposed"
    monkeypatch.setattr(cpu_kernels, "available", lambda: False)
    assert layout(coca_base) == "transposed"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert layout(coca_base) == "kernel"
