"""The image encoder: a Vision Transformer over patches (paper Section 3.2, Table 1).

With `conv_widths` the patches are embedded by a small ConvNet instead of one product: the early
convolutions that make transformers learn from little data (Xiao et al. 2021); the paper allows any
image encoder.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from coca_jax import image_shape
from coca_jax.image_shape import Size
from coca_jax.models import block, layers, native, native_layout, rotary
from coca_jax.models.part import BOTTOM, STACK, Part
from coca_jax.models.stem import ConvStem
from coca_jax.partitioning import constrain

# See roles.Role.
PARTS = dict(
    stem=Part("image", "image", BOTTOM),
    patch_embedding=Part("image", "image", BOTTOM),
    positions=Part("image", "image", BOTTOM, positions="grid"),
    class_token=Part("image", "image", BOTTOM),
    registers=Part("image", "image", BOTTOM),
    mask_token=Part("image", "image", BOTTOM, optional=True, aid=True),
    pre_norm=Part("image", "image", BOTTOM),
    blocks=Part("image", "image", STACK),
    final_norm=Part("image", "image"),
)


class ImageEncoder(nn.Module):
    """pixels float [B, S, T, 3], normalised -> tokens [B, N, D] in `dtype`.

    S x T, height and width, is image_size, or of a stage of a size curriculum: positions are then
    resampled. Where patches do not divide image_size (SigLIP's 384 by 14), right and lower edges
    are cut off. Images of any shape are packed, [B, N, P * P * 3 + 4] (see native.py): tokens of
    padding say nothing, and no other token looks at them.

    class_token, pre_norm, final_norm, patch_bias: the arrangement of open_clip's encoders against
    the paper's (no class token, no norm before the first block, a norm after the last).
    conv_widths, conv_depths: channels and residual blocks of each stage of the convolutional stem;
    each stage halves the resolution, so patch_size must be 2^stages. Empty: plain patches.
    registers: learned tokens beside the patches, which nobody reads behind the last block (Darcet
    et al. 2024). rope_theta: see rotary.of_places; rope_start: the first patch's row and column.
    patch_dropout: share of patches dropped in training (FLIP); needs the rng 'patch_dropout'.
    """

    image_size: Size
    patch_size: Size
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    class_token: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    patch_bias: bool = True
    registers: int = 0
    rope_theta: float = 100.0
    rope_start: float = 0.0
    conv_widths: tuple[int, ...] = ()
    conv_depths: tuple[int, ...] = ()
    patch_dropout: float = 0.0
    remat: str = "none"
    options: layers.BlockOptions = layers.BlockOptions()

    @nn.compact
    def __call__(
        self,
        pixels: jax.Array,
        *,
        deterministic: bool = True,
        masked: jax.Array | None = None,
    ) -> jax.Array:
        """masked: bool [B, N], patches in whose place a learned token stands, or None."""
        options = self.options
        patches = native.read(pixels) if native_layout.is_packed(pixels.shape) else None
        if patches is not None:
            self._check_packed(pixels, masked)
        else:
            self._check_pixels(pixels.shape)
        size = self.image_size if patches is not None else (pixels.shape[1], pixels.shape[2])
        x = self._embedded(pixels if patches is None else patches.pixels, masked)
        classes = int(self.class_token)
        first = (
            layers.Table((self.width,), axes=("norm",), name="class_token")() if classes else None
        )
        if options.learned:
            table = self._table(size)
            own = table[classes:]
            x = x + (own if patches is None else native.table_at(own, patches)).astype(x.dtype)
            first = None if first is None else first.astype(x.dtype) + table[0].astype(x.dtype)
        rotation = self._rotation(size, patches) if options.rotary else None
        if self.patch_dropout and not deterministic:
            kept = kept_tokens(x, self.patch_dropout, self.make_rng("patch_dropout"))
            x = take_tokens(x, kept)
            rotation = None if rotation is None else take_tokens(rotation, kept)
        before = [] if first is None else [first[None].astype(x.dtype)]
        if self.registers:
            shape, axes = (self.registers, self.width), ("position", "embed")
            before.append(layers.Table(shape, axes, name="registers")().astype(x.dtype))
        if before:
            added = [jnp.broadcast_to(t, (x.shape[0], *t.shape)) for t in before]
            x = jnp.concatenate([*added, x], axis=1)
            if rotation is not None:
                still = rotary.unturned(len(rotation), classes + self.registers, rotation.shape[-1])
                rotation = jnp.concatenate([still, rotation], axis=1)
        valid = native.valid_tokens(pixels, x.shape[1])
        mask = None if valid is None else valid[:, None, None, :]
        x = constrain(x, "batch", "length", "act_embed")
        if self.pre_norm:
            x = layers.Norm(options, name="pre_norm")(x)
        x = block.Stack(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            remat=self.remat,
            options=options,
            name="blocks",
        )(x, mask=mask, rotation=rotation)
        if self.registers:
            x = jnp.concatenate([x[:, :classes], x[:, classes + self.registers :]], axis=1)
        if self.final_norm:
            x = layers.Norm(options, name="final_norm")(x)
        return x

    def _check_pixels(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError for pixels that are no images of the model's size, or of another of
        its proportions."""
        own = image_shape.pair(self.image_size)
        if shape[1:] == (*own, 3):
            return
        if (
            len(shape) == 4
            and shape[-1] == 3
            and image_shape.divides(self.patch_size, (shape[1], shape[2]))
        ):
            if own[0] != own[1] or shape[1] == shape[2]:
                return
        kind = "square RGB images with a side" if own[0] == own[1] else "RGB images with sides"
        raise ValueError(
            f"pixels have shape {shape}; the model takes {kind} that is a multiple of "
            f"{image_shape.words(self.patch_size)}, best {image_shape.words(self.image_size)}: "
            "resize them"
        )

    def _check_packed(self, pixels: jax.Array, masked: jax.Array | None) -> None:
        """Raises ValueError for what does not go with images of any shape."""
        width = native_layout.width(self._square_patch())
        if pixels.ndim != 3 or pixels.shape[-1] != width:
            raise ValueError(
                f"pixels have shape {pixels.shape}; the model takes square RGB images [B, S, S, 3] "
                f"or packed patches of {self.patch_size} x {self.patch_size}, [B, N, {width}]"
            )
        if self.conv_widths or self.patch_dropout or masked is not None:
            raise ValueError(
                "images of any shape (data.resize='native') go with neither image.conv_widths nor "
                "image.patch_dropout nor hidden patches; use plain patches, or data.resize='squash'"
            )

    def _square_patch(self) -> int:
        """The side of a patch. Raises ValueError where patches, or images, are not square."""
        if not isinstance(self.patch_size, int) or not isinstance(self.image_size, int):
            raise ValueError(
                f"packed images go with square images and patches, and this model has image_size="
                f"{self.image_size} and patch_size={self.patch_size}; give pixels of that size"
            )
        return self.patch_size

    def _embedded(self, pixels: jax.Array, masked: jax.Array | None) -> jax.Array:
        """pixels [B, S, T, 3], or patches [B, N, P * P * 3] -> [B, N, D], without positions."""
        options = self.options
        if self.conv_widths:
            sizes = self.conv_widths, self.conv_depths
            x = ConvStem(*sizes, options.activation, options.dtype, options.ops, name="stem")(
                pixels
            )
            x = x.reshape(x.shape[0], -1, x.shape[-1])
        else:
            x = pixels if pixels.ndim == 3 else patchify(pixels, self.patch_size)
        x = layers.Projection(
            (self.width,),
            axes=("patch", "embed"),
            use_bias=self.patch_bias,
            dtype=options.dtype,
            ops=options.ops,
            name="patch_embedding",
        )(x)
        if masked is None:
            return x
        token = layers.Table((self.width,), axes=("norm",), name="mask_token")()
        return jnp.where(masked[:, :, None], token.astype(x.dtype), x)

    def _table(self, size: Size) -> jax.Array:
        """The learned positions of images of a size, [class token + N, D], float32."""
        own, classes = image_shape.grid(self.image_size, self.patch_size), int(self.class_token)
        positions = layers.Table(
            (own[0] * own[1] + classes, self.width),
            axes=("position", "embed"),
            initializer=layers.grid_waves(classes, own),
            name="positions",
        )()
        grid = image_shape.grid(size, self.patch_size)
        if grid == own:
            return positions
        # A stage of a size curriculum: the same places, resampled.
        patches = positions[classes:].reshape(*own, self.width)
        patches = jax.image.resize(patches, (*grid, self.width), "linear").reshape(-1, self.width)
        return jnp.concatenate([positions[:classes], patches])

    def _rotation(self, size: Size, patches: native.Patches | None) -> jax.Array:
        """The rotation of the patches of images of a size, [1, N, K], or of any, [B, N, K]."""
        own = image_shape.grid(self.image_size, self.patch_size)
        if patches is None:
            places = rotary.grid(image_shape.grid(size, self.patch_size), own)[None]
        else:
            places = native.places_of(patches, own[0])
        places = places + self.rope_start
        return rotary.of_places(places, self.width // self.num_heads, self.rope_theta)


def patchify(pixels: jax.Array, patch_size: Size) -> jax.Array:
    """[B, S, T, 3] -> [B, N, P * Q * 3] of patches P x Q, row by row; a patch is flattened (row,
    column, channel). What is no whole patch at the right and lower edge is left out."""
    batch, height, width, channels = pixels.shape
    high, wide = image_shape.pair(patch_size)
    rows, columns = image_shape.grid((height, width), patch_size)
    if (rows * high, columns * wide) != (height, width):
        pixels = pixels[:, : rows * high, : columns * wide]
    x = pixels.reshape(batch, rows, high, columns, wide, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def num_kept(length: int, rate: float) -> int:
    """How many of so many tokens are left where a share `rate` is left out: one at least."""
    return max(1, round(length * (1 - rate)))


def kept_tokens(x: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
    """A random subset of each row's tokens: [B, N, D] -> places int32 [B, num_kept(N, rate)]."""
    batch, length, _ = x.shape
    keep = num_kept(length, rate)
    return jnp.argsort(jax.random.uniform(rng, (batch, length)), axis=1)[:, :keep]


def take_tokens(x: jax.Array, places: jax.Array) -> jax.Array:
    """The tokens of x [B or 1, N, D] at places [B, M] -> [B, M, D]."""
    x = jnp.broadcast_to(x, (len(places), *x.shape[1:]))
    return jnp.take_along_axis(x, places[:, :, None], axis=1)
