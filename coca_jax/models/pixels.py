"""Pixels of a batch as the model takes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from coca_jax.config import Model


def normalise_pixels(image: jax.Array, model: Model) -> jax.Array:
    """[..., S, S, 3] in 0 to 255 -> float32, (x / 255 - mean) / std with the model's constants."""
    mean = jnp.asarray(model.image_mean, jnp.float32) * 255
    std = jnp.asarray(model.image_std, jnp.float32) * 255
    return (image.astype(jnp.float32) - mean) / std


def shrink(image: jax.Array, size: int) -> jax.Array:
    """[..., S, S, 3] -> [..., size, size, 3], averaging pixels; as it is when S = size."""
    if image.shape[-2] == size:
        return image
    shape = image.shape[:-3] + (size, size, 3)
    return jax.image.resize(image.astype(jnp.float32), shape, "linear", antialias=True)
