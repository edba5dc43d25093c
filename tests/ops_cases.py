"""Random arrays, and an operation against its plain form with gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.ops import reference
from coca_jax.parallel import sharding


def arrays(*shape, count=1, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [_on_device(rng.normal(size=shape), dtype) for _ in range(count)]


def _on_device(x, dtype):
    """As `jnp.asarray(x, dtype)`, which compiles a program for each shape."""
    return jax.device_put(np.asarray(x, dtype))


def drawn(shapes, by=0.3, seed=0):
    """Parameters of these shapes, norms' scales about one: by NumPy, since a program that draws
    takes as long to compile as a forward pass."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        about = float("scale" in jax.tree_util.keystr(path))
        return _on_device(about + by * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, sharding.unbox(shapes))


def with_gradients(function, inputs):
    """(value, every gradient of it times fixed random numbers)."""
    (weight,) = arrays(*jax.eval_shape(function, *inputs).shape, seed=9)

    def scalar(*x):
        out = function(*x).astype(jnp.float32)
        return (out * weight).sum(), out

    gradients, out = jax.grad(scalar, tuple(range(len(inputs))), has_aux=True)(*inputs)
    return (out, *gradients)


def assert_close(found, wanted, tolerance, name=""):
    """Relative to the largest entry."""
    for got, want in zip(found, wanted, strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max(), name


def assert_close_with_gradients(ours, plain, inputs, tolerance):
    """Value and every gradient, relative to the largest entry."""
    found, wanted = (jax.jit(lambda *x, f=f: with_gradients(f, x))(*inputs) for f in (ours, plain))
    assert_close(found, wanted, tolerance)


def plain_attention(q, k, v, mask, heads):
    q, k, v = (x.reshape(x.shape[:2] + (heads, -1)) for x in (q, k, v))
    return reference.attend(q, k, v, mask).reshape(q.shape[:2] + (-1,))
