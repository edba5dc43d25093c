"""A small ConvNet in place of patches: the early convolutions with which transformers learn from
little data (Xiao et al. 2021)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from coca_jax.models import draws
from coca_jax.models.parameter import parameter
from coca_jax.ops.reference import Before, Reference


class Convolution(nn.Module):
    """3 x 3 convolution of [B, H, W, C] with zero padding, gain and bias; stride 1 or 2.

    The kernel is standardised: zero mean and unit norm over its inputs for each output, times a
    learned gain (Qiao et al. 2019). What goes in with unit variance comes out with about the gain's
    square, so no norm of the activations is needed, which costs a pass over them.

    before: what the input goes through first.
    """

    features: int
    stride: int = 1
    gain: float = 1.0
    before: Before | None = None
    dtype: Any = jnp.float32
    ops: Reference = Reference()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        shape = (3, 3, channels, self.features)
        axes = ("kernel_row", "kernel_column", "channel", "embed")
        init = draws.truncated_normal((9 * channels) ** -0.5)
        kernel = parameter(self, "kernel", init, shape, *axes)
        gain = parameter(self, "gain", nn.initializers.constant(self.gain), shape[3:], "norm")
        bias = parameter(self, "bias", nn.initializers.zeros, shape[3:], "norm")
        kernel = standardized(kernel, gain)
        return self.ops.convolve(x, kernel, bias, self.stride, self.dtype, self.before)


def standardized(kernel: jax.Array, gain: jax.Array) -> jax.Array:
    """The kernel [3, 3, C, F] that is applied: zero mean and norm `gain` [F] over its inputs."""
    kernel = kernel - kernel.mean((0, 1, 2))
    return kernel * (gain * jax.lax.rsqrt(jnp.square(kernel).sum((0, 1, 2)) + 1e-6))


RESIDUAL_GAIN = 0.5  # of a convolutional block's second kernel


class ConvBlock(nn.Module):
    """Residual block of two 3 x 3 convolutions without norms (Brock et al. 2021).

    variance: of x at initialisation; that of the result is variance + RESIDUAL_GAIN^2. The input is
    scaled to unit variance before each convolution's activation.
    """

    variance: float
    activation: str = "gelu"
    dtype: Any = jnp.float32
    ops: Reference = Reference()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        shared = dict(dtype=self.dtype, ops=self.ops)
        before = unit_activation(self.activation, self.variance)
        y = Convolution(width, before=before, name="in", **shared)(x)
        before = unit_activation(self.activation, 1.0)
        y = Convolution(width, gain=RESIDUAL_GAIN, before=before, name="out", **shared)(y)
        return x + y.astype(x.dtype)


# One over the standard deviation of the activation of a standard normal number.
ACTIVATION_GAIN = {
    "gelu": 1.7012,
    "gelu_exact": 1.7012,
    "relu": 1.7131,
    "quick_gelu": 1.7096,
    "silu": 1.7881,
}


def unit_activation(activation: str, variance: float) -> Before:
    """The activation of what has a given variance, scaled to unit variance about its mean."""
    return Before(activation, variance**-0.5, ACTIVATION_GAIN[activation])


class ConvStem(nn.Module):
    """pixels [B, S, S, 3] -> features [B, S / 2^stages, S / 2^stages, C].

    Kernels are standardised instead of activations normalised: on few images it learns faster than
    with layer norms, and costs less.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    activation: str
    dtype: Any
    ops: Reference = Reference()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        variance = 1.0
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths)):
            before = unit_activation(self.activation, variance) if stage else None
            x = Convolution(
                width, stride=2, before=before, dtype=self.dtype, ops=self.ops, name=f"down{stage}"
            )(x)
            variance = 1.0
            for block in range(depth):
                name = f"block{stage}_{block}"
                x = ConvBlock(variance, self.activation, self.dtype, self.ops, name=name)(x)
                variance += RESIDUAL_GAIN**2
        return unit_activation(self.activation, variance)(x)
