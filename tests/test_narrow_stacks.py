"""Stacks of bfloat16 parameters on a CPU, whose layers are taken by their bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.models import block, layers
from coca_jax.ops import cpu
from coca_jax.parallel import sharding

DEPTH, WIDTH, HIDDEN = 3, 32, 48


@pytest.fixture(scope="module")
def narrow():
    """(stack, bfloat16 parameters of its matrices, x)."""
    options = layers.BlockOptions(dtype=jnp.dtype("bfloat16"), ops=cpu.Cpu())
    stack = block.Stack(depth=DEPTH, num_heads=2, mlp_dim=HIDDEN, remat="named", options=options)
    x = jax.random.normal(jax.random.key(0), (2, 5, WIDTH))
    params = sharding.unbox(jax.jit(stack.init)(jax.random.key(1), x))["params"]
    kinds = {"kernel": jnp.bfloat16}

    def one(path, leaf):
        return leaf.astype(kinds.get(path[-1].key, leaf.dtype))

    return stack, jax.tree_util.tree_map_with_path(one, params), x


def test_no_stack_is_converted_whole(narrow):
    """And what comes out is the scan's, which runs where attention is recorded."""
    stack, params, x = narrow
    run = jax.jit(lambda params, x: stack.apply({"params": params}, x)).lower(params, x).compile()
    assert f"f32[{DEPTH},{WIDTH},{HIDDEN}]" not in run.as_text()
    scan = jax.jit(lambda params, x: stack.apply({"params": params}, x, mutable=[block.RECORDED]))
    np.testing.assert_allclose(run(params, x), scan(params, x)[0], rtol=0, atol=1e-5)


def test_a_layer_by_its_bits_and_its_gradient():
    stack = jax.random.normal(jax.random.key(0), (DEPTH, 4, 5)).astype(jnp.bfloat16)
    for number in range(DEPTH):
        layer, back = jax.vjp(lambda stack, i=number: cpu.layer_by_bits(stack, i), stack)
        np.testing.assert_array_equal(layer, stack[number])
        (gradient,) = back(jnp.ones_like(layer))
        np.testing.assert_array_equal(gradient.sum((1, 2)), 20.0 * (np.arange(DEPTH) == number))
