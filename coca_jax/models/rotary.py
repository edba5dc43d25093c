"""Rotary positions (Su et al. 2021): queries and keys are turned by their places, so that a score
depends on how far two tokens are apart.

`Reference.rotate` (ops/reference.py) turns; this makes rotations.
A rotation is float32 [B or 1, N, K]: the cosines of a head's K / 2 angles, and their sines. Number
i of a head's first half and number i of its second one are turned together by angle i. A token at
no place, as a class token, has angles of 0. Of images the first half of the angles goes by the row
and the other by the column (Heo et al. 2024, axial).

Shape letters: B batch, N tokens, H heads, K head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def of_places(places: jax.Array, head_width: int, theta: float) -> jax.Array:
    """The rotation of places [..., N, A] along A axes, 1 in texts and 2 in images.

    theta: the longest wave is that many places over 2 pi, less a step.
    """
    axes = places.shape[-1]
    count = head_width // 2 // axes
    frequencies = theta ** -(jnp.arange(count, dtype=jnp.float32) / count)
    angles = places.astype(jnp.float32)[..., None] * frequencies
    angles = angles.reshape(places.shape[:-1] + (axes * count,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def grid(shape: tuple[int, int], own: tuple[int, int]) -> jax.Array:
    """Places [R * C, 2] of a grid of patches of R x C, row by row, in units of the model's `own`:
    the middles of patches of another number on the same picture."""
    lines = [(jnp.arange(n) + 0.5) * (known / n) - 0.5 for n, known in zip(shape, own)]
    return jnp.stack(jnp.meshgrid(*lines, indexing="ij"), -1).reshape(shape[0] * shape[1], 2)


def unturned(batch: int, count: int, head_width: int) -> jax.Array:
    """The rotation of `count` tokens at no place."""
    angles = jnp.zeros((batch, count, head_width // 2), jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
