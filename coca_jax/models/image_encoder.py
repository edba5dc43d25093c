"""The image encoder: a Vision Transformer over patches (paper Section 3.2, Table 1).

With `conv_widths` the patches are embedded by a small ConvNet instead of one product: the early
convolutions that make transformers learn from little data (Xiao et al. 2021); the paper allows any
image encoder.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from coca_jax.models import block, layers
from coca_jax.models.part import BOTTOM, STACK, Part
from coca_jax.models.stem import ConvStem
from coca_jax.partitioning import constrain

# See roles.Role.
PARTS = dict(
    stem=Part("image", "image", BOTTOM),
    patch_embedding=Part("image", "image", BOTTOM),
    positions=Part("image", "image", BOTTOM, positions="grid"),
    class_token=Part("image", "image", BOTTOM),
    pre_norm=Part("image", "image", BOTTOM),
    blocks=Part("image", "image", STACK),
    final_norm=Part("image", "image"),
)


class ImageEncoder(nn.Module):
    """pixels float [B, S, S, 3], normalised -> tokens [B, N, D] in `dtype`.

    S is image_size, or another multiple of patch_size: positions are then resampled.

    class_token, pre_norm, final_norm, patch_bias: the arrangement of open_clip's encoders against
    the paper's (no class token, no norm before the first block, a norm after the last).
    conv_widths, conv_depths: channels and residual blocks of each stage of the convolutional stem;
    each stage halves the resolution, so patch_size must be 2^stages. Empty: plain patches.
    patch_dropout: share of patches dropped in training (FLIP); needs the rng 'patch_dropout'.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    class_token: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    patch_bias: bool = True
    conv_widths: tuple[int, ...] = ()
    conv_depths: tuple[int, ...] = ()
    patch_dropout: float = 0.0
    remat: str = "none"
    options: layers.BlockOptions = layers.BlockOptions()

    @nn.compact
    def __call__(self, pixels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        side, options = pixels.shape[1], self.options
        if pixels.shape[1:] != (side, side, 3) or side % self.patch_size:
            raise ValueError(
                f"pixels have shape {pixels.shape}; the model takes square RGB images with a side "
                f"that is a multiple of {self.patch_size}, best {self.image_size}: resize them"
            )
        if self.conv_widths:
            sizes = self.conv_widths, self.conv_depths
            x = ConvStem(*sizes, options.activation, options.dtype, options.ops, name="stem")(
                pixels
            )
            x = x.reshape(x.shape[0], -1, x.shape[-1])
        else:
            x = patchify(pixels, self.patch_size)
        x = layers.Projection(
            (self.width,),
            axes=("patch", "embed"),
            use_bias=self.patch_bias,
            dtype=options.dtype,
            ops=options.ops,
            name="patch_embedding",
        )(x)
        grid = self.image_size // self.patch_size
        positions = layers.Table(
            (grid * grid + self.class_token, self.width),
            axes=("position", "embed"),
            initializer=layers.grid_waves(int(self.class_token)),
            name="positions",
        )()
        if side != self.image_size:  # a stage of a size curriculum: the same places, resampled
            patches = positions[int(self.class_token) :].reshape(grid, grid, self.width)
            shape = (side // self.patch_size,) * 2 + (self.width,)
            patches = jax.image.resize(patches, shape, "linear").reshape(-1, self.width)
            positions = jnp.concatenate([positions[: int(self.class_token)], patches])
        positions = positions.astype(x.dtype)
        x = x + positions[int(self.class_token) :]
        if self.patch_dropout and not deterministic:
            x = drop_tokens(x, self.patch_dropout, self.make_rng("patch_dropout"))
        if self.class_token:
            token = layers.Table((self.width,), axes=("norm",), name="class_token")()
            first = jnp.broadcast_to(
                token.astype(x.dtype) + positions[0], (x.shape[0], 1, self.width)
            )
            x = jnp.concatenate([first, x], axis=1)
        x = constrain(x, "batch", "length", "act_embed")
        if self.pre_norm:
            x = layers.LayerNorm(options.dtype, options.ops, name="pre_norm")(x)
        x = block.Stack(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            remat=self.remat,
            options=options,
            name="blocks",
        )(x)
        if self.final_norm:
            x = layers.LayerNorm(options.dtype, options.ops, name="final_norm")(x)
        return x


def patchify(pixels: jax.Array, patch_size: int) -> jax.Array:
    """[B, S, S, 3] -> [B, (S / P)^2, P * P * 3]; a patch is flattened (row, column, channel)."""
    batch, size, _, channels = pixels.shape
    grid = size // patch_size
    x = pixels.reshape(batch, grid, patch_size, grid, patch_size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * grid, -1)


def drop_tokens(x: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
    """Keeps a random subset of each row's tokens: [B, N, D] -> [B, round(N (1 - rate)), D]."""
    batch, length, _ = x.shape
    keep = max(1, round(length * (1 - rate)))
    order = jnp.argsort(jax.random.uniform(rng, (batch, length)), axis=1)[:, :keep]
    return jnp.take_along_axis(x, order[:, :, None], axis=1)
