"""Random arrays, and an operation against its plain form with gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.ops import reference


def arrays(*shape, count=1, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(count)]


def assert_close_with_gradients(ours, plain, inputs, tolerance):
    """Value and every gradient, relative to the largest entry."""
    (weight,) = arrays(*jax.eval_shape(plain, *inputs).shape, seed=9)
    argnums = tuple(range(len(inputs)))

    def run(function):
        def scalar(*x):
            out = function(*x).astype(jnp.float32)
            return (out * weight).sum(), out

        gradients, out = jax.jit(jax.grad(scalar, argnums, has_aux=True))(*inputs)
        return (out, *gradients)

    for got, want in zip(run(ours), run(plain)):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def plain_attention(q, k, v, mask, heads):
    q, k, v = (x.reshape(x.shape[:2] + (heads, -1)) for x in (q, k, v))
    return reference.attend(q, k, v, mask).reshape(q.shape[:2] + (-1,))
