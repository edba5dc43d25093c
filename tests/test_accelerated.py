"""The TPU forms of attention, norm, GELU and bias against their plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.models import accelerated, layers
from coca_jax.models.text_decoder import causal_mask


def arrays(*shape, count=1, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(count)]


def compare(ours, plain, inputs, tolerance):
    """Value and every gradient, relative to the largest entry."""
    (weight,) = arrays(*jax.eval_shape(plain, *inputs).shape, seed=9)
    argnums = tuple(range(len(inputs)))

    def scalar(function):
        return jax.value_and_grad(
            lambda *x: (function(*x).astype(jnp.float32) * weight).sum(), argnums
        )

    for got, want in zip(
        jax.tree.leaves(scalar(ours)(*inputs)), jax.tree.leaves(scalar(plain)(*inputs))
    ):
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        assert jnp.abs(got - want).max() <= tolerance * jnp.abs(want).max()


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_plain_form(dtype, tolerance, masked):
    inputs = arrays(2, 9, 3, 8, count=3, dtype=dtype)
    mask = causal_mask(9) if masked else None
    compare(
        lambda q, k, v: accelerated.attend(q, k, v, mask),
        lambda q, k, v: layers.attend(q, k, v, mask, True),
        inputs,
        tolerance,
    )


def test_attention_stays_finite_for_large_scores_and_rows_without_keys():
    query, key, value = arrays(1, 4, 1, 8, count=3)
    mask = jnp.zeros((1, 1, 4, 4), bool).at[..., 1:, :].set(True)

    def total(q, k, v):
        return accelerated.attend(q * 1e4, k, v, mask).sum()

    for x in jax.tree.leaves(jax.value_and_grad(total, (0, 1, 2))(query, key, value)):
        assert jnp.isfinite(x).all()


def test_norm_equals_the_plain_form_with_a_large_mean():
    (x,) = arrays(4, 9, 64, dtype=jnp.bfloat16)
    x = x + jnp.asarray(30, jnp.bfloat16)
    scale, bias = arrays(64, count=2)

    def plain(x, scale, bias):
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        return (centred * inverse * scale + bias).astype(jnp.bfloat16)

    compare(lambda *a: accelerated.layer_norm(*a, 1e-5), plain, (x, scale, bias), 1e-2)


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_gelu_and_bias_equal_the_plain_forms(dtype, tolerance):
    (x,) = arrays(4, 9, 16, dtype=dtype)
    (bias,) = arrays(16, dtype=dtype)

    def plain(x, bias):
        return jax.nn.gelu(x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(dtype)

    compare(accelerated.bias_gelu, plain, (x * 3, bias), tolerance)
    compare(accelerated.add_bias, lambda x, b: x + b, (x, bias), tolerance)


def test_sums_on_the_matrix_unit_keep_float32_accuracy():
    (x,) = arrays(8, 1408)
    np.testing.assert_allclose(
        accelerated.row_sum(jnp.square(x))[:, 0], np.square(np.asarray(x)).sum(-1), rtol=1e-5
    )
    whole = jnp.round(x * 8)  # exact in bfloat16
    np.testing.assert_allclose(accelerated.column_sum(whole), whole.sum(0), rtol=1e-6)
