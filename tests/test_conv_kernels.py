"""The convolutions of a CPU's own against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs_bfloat16
from kernel_forms import forms

from coca_jax import ops
from coca_jax.ops.cpu import Cpu
from coca_jax.ops.cpu_kernels import conv
from coca_jax.ops.reference import Before, Reference
from coca_jax.parallel import sharding

RELU = Before("relu", 0.8, 1.7)
GELU = Before("gelu", 0.8, 1.7)


@pytest.fixture(autouse=True)
def compiler():
    if not conv.available():
        pytest.skip("no C++ compiler")


def _gradients(form, x, kernel, bias, stride, before, dtype=jnp.float32):
    """Result and gradients of a weighted sum of it."""
    x, kernel, bias = (np.asarray(a, np.float32) for a in (x, kernel, bias))
    shape = (x.shape[0], x.shape[1] // stride, x.shape[2] // stride, kernel.shape[3])
    weights = np.random.default_rng(7).normal(size=shape).astype(dtype).astype(np.float32)

    def loss(x, kernel, bias):
        y = form.convolve(x, kernel, bias, stride, dtype, before)
        return (weights * y).sum(), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, y), gradients = run(x, kernel, bias)
    return y, *gradients


def _arrays(batch, height, width, channels, features):
    rng = np.random.default_rng(height * channels + features)
    x = rng.normal(size=(batch, height, width, channels))
    return x, rng.normal(size=(3, 3, channels, features)), rng.normal(size=features)


SHAPES = [  # batch, height, width, channels, features, stride
    (2, 48, 48, 3, 32, 2),  # pixels
    (3, 12, 12, 64, 128, 2),
    (5, 6, 6, 128, 128, 1),  # channels in two pieces, two panels
    (40, 4, 4, 16, 16, 1),  # more images than are summed together, one vector of columns
    (18, 12, 12, 16, 16, 1),  # the same where images are summed in chunks
    (2, 10, 26, 24, 80, 1),  # not square; a panel and a narrower one
    (2, 10, 26, 7, 176, 2),  # 2 panels, 48 more columns; channels of no whole line
    (1, 2, 2, 5, 16, 2),  # a row whose every tap but one lies outside
    (1, 2, 2, 70, 16, 1),
    (3, 6, 34, 16, 48, 2),  # rows of 17 pixels, in which two tiles have one in common
]


def assert_equal(got, want, rounded=0.0):
    """rounded: relative error of the gradients of the operands."""
    for of, (a, b) in enumerate(zip(want, got, strict=True)):
        assert a.shape == b.shape and b.dtype == jnp.float32
        rtol = rounded if of in (1, 2) else 0.0
        np.testing.assert_allclose(b, a, rtol=rtol, atol=1e-5 * abs(a).max(), err_msg=str(of))


@pytest.mark.parametrize("before", [None, RELU, GELU])
@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_and_its_gradients_equal_the_reference(shape, before):
    *shape, stride = shape
    arrays = _arrays(*shape)
    want = _gradients(Reference(), *arrays, stride, before)
    assert_equal(_gradients(Cpu(), *arrays, stride, before), want)


@needs_bfloat16
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_rounds_operands_alone(shape):
    """Those of the gradients' products too, whose g here needs none; the plain form rounds their
    results as well. Factors that are a power of two change no rounding of the kernel, whose they
    become."""
    *shape, stride = shape
    arrays = _arrays(*shape)
    steps = (None, Before("relu", 0.5, 4.0), GELU)
    plain = [_gradients(Cpu(kernels=False), *arrays, stride, s, jnp.bfloat16) for s in steps]
    for form in forms(conv):
        with form:
            for before, want in zip(steps, plain):
                got = _gradients(Cpu(), *arrays, stride, before, jnp.bfloat16)
                assert_equal(got, want, 2**-8)


@needs_bfloat16
def test_a_gradient_in_bfloat16_is_rounded():
    """To the nearest of it, ties to even, also of an odd number of images."""
    g = jnp.float32(1) + jnp.float32([1, 3, 4, 5]) / 256  # halves of a step, and less, and more
    x, kernel = jnp.zeros((3, 2, 2, 1)).at[:, 0, 0].set(1.0), jnp.zeros((3, 3, 1, 16))
    run = functools.partial(conv.convolve, stride=1, rectify=False, halves=True)
    _, back = jax.vjp(run, x, kernel, jnp.zeros(16))
    _, of_kernel, of_bias = back(jnp.zeros((3, 2, 2, 16)).at[:, 0, 0, :4].set(g))
    np.testing.assert_array_equal(
        of_kernel[1, 1, 0, :4], 3 * g.astype(jnp.bfloat16).astype(jnp.float32)
    )
    np.testing.assert_array_equal(of_bias[:4], 3 * g)  # a sum, no product


DTYPES = [jnp.float32, pytest.param(jnp.bfloat16, marks=needs_bfloat16)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_batch_nor_on_the_run(dtype):
    """An image's own result is the same in any batch; a gradient the same at each call."""
    x, kernel, bias = _arrays(9, 12, 12, 32, 64)
    first = _gradients(Cpu(), x, kernel, bias, 1, RELU, dtype)
    for _again in range(3):
        for a, b in zip(first, _gradients(Cpu(), x, kernel, bias, 1, RELU, dtype)):
            np.testing.assert_array_equal(a, b)
    few = Cpu().convolve(jnp.float32(x[4:6]), jnp.float32(kernel), bias, 1, dtype, RELU)
    np.testing.assert_array_equal(few, first[0][4:6])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_gives_nan_out(dtype):
    """Where the reference has it, in the result and in the gradient of the kernel: what goes wrong
    is seen."""
    x, kernel, bias = _arrays(2, 4, 4, 16, 16)
    x[1, 1, 1, 3] = np.nan
    want = _gradients(Reference(), x, kernel, bias, 1, RELU)
    got = _gradients(Cpu(), x, kernel, bias, 1, RELU, dtype)
    for a, b in zip(want, got):
        np.testing.assert_array_equal(np.isnan(b), np.isnan(a))
    assert np.isnan(got[0]).sum() == 9 * 16 and np.isnan(got[2]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_each_device_convolves_its_own_images(shape, dtype):
    """As one device does, gradients of what all devices share included."""
    x, kernel, bias = _arrays(8, 8, 8, 16, 32)
    alone = _gradients(Cpu(), x, kernel, bias, 2, RELU, dtype)
    with jax.set_mesh(sharding.make_mesh(*shape, jax.devices()[: np.prod(shape)])):
        split = _gradients(Cpu(), x, kernel, bias, 2, RELU, dtype)
    for a, b in zip(alone, split):
        np.testing.assert_allclose(b, a, atol=1e-5 * abs(a).max())


def test_what_the_kernel_is_called_for():
    x, kernel, bias = (jnp.float32(a) for a in _arrays(8, 8, 8, 16, 32))

    def calls(form, images=8):
        run = jax.jit(lambda x: form.convolve(x, kernel, bias, 1, jnp.float32, RELU))
        return "coca_jax_convolution" in run.lower(x[:images]).as_text()

    assert calls(Cpu())
    assert not calls(ops.choose("cpu", "xla"))
    with jax.set_mesh(sharding.make_mesh(2, 1, 1, jax.devices()[:2])):
        assert calls(Cpu())
        assert not calls(Cpu(), images=3)  # not evenly over the devices
