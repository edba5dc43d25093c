"""The product of a weight's gradient in bfloat16 on a CPU, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.ops import cpu
from coca_jax.ops.cpu import Cpu
from coca_jax.ops.cpu_kernels import turn
from coca_jax.parallel import sharding


@pytest.fixture(autouse=True)
def compiler():
    if not turn.available():
        pytest.skip("no C++ compiler")


def _matrix(*shape):
    rng = np.random.default_rng(shape[0])
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rows, columns", [(1, 1), (32, 128), (37, 301), (200, 3), (3, 200)])
def test_turned_and_rounded_as_numpy_does(rows, columns):
    """Of any size, ties, subnormal numbers, infinities and NaN among them."""
    x = _matrix(rows, columns) * np.exp2(30 * np.tanh(_matrix(columns, rows).T))
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8, 3.39e38, 1e-40, -1e-45]
    flat = x.reshape(-1)
    flat[: len(special)] = special[: len(flat)]
    got = jax.jit(turn.turn)(x)
    assert got.shape == (columns, rows) and got.dtype == jnp.bfloat16
    want = x.T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), want.view(np.uint16))


def test_every_nan_stays_one():
    """Those too whose highest digits are an infinity's."""
    x = np.array([[0x7F800001, 0x7FFFFFFF, 0xFF800001, 0x7FC00000]], np.uint32).view(np.float32)
    assert np.isnan(np.asarray(turn.turn(x), np.float32)).all()


@pytest.mark.parametrize("rows, depth, width", [(300, 40, 24), (1, 16, 16), (33, 1, 5)])
def test_gradients_of_a_product_are_those_of_rounded_operands(rows, depth, width):
    x, w, g = _matrix(rows, depth), _matrix(depth, width), _matrix(width, rows).T

    def gradients(kernels):
        def loss(x, w):
            return (cpu.product(x, w, jnp.dtype(jnp.bfloat16), kernels) * g).sum()

        run = jax.jit(jax.grad(loss, (0, 1)), compiler_options=cpu.compiler_options())
        assert run.trace(x, w).jaxpr.jaxpr.pretty_print().count("ffi_call") == 2 * kernels
        return run(x, w)

    for a, b in zip(gradients(False), gradients(True)):
        np.testing.assert_allclose(b, a, atol=1e-5 * max(1, abs(a).max()))
    x, g = (np.asarray(jnp.bfloat16(a), np.float64) for a in (x, g))
    np.testing.assert_allclose(gradients(True)[1], x.T @ g, atol=1e-5 * abs(x.T @ g).max())


@pytest.mark.parametrize(
    "change", [lambda dw: dw.T, lambda dw: dw.T @ dw, lambda dw: dw.T.reshape(-1)]
)
def test_what_is_done_with_it_is_not_taken_into_the_product(change):
    """Into one that sums over the left operand's rows, XLA would find it has none, as it runs."""
    x, g = _matrix(64, 32), _matrix(64, 16)
    got = jax.jit(
        lambda x, g: change(turn.weight_gradient(x, g)),
        compiler_options=cpu.compiler_options(),
    )(x, g)
    want = change(np.float32(jnp.bfloat16(x)).T @ np.float32(jnp.bfloat16(g)))
    np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())


def test_gradients_of_each_example_by_vmap():
    x, g = _matrix(3, 64).reshape(3, 8, 8), _matrix(4, 48).reshape(3, 8, 8)
    each = jax.jit(jax.vmap(turn.weight_gradient))(x, g)
    for a, b, got in zip(x, g, each):
        np.testing.assert_array_equal(got, turn.weight_gradient(a, b))


def test_where_it_runs(monkeypatch):
    x, w = _matrix(8, 16), _matrix(16, 24)

    def calls(form, dtype, x=x):
        loss = lambda w: form.dense(x, w, dtype).astype(jnp.float32).sum()  # noqa: E731
        return str(jax.jit(jax.grad(loss)).trace(w).jaxpr).count("ffi_call")

    assert calls(Cpu(), jnp.bfloat16) == 2
    assert calls(Cpu(), jnp.float32) == 0
    assert calls(Cpu(kernels=False), jnp.bfloat16) == 0
    with jax.set_mesh(sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])):
        assert calls(Cpu(), jnp.bfloat16) == 0
    monkeypatch.setattr(turn, "available", lambda: False)
    assert calls(Cpu(), jnp.bfloat16) == 0
