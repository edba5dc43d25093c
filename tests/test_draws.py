"""Initial parameters: what jax and Flax would draw, by a smaller program."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny

from coca_jax.models import coca, initializers


@pytest.mark.parametrize("name, spread", [("truncated_normal", 0.88), ("normal", 1.0)])
def test_initializers_are_those_of_jax_to_the_bit(name, spread):
    key, std = jax.random.key(3), 0.23
    ours = jax.jit(lambda: getattr(initializers, name)(std)(key, (37, 110)))()
    wanted = jax.jit(lambda: getattr(nn.initializers, name)(std)(key, (37, 110)))()
    np.testing.assert_array_equal(ours, wanted)
    assert abs(float(ours.std()) / std - spread) < 0.03


class Layer(nn.Module):
    """Two drawn arrays and a constant."""

    @nn.compact
    def __call__(self, x, _):
        kernel = self.param("kernel", initializers.truncated_normal(0.5), (4, 4))
        bias = self.param("bias", initializers.normal(0.1), (4,))
        return x @ kernel + bias + self.param("gain", nn.initializers.ones, ()), None


class Tower(nn.Module):
    """A stack of three layers after an array that is drawn by itself, others in several chunks."""

    @nn.compact
    def __call__(self, x):
        large = self.param("large", initializers.normal(0.02), (initializers.SMALL // 4 + 1, 4))
        chunks = self.param("chunks", initializers.normal(0.02), (initializers.CHUNK // 2 - 1, 4))
        stack = nn.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=3)
        x = stack(name="stack")(x + large[:2] + chunks[:2], None)[0]
        return x @ self.param("out", initializers.truncated_normal(1.0), (4, 9))


def test_draws_together_are_those_alone_to_the_bit():
    def alone(key):
        return Tower().init(key, jnp.ones((2, 4)))["params"]

    for seed in (0, 5):
        key = jax.random.key(seed)
        got, want = jax.jit(initializers.together(alone))(key), jax.jit(alone)(key)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    kernels = np.asarray(want["stack"]["kernel"])
    assert len(np.unique(kernels)) == kernels.size == 48  # each layer has its own


@pytest.mark.parametrize("remat", ["none", "named"])  # which wraps each layer
def test_a_model_s_draw_is_a_program_of_a_third_of_the_size(remat):
    config = tiny()
    model, key = coca.build(config.model, loss=config.loss, remat=remat), jax.random.key(1)
    together, alone = (
        jax.jit(lambda key, init=init: init(model, key)).lower(key).compile()
        for init in (coca.init, coca.init_alone)
    )
    jax.tree.map(np.testing.assert_array_equal, together(key), alone(key))
    lines = [len(program.as_text().splitlines()) for program in (together, alone)]
    assert 3 * lines[0] < lines[1]


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
def test_keys_of_another_kind_are_drawn_with_as_jax_does(impl):
    def alone(key):
        return [initializers.normal(1.0)(jax.random.fold_in(key, n), (3, n)) for n in (1, 2)]

    key = jax.random.key(4, impl=impl)
    got, want = jax.jit(initializers.together(alone))(key), jax.jit(alone)(key)
    jax.tree.map(np.testing.assert_array_equal, got, want)
