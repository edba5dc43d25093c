"""Muon's iterations by kernels of a CPU's own against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs_bfloat16, tiny
from kernel_forms import forms
from optimizer_cases import draw, gradients_of, nested

from coca_jax import ops
from coca_jax.ops.cpu import Cpu
from coca_jax.ops.cpu_kernels import muon
from coca_jax.ops.reference import Reference
from coca_jax.parallel import sharding
from coca_jax.training.optimizer import MUON_ITERATIONS, make_optimizer

ABC = jnp.float32([3.4445, -4.7750, 2.0315])


@pytest.fixture(autouse=True)
def compiler():
    if not muon.available():
        pytest.skip("no C++ compiler")


def matrices(*shape):
    x = np.random.default_rng(sum(shape)).normal(size=shape)
    return jnp.float32(x / np.linalg.norm(x, axis=(1, 2), keepdims=True))


def iterated(form, x, dtype=jnp.float32, times=MUON_ITERATIONS):
    return jax.jit(lambda x: form.orthogonalise(x, ABC, times, dtype))(x)


SIZES = [(1, 160, 160), (2, 96, 640), (3, 5, 7), (1, 1, 9), (5, 16, 16), (1, 33, 101)]


@pytest.mark.parametrize("shape", SIZES)
def test_iterations_equal_the_reference(shape):
    x = matrices(*shape)
    want, got = iterated(Reference(), x), iterated(Cpu(), x)
    np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())
    for matrix in np.asarray(got):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert 0.6 < np.median(values) and values.max() < 1.3


@needs_bfloat16
@pytest.mark.parametrize("shape", SIZES)
def test_bfloat16_rounds_the_operands_of_products_alone(shape):
    """As the definition with rounded operands is, but for sums in another order, some of which are
    then rounded to the other side: by less than half of what rounding itself changes."""
    x = matrices(*shape)
    results = [np.asarray(x)]

    def product(a, b):
        a, b = (np.asarray(jnp.bfloat16(one), np.float32) for one in (a, b))
        return a @ b

    for _ in range(MUON_ITERATIONS):
        last = results[-1]
        square = product(last, last.swapaxes(1, 2))
        factors = ABC[1] * square + ABC[2] * product(square, square)
        results.append(np.asarray(ABC[0] * last + product(factors, last)))
    exact = np.asarray(iterated(Reference(), x))
    for form in forms(muon):
        with form:
            first = np.asarray(iterated(Cpu(), x, jnp.bfloat16, 1))
            got = np.asarray(iterated(Cpu(), x, jnp.bfloat16))
        # The iterations make more of each rounding.
        assert np.linalg.norm(first - results[1]) < 3e-4 * np.linalg.norm(results[1])
        assert np.linalg.norm(got - results[-1]) < 5e-3 * np.linalg.norm(results[-1])
        assert 1e-2 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < 4e-2


def test_what_the_kernel_is_called_for():
    def calls(form, x, dtype=jnp.float32):
        run = jax.jit(lambda x: form.orthogonalise(x, ABC, MUON_ITERATIONS, dtype))
        return "orthogonalise" in run.lower(x).as_text()

    small, large = jnp.zeros((1, 8, 16)), jnp.zeros((1, 512, 1024))
    assert calls(Cpu(), small) and not calls(Cpu(), large)
    assert not calls(Cpu(), small.astype(jnp.float64 if jax.config.x64_enabled else jnp.bfloat16))
    assert not calls(ops.choose("cpu", "xla"), small) and not calls(Reference(), small)
    with jax.set_mesh(sharding.make_mesh(2, 1, 1, jax.devices()[:2])):
        assert not calls(Cpu(), small)  # XLA cannot split the call of a kernel


@needs_bfloat16
def test_a_bfloat16_model_s_updates_are_multiplied_in_it():
    config = tiny(**{"optimizer.name": "muon", "model.dtype": "bfloat16"})
    params = nested(draw(0, 0.3))
    rule = make_optimizer(config.optimizer, Cpu(), config.model.dtype)
    text = jax.jit(rule.update).lower(params, rule.init(params), params).as_text()
    assert "coca_jax_bfloat16_orthogonalise" in text and "coca_jax_orthogonalise" not in text


def test_updates_of_a_run_are_those_of_the_reference():
    config = tiny(**{"optimizer.name": "muon"})
    gradients = nested(gradients_of(0))
    params = nested(draw(0, 0.3))
    found = []
    for form in (Reference(), Cpu()):
        rule = make_optimizer(config.optimizer, form)
        state = rule.init(params)
        for _ in range(2):
            updates, state = jax.jit(rule.update)(gradients, state, params)
        found.append(updates)
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * abs(a).max())
