"""Images of any shape as rows of patches (NaViT, Dehghani et al. 2023; NaFlex of SigLIP 2).

An image is [N, P * P * 3 + 4]: a row of numbers a patch, flattened (row, column, channel), behind
which stand the patch's row and column and how many rows and columns of patches its image has. Rows
of patches that there are not, up to the budget N, are all zeros: they have 0 rows. One array so
holds pixels, places and the mask, and goes wherever square images [S, S, 3] do.

Shape letters: B batch, N patches, P their side, G side of the model's own grid, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from coca_jax.models.native_layout import PLACE, is_packed


class Patches(NamedTuple):
    """pixels: [B, N, P * P * 3]. row, column: of the patch, rows, columns: of its image, float32
    [B, N]. valid: bool [B, N], whether there is such a patch."""

    pixels: jax.Array
    row: jax.Array
    column: jax.Array
    rows: jax.Array
    columns: jax.Array
    valid: jax.Array


def read(packed: jax.Array) -> Patches:
    """What stands in packed images [B, N, P * P * 3 + 4]."""
    pixels, place = packed[..., :-PLACE], packed[..., -PLACE:].astype(jnp.float32)
    row, column, rows, columns = (place[..., i] for i in range(PLACE))
    return Patches(pixels, row, column, rows, columns, rows > 0)


def valid_tokens(pixels: jax.Array | None, count: int) -> jax.Array | None:
    """Which of the `count` tokens of packed images [B, N, ...] are of patches that there are, or
    stand before the patches: bool [B, count]. None for square images, of which all are, and where
    there are none."""
    if pixels is None or not is_packed(pixels.shape):
        return None
    before = count - pixels.shape[1]
    return jnp.pad(read(pixels).valid, ((0, 0), (before, 0)), constant_values=True)


def mean_token(tokens: jax.Array, valid: jax.Array | None) -> jax.Array:
    """The mean of tokens [B, N, W] that are valid, bool [B, N], None being all: [B, W]."""
    if valid is None:
        return tokens.mean(1)
    weights = valid.astype(tokens.dtype)[:, :, None]
    return (tokens * weights).sum(1) / weights.sum(1)


def table_at(table: jax.Array, patches: Patches) -> jax.Array:
    """Positions [B, N, D] of patches from a table [G * G, D], which lies over the whole image
    whatever its shape: linear between its rows and columns, as they are for G x G patches."""
    side = round(len(table) ** 0.5)

    def weights(place: jax.Array, count: jax.Array) -> jax.Array:
        at = (place + 0.5) * (side / jnp.maximum(count, 1)) - 0.5
        at = jnp.clip(at, 0, side - 1)[..., None]
        return jnp.maximum(0, 1 - jnp.abs(at - jnp.arange(side)))  # [B, N, G]

    down = weights(patches.row, patches.rows)
    across = weights(patches.column, patches.columns)
    both = (down[..., :, None] * across[..., None, :]).reshape(*down.shape[:2], side * side)
    return jnp.einsum("bng,gd->bnd", both, table, precision=jax.lax.Precision.HIGHEST)


def places_of(patches: Patches, side: int) -> jax.Array:
    """Places [B, N, 2] of patches for rotary positions, as rotary.grid has them of squares: a step
    is as long down as across, an image has the area of `side` x `side` and the same middle."""
    step = side / jnp.sqrt(jnp.maximum(patches.rows * patches.columns, 1))
    middle = side / 2 - 0.5
    pairs = ((patches.row, patches.rows), (patches.column, patches.columns))
    return jnp.stack([(at + 0.5 - count / 2) * step + middle for at, count in pairs], -1)
