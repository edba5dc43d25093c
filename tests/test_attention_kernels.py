"""The attention of a CPU's own, in training, against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import ops
from coca_jax.ops import cpu_attention
from coca_jax.ops.cpu import Cpu
from coca_jax.ops.reference import Reference, attend, split_heads
from coca_jax.parallel import sharding


@pytest.fixture(autouse=True)
def compiler():
    if not cpu_attention.available():
        pytest.skip("no C++ compiler")


def _operands(batch, queries, keys, heads, width):
    rng = np.random.default_rng(queries * keys + width)
    shapes = [(batch, n, heads * width) for n in (queries, keys, keys, queries)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _mask(kind, batch, queries, keys):
    rng = np.random.default_rng(keys)
    if kind == "keys":  # texts of different lengths; one of none
        return (np.arange(keys) < rng.integers(0, keys + 1, (batch, 1)))[:, None, None]
    if kind == "pairs":
        return rng.random((batch, 1, queries, keys)) < 0.6
    if kind == "one for all":
        return rng.random((queries, keys)) < 0.6
    if kind == "queries":  # some see nothing
        return rng.random((batch, 1, queries, 1)) < 0.6
    return None if kind == "none" else np.full((1, 1, 1, 1), kind == "all")


def _gradients(form, operands, mask, heads, causal=False):
    """The result and the gradients of a weighted sum of it."""
    *operands, weights = operands

    def loss(query, key, value):
        y = form.attend(query, key, value, mask, heads, causal)
        return (weights * y).sum(), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, y), gradients = run(*operands)
    return y, *gradients


@pytest.mark.parametrize(
    "kind", ["none", "keys", "pairs", "one for all", "queries", "all", "nothing"]
)
@pytest.mark.parametrize(
    "batch, queries, keys, heads, width",
    [
        (3, 36, 36, 4, 40),  # a width of no whole line
        (2, 16, 50, 3, 64),
        (2, 130, 7, 2, 16),  # queries in three pieces, the last of two
        (1, 1, 1, 1, 1),
        (2, 5, 65, 1, 3),
    ],
)
def test_attention_and_its_gradients_equal_the_reference(batch, queries, keys, heads, width, kind):
    operands = _operands(batch, queries, keys, heads, width)
    mask = _mask(kind, batch, queries, keys)
    want = _gradients(Reference(), operands, mask, heads)
    got = _gradients(Cpu(), operands, mask, heads)
    for of, (a, b) in enumerate(zip(want, got, strict=True)):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, atol=2e-6 * max(1, abs(a).max()), err_msg=str(of))


def test_a_causal_mask_goes_with_another():
    operands, mask = _operands(4, 9, 9, 2, 24), _mask("keys", 4, 9, 9)
    want = _gradients(Reference(), operands, mask, 2, causal=True)
    for a, b in zip(want, _gradients(Cpu(), operands, mask, 2, causal=True)):
        np.testing.assert_allclose(b, a, atol=2e-6 * max(1, abs(a).max()))


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_scores_of_any_sharpness(scale):
    """Up to weights of 0 and 1, where a power of e alone would be infinite."""
    query, *others = _operands(2, 12, 40, 2, 32)
    operands = [query * scale, *others]
    want = _gradients(Reference(), operands, None, 2)
    for a, b in zip(want, _gradients(Cpu(), operands, None, 2)):
        assert np.isfinite(b).all()
        # Keys' gradients are queries times what is left of differences of weights.
        np.testing.assert_allclose(b, a, atol=2e-6 * max(1, scale, abs(a).max()))


def test_an_example_s_result_does_not_depend_on_the_others_nor_on_the_run():
    operands, mask = _operands(6, 36, 50, 4, 40), _mask("keys", 6, 36, 50)
    first = _gradients(Cpu(), operands, mask, 4)
    for _again in range(3):
        for a, b in zip(first, _gradients(Cpu(), operands, mask, 4)):
            np.testing.assert_array_equal(a, b)
    some = [x[2:4] for x in operands]
    for a, b in zip(first, _gradients(Cpu(), some, mask[2:4], 4)):
        np.testing.assert_array_equal(b, a[2:4])


def test_nan_in_one_example_gives_nan_there_alone():
    operands = _operands(3, 4, 20, 2, 16)
    operands[1][1, 3, 5] = np.nan  # a key of its first head
    y, dq, *_ = map(np.asarray, _gradients(Cpu(), operands, None, 2))
    assert np.isnan(y[1, :, :16]).all() and np.isnan(dq[1, :, :16]).all()
    assert np.isfinite(y[[0, 2]]).all() and np.isfinite(y[1, :, 16:]).all()


def _calls(function, *arguments):
    return str(jax.jit(function).trace(*arguments).jaxpr).count("ffi_call")


def test_where_the_kernels_run():
    *operands, weights = _operands(4, 8, 8, 2, 16)

    def loss(form, *operands):
        return (weights * form.attend(*operands, None, 2)).sum()

    def calls(form, *operands):
        return _calls(jax.grad(functools.partial(loss, form)), *operands)

    assert calls(Cpu(), *operands) == 2
    assert calls(ops.choose("cpu", "xla"), *operands) == 0
    halves = [x.astype(jnp.bfloat16) for x in operands]
    assert calls(Cpu(), *halves) == 0
    # What runs forward alone needs no compiler.
    assert _calls(functools.partial(loss, Cpu()), *operands) == 0
    with jax.set_mesh(sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])):
        assert calls(Cpu(), *operands) == 0
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
        assert calls(Cpu(), *operands) == 2


def test_without_a_compiler_training_is_as_before(monkeypatch):
    operands = _operands(2, 8, 12, 2, 16)
    want = _gradients(Cpu(kernels=False), operands, None, 2)
    monkeypatch.setattr(cpu_attention, "available", lambda: False)
    for a, b in zip(want, _gradients(Cpu(), operands, None, 2)):
        np.testing.assert_array_equal(b, a)


def test_gradients_of_each_example_by_vmap():
    *operands, weights = _operands(3, 8, 12, 2, 16)

    def loss(query, key, value, weights):
        one = (x[None] for x in (query, key, value))
        return (weights * Cpu().attend(*one, None, 2)[0]).sum()

    each = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(*operands, weights)
    _, *want = _gradients(Cpu(), [*operands, weights], None, 2)
    for a, b in zip(want, each):
        np.testing.assert_allclose(b, a, atol=1e-6 * max(1, abs(a).max()))


def test_forward_alone_equals_the_definition():
    query, key, value, _ = _operands(2, 8, 12, 2, 16)
    got = Cpu().attend(query, key, value, None, 2)
    want = attend(*(split_heads(x, 2) for x in (query, key, value)), None)
    np.testing.assert_array_equal(got, want.reshape(got.shape))
