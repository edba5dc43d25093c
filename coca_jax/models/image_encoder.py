"""The image encoder: a Vision Transformer over patches (paper Section 3.2, Table 1).

With `conv_widths` the patches are embedded by a small ConvNet instead of one product: the early
convolutions that make transformers learn from little data (Xiao et al. 2021); the paper allows any
image encoder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.config import Model, shapes
from coca_jax.config.shapes import PLACE, Size, is_packed
from coca_jax.models import block, initializers, layers
from coca_jax.models.layers import BOTTOM, STACK, Part, parameter
from coca_jax.models.onnx_encoder import OnnxEncoder
from coca_jax.ops.reference import Before, Reference
from coca_jax.parallel.sharding import constrain

# A small ConvNet in place of patches: the early convolutions with which transformers learn from
# little data (Xiao et al. 2021).


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
        init = initializers.truncated_normal((9 * channels) ** -0.5)
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
            for index in range(depth):
                name = f"block{stage}_{index}"
                x = ConvBlock(variance, self.activation, self.dtype, self.ops, name=name)(x)
                variance += RESIDUAL_GAIN**2
        return unit_activation(self.activation, variance)(x)


# Images of any shape as rows of patches (NaViT, Dehghani et al. 2023; NaFlex of SigLIP 2).
#
# An image is [N, P * P * 3 + 4]: a row of numbers a patch, flattened (row, column, channel), behind
# which stand the patch's row and column and how many rows and columns of patches its image has. Rows
# of patches that there are not, up to the budget N, are all zeros: they have 0 rows. One array so
# holds pixels, places and the mask, and goes wherever square images [S, S, 3] do.
#
# Shape letters: B batch, N patches, P their side, G side of the model's own grid, D width.


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
    et al. 2024). table_size: image size of the learned position table, 0: image_size; resample: how
    the table is fitted to images of another size, see `resample_positions`.
    rope_theta: see layers.of_places; rope_start: the first patch's row and column; rope_span: the
    side of an image, whose center is at 0, in place of one unit per patch (DINOv3).
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
    table_size: int = 0
    resample: str = "linear"
    rope_theta: float = 100.0
    rope_start: float = 0.0
    rope_span: float = 0.0
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
        patches = read(pixels) if shapes.is_packed(pixels.shape) else None
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
            x = x + (own if patches is None else table_at(own, patches)).astype(x.dtype)
            first = None if first is None else first.astype(x.dtype) + table[0].astype(x.dtype)
        rotation = self._rotation(size, patches) if options.rotary else None
        if self.patch_dropout and not deterministic:
            indices = drop_tokens(x, self.patch_dropout, self.make_rng("patch_dropout"))
            x = take_tokens(x, indices)
            rotation = None if rotation is None else take_tokens(rotation, indices)
        before = [] if first is None else [first[None].astype(x.dtype)]
        if self.registers:
            shape, axes = (self.registers, self.width), ("position", "embed")
            before.append(layers.Table(shape, axes, name="registers")().astype(x.dtype))
        if before:
            added = [jnp.broadcast_to(t, (x.shape[0], *t.shape)) for t in before]
            x = jnp.concatenate([*added, x], axis=1)
            if rotation is not None:
                still = layers.unturned(len(rotation), classes + self.registers, rotation.shape[-1])
                rotation = jnp.concatenate([still, rotation], axis=1)
        valid = valid_tokens(pixels, x.shape[1])
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
        own = shapes.pair(self.image_size)
        if shape[1:] == (*own, 3):
            return
        if (
            len(shape) == 4
            and shape[-1] == 3
            and shapes.divides(self.patch_size, (shape[1], shape[2]))
        ):
            if own[0] != own[1] or shape[1] == shape[2]:
                return
        kind = "square RGB images with a side" if own[0] == own[1] else "RGB images with sides"
        raise ValueError(
            f"pixels have shape {shape}; the model takes {kind} that is a multiple of "
            f"{shapes.words(self.patch_size)}, best {shapes.words(self.image_size)}: "
            "resize them"
        )

    def _check_packed(self, pixels: jax.Array, masked: jax.Array | None) -> None:
        """Raises ValueError for what does not go with images of any shape."""
        width = shapes.width(self._square_patch())
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
        own = shapes.grid(self.table_size or self.image_size, self.patch_size)
        classes = int(self.class_token)
        positions = layers.Table(
            (own[0] * own[1] + classes, self.width),
            axes=("position", "embed"),
            initializer=layers.grid_waves(classes, own),
            name="positions",
        )()
        grid = shapes.grid(size, self.patch_size)
        if grid == own:
            return positions
        patches = positions[classes:].reshape(*own, self.width)
        patches = resample_positions(patches, grid, self.resample).reshape(-1, self.width)
        return jnp.concatenate([positions[:classes], patches])

    def _rotation(self, size: Size, patches: Patches | None) -> jax.Array:
        """The rotation of the patches of images of a size, [1, N, K], or of any, [B, N, K]."""
        own = shapes.grid(self.image_size, self.patch_size)
        if self.rope_span:
            places = self._spanned(shapes.grid(size, self.patch_size), patches)
        elif patches is None:
            places = layers.grid(shapes.grid(size, self.patch_size), own)[None]
        else:
            places = places_of(patches, own[0])
        places = places + self.rope_start
        return layers.of_places(places, self.width // self.num_heads, self.rope_theta)

    def _spanned(self, grid: tuple[int, int], patches: Patches | None) -> jax.Array:
        """Places [B or 1, N, 2] where every image is rope_span high and wide, with 0 in its
        center."""
        if patches is None:
            # The middle of patch i of n is (i + 0.5) / n of the way across.
            lines = [(jnp.arange(n) + 0.5) / n for n in grid]
            shares = jnp.stack(jnp.meshgrid(*lines, indexing="ij"), -1).reshape(1, -1, 2)
        else:
            pairs = ((patches.row, patches.rows), (patches.column, patches.columns))
            shares = jnp.stack([(at + 0.5) / jnp.maximum(n, 1) for at, n in pairs], -1)
        return (shares - 0.5) * self.rope_span


def build(
    model: Model, image: dict[str, Any], options: layers.BlockOptions
) -> ImageEncoder | OnnxEncoder:
    """The image encoder of `config.model`; image: the fields that `config.model.image` and the run
    set."""
    sizes: dict[str, Any] = dict(image_size=model.image_size, patch_size=model.patch_size)
    path, output, digest = (image.pop(key) for key in ("onnx", "onnx_output", "onnx_sha256"))
    if not path:
        return ImageEncoder(**sizes, **image, options=options)
    sizes |= {key: image[key] for key in ("width", "class_token", "registers")}
    return OnnxEncoder(path, output, digest, **sizes, options=options)


def resample_positions(table: jax.Array, grid: tuple[int, int], how: str) -> jax.Array:
    """Positions of a grid of patches [R, C, D] -> [rows, columns, D], over the same image.

    how: 'linear' and 'cubic' (Keys' a = -0.5) average where the new grid is coarser, as PIL does;
    'bicubic' (a = -0.75) reads four points whatever the size, as torch does without antialiasing.
    """
    if how != "bicubic":
        return jax.image.resize(table, (*grid, table.shape[-1]), how)
    down, across = (_bicubic(old, new) for old, new in zip(table.shape, grid))
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("ir,jc,rcd->ijd", down, across, table, precision=exact)


def _bicubic(old: int, new: int) -> np.ndarray:
    """The weights [new, old] of bicubic interpolation along an axis; points beyond the edge are
    those at the edge."""
    a = -0.75
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(at).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        distance = np.abs(at - (first + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        # Two taps may be clipped to the same point, so they are added.
        place = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), place), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)


def patchify(pixels: jax.Array, patch_size: Size) -> jax.Array:
    """[B, S, T, 3] -> [B, N, P * Q * 3] of patches P x Q, row by row; a patch is flattened (row,
    column, channel). What is no whole patch at the right and lower edge is left out."""
    batch, height, width, channels = pixels.shape
    high, wide = shapes.pair(patch_size)
    rows, columns = shapes.grid((height, width), patch_size)
    if (rows * high, columns * wide) != (height, width):
        pixels = pixels[:, : rows * high, : columns * wide]
    x = pixels.reshape(batch, rows, high, columns, wide, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def num_remaining(length: int, rate: float) -> int:
    """How many of so many tokens are left where a share `rate` is left out: one at least."""
    return max(1, round(length * (1 - rate)))


def drop_tokens(x: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
    """A random subset of each row's tokens: [B, N, D] -> places int32 [B, num_remaining(N, rate)]."""
    batch, length, _ = x.shape
    keep = num_remaining(length, rate)
    return jnp.argsort(jax.random.uniform(rng, (batch, length)), axis=1)[:, :keep]


def take_tokens(x: jax.Array, places: jax.Array) -> jax.Array:
    """The tokens of x [B or 1, N, D] at places [B, M] -> [B, M, D]."""
    x = jnp.broadcast_to(x, (len(places), *x.shape[1:]))
    return jnp.take_along_axis(x, places[:, :, None], axis=1)


# Pixels of a batch as the model takes them.


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
    height, width = shapes.pair(size)
    if is_packed(image.shape) or image.shape[-3:-1] == (height, width):
        return image
    shape = image.shape[:-3] + (height, width, 3)
    return jax.image.resize(image.astype(jnp.float32), shape, "linear", antialias=True)
