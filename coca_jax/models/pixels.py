"""Pixels of a batch as the model takes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from coca_jax import image_shape
from coca_jax.config import Model
from coca_jax.image_shape import Size
from coca_jax.models.native_layout import PLACE, is_packed


def normalise_pixels(image: jax.Array, model: Model) -> jax.Array:
    """[..., S, S, 3] in 0 to 255 -> float32, (x / 255 - mean) / std with the model's constants.

    Of packed images [..., N, P * P * 3 + 4] (native.py) the places stay as they are."""
    if is_packed(image.shape):
        patches = image[..., :-PLACE].reshape(*image.shape[:-1], -1, 3)
        normal = normalise_pixels(patches, model).reshape(*image.shape[:-1], -1)
        return jnp.concatenate([normal, image[..., -PLACE:].astype(jnp.float32)], -1)
    mean = jnp.asarray(model.image_mean, jnp.float32) * 255
    std = jnp.asarray(model.image_std, jnp.float32) * 255
    return (image.astype(jnp.float32) - mean) / std


def shrink(image: jax.Array, size: Size) -> jax.Array:
    """[..., S, T, 3] -> [..., height, width, 3] of `size`, averaging pixels; as it is where they
    have that size, and where images are packed."""
    height, width = image_shape.pair(size)
    if is_packed(image.shape) or image.shape[-3:-1] == (height, width):
        return image
    shape = image.shape[:-3] + (height, width, 3)
    return jax.image.resize(image.astype(jnp.float32), shape, "linear", antialias=True)
