"""The transformer parts every tower is built of: the only place with parameters, scan and remat.

Shape letters: B batch, N queries, M keys, D width, F MLP width, H heads, K head width, W key width.
Parameters are float32; products run in `dtype`. How an operation runs on a platform is the business
of `coca_jax.ops`: every module carries the form that was chosen for its devices as `ops`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from coca_jax.ops.reference import ACTIVATIONS, Reference
from coca_jax.partitioning import constrain, with_axes


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis; statistics in float32, output in `dtype`."""

    dtype: Any = jnp.float32
    ops: Reference = Reference()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        scale = self.param("scale", with_axes(nn.initializers.ones, "norm"), (width,))
        bias = self.param("bias", with_axes(nn.initializers.zeros, "norm"), (width,))
        return self.ops.layer_norm(x, scale, bias, self.dtype)


class Attention(nn.Module):
    """Multi-head attention of x [B, N, D] over context [B, M, W] (self-attention when None).

    Raises ValueError when the heads do not divide the width.
    """

    num_heads: int
    out_scale: float = 1.0
    dtype: Any = jnp.float32
    ops: Reference = Reference()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
        causal: bool = False,
    ) -> jax.Array:
        """mask: bool, broadcastable to [B, 1, N, M], True where a query may look; causal: it sees
        its own place and before."""
        width, heads = x.shape[-1], self.num_heads
        if width % heads:
            raise ValueError(
                f"num_heads={heads} does not divide the width {width}; choose a divisor"
            )
        crosses = context is not None
        context = x if context is None else context

        def head_projection(name: str, source: jax.Array) -> jax.Array:
            dense = Projection(
                (heads, width // heads),
                axes=("embed", "heads", "head_width"),
                # Softmax does not see a constant in all scores of a query, so the key bias has no
                # gradient but rounding errors, and Adam would make full-sized steps of those.
                train_bias=name != "key",
                dtype=self.dtype,
                ops=self.ops,
            )
            return checkpoint_name(dense.copy(name=name)(source), "qkv")

        query = head_projection("query", x)
        key = head_projection("key", context)
        value = head_projection("value", context)
        if crosses and mask is None and key.dtype != jnp.bfloat16:
            # Softmax does not see a constant in all keys. The query's gradient is a sum over keys
            # with weights that cancel; image tokens are much alike, and what the rounding of the
            # weights leaves of their common part was most of the float32 error of small gradients.
            key = key - jax.lax.stop_gradient(key.mean(1, keepdims=True))
        query, key, value = (
            constrain(x, "batch", "length", "act_heads") for x in (query, key, value)
        )
        out = self.ops.attend(query, key, value, mask, heads, causal)
        return Projection(
            (width,),
            in_shape=(heads, width // heads),
            axes=("heads", "head_width", "embed"),
            init_scale=self.out_scale,
            dtype=self.dtype,
            ops=self.ops,
            name="out",
        )(out)


class Projection(nn.Module):
    """Linear map of the last axis of x to the axes `features`, side by side in one, with bias.

    The kernel has the shape in_shape + features; in_shape: () is the last axis of x as it is.
    axes: logical names of the kernel's dimensions (see partitioning.RULES).
    activation: of ACTIVATIONS, behind the bias; '': none.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    in_shape: tuple[int, ...] = ()
    use_bias: bool = True
    train_bias: bool = True
    init_scale: float = 1.0
    activation: str = ""
    dtype: Any = jnp.float32
    ops: Reference = Reference()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        in_shape = self.in_shape or (width,)
        kernel = self.param(
            "kernel",
            with_axes(nn.initializers.truncated_normal(self.init_scale * width**-0.5), *self.axes),
            in_shape + self.features,
        )
        y = self.ops.dense(x, kernel.reshape((width, math.prod(self.features))), self.dtype)
        if not self.use_bias:
            return y
        names = self.axes[len(in_shape) :]
        names = ("norm",) if names == ("embed",) else names  # as small as a norm: replicate
        bias = self.param("bias", with_axes(nn.initializers.zeros, *names), self.features)
        bias = bias if self.train_bias else jax.lax.stop_gradient(bias)
        bias = bias.astype(y.dtype).reshape(-1)
        if self.activation:
            return self.ops.bias_activation(y, bias, self.activation)
        return self.ops.add_bias(y, bias)


class Mlp(nn.Module):
    """Two-layer perceptron D -> F -> D."""

    mlp_dim: int
    out_scale: float = 1.0
    activation: str = "gelu"
    dtype: Any = jnp.float32
    ops: Reference = Reference()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options: dict[str, Any] = dict(dtype=self.dtype, ops=self.ops)
        hidden = Projection(
            (self.mlp_dim,),
            axes=("embed", "mlp"),
            activation=self.activation,
            name="in",
            **options,
        )(x)
        hidden = constrain(hidden, "batch", "length", "act_mlp")
        return Projection(
            x.shape[-1:], axes=("mlp", "embed"), init_scale=self.out_scale, name="out", **options
        )(hidden)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention when `cross`, MLP.

    cross: None, 'paper' (self-attention, cross-attention, one MLP: the layout that reproduces the
    paper's parameter counts) or 'open_clip' (a full block, then cross-attention over normalised
    context with an MLP of its own).
    causal: whether self-attention sees only a token's own place and before.
    """

    num_heads: int
    mlp_dim: int
    depth: int
    cross: str | None = None
    causal: bool = False
    activation: str = "gelu"
    dtype: Any = jnp.float32
    ops: Reference = Reference()

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, context: jax.Array | None
    ) -> tuple[jax.Array, None]:
        options: dict[str, Any] = dict(
            out_scale=(2 * self.depth) ** -0.5,  # keeps the residual stream's variance flat
            dtype=self.dtype,
            ops=self.ops,
        )
        norm = functools.partial(LayerNorm, dtype=self.dtype, ops=self.ops)
        attention = functools.partial(Attention, self.num_heads, **options)
        mlp = functools.partial(Mlp, self.mlp_dim, activation=self.activation, **options)

        def add(x: jax.Array, update: jax.Array) -> jax.Array:
            x = constrain(x + update.astype(x.dtype), "batch", "length", "act_embed")
            return checkpoint_name(self.ops.residual_stream(x), "residual")

        normal = norm(name="attention_norm")(x)
        x = add(x, attention(name="attention")(normal, mask=mask, causal=self.causal))
        if self.cross == "open_clip":
            x = add(x, mlp(name="mlp")(norm(name="mlp_norm")(x)))
            context = norm(name="context_norm")(context)
        if self.cross is not None:
            query = norm(name="cross_norm")(x)
            x = add(x, attention(name="cross_attention")(query, context))
        if self.cross == "open_clip":
            x = add(x, mlp(name="cross_mlp")(norm(name="cross_mlp_norm")(x)))
        else:
            x = add(x, mlp(name="mlp")(norm(name="mlp_norm")(x)))
        return x, None


class Convolution(nn.Module):
    """3 x 3 convolution of [B, H, W, C] with zero padding, gain and bias; stride 1 or 2.

    The kernel is standardised: zero mean and unit norm over its inputs for each output, times a
    learned gain (Qiao et al. 2019). What goes in with unit variance comes out with about the gain's
    square, so no norm of the activations is needed, which costs a pass over them.
    """

    features: int
    stride: int = 1
    gain: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        kernel = self.param(
            "kernel",
            with_axes(
                nn.initializers.truncated_normal((9 * channels) ** -0.5),
                *("kernel_row", "kernel_column", "channel", "embed"),
            ),
            (3, 3, channels, self.features),
        )
        gain_init = nn.initializers.constant(self.gain)
        gain = self.param("gain", with_axes(gain_init, "norm"), (self.features,))
        bias = self.param("bias", with_axes(nn.initializers.zeros, "norm"), (self.features,))
        kernel = kernel - kernel.mean((0, 1, 2))
        kernel = kernel * (gain * jax.lax.rsqrt(jnp.square(kernel).sum((0, 1, 2)) + 1e-6))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if channels <= 4:  # of an image: convolutions of so few channels are slow on every device
            y = unfold(x, self.stride) @ kernel.reshape(-1, self.features)
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                window_strides=(self.stride, self.stride),
                padding=((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return y + bias.astype(y.dtype)


def unfold(x: jax.Array, stride: int) -> jax.Array:
    """[B, H, W, C] -> [B, H / stride, W / stride, 9 C]: what a 3 x 3 kernel sees of zero-padded x,
    in the order (row, column, channel)."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        padded[:, row : row + height : stride, column : column + width : stride]
        for row in range(3)
        for column in range(3)
    ]
    return jnp.concatenate(shifted, -1)


RESIDUAL_GAIN = 0.5  # of a convolutional block's second kernel


class ConvBlock(nn.Module):
    """Residual block of two 3 x 3 convolutions without norms (Brock et al. 2021).

    variance: of x at initialisation; that of the result is variance + RESIDUAL_GAIN^2. The input is
    scaled to unit variance before each convolution's activation.
    """

    variance: float
    activation: str = "gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = unit_activation(x, self.activation, self.variance)
        y = Convolution(width, dtype=self.dtype, name="in")(y)
        y = unit_activation(y, self.activation, 1.0)
        y = Convolution(width, gain=RESIDUAL_GAIN, dtype=self.dtype, name="out")(y)
        return x + y.astype(x.dtype)


# One over the standard deviation of the activation of a standard normal number.
ACTIVATION_GAIN = {"gelu": 1.7012, "gelu_exact": 1.7012, "relu": 1.7131, "quick_gelu": 1.7096}


def unit_activation(x: jax.Array, activation: str, variance: float) -> jax.Array:
    """The activation of x, whose variance is given, scaled to unit variance about its mean."""
    return ACTIVATIONS[activation](x * variance**-0.5) * ACTIVATION_GAIN[activation]


REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # What costs products or reductions to make again; norms, softmax and GELU are recomputed.
    "named": jax.checkpoint_policies.save_only_these_names(
        "qkv", "attended", "mlp", "residual", "statistics"
    ),
    "full": None,  # save nothing but each block's input
}


class Stack(nn.Module):
    """`depth` blocks with parameters stacked on a leading axis, run by one scan.

    remat: 'none' | 'dots' (save the products) | 'named' (save the tensors that are dear to make
    again) | 'full' (save only each block's input). causal: of self-attention.
    """

    depth: int
    num_heads: int
    mlp_dim: int
    cross: str | None = None
    causal: bool = False
    activation: str = "gelu"
    remat: str = "none"
    dtype: Any = jnp.float32
    ops: Reference = Reference()

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, context: jax.Array | None = None
    ) -> jax.Array:
        mask, causal = self.ops.prepare_mask(mask, self.causal, x.shape[1])
        fields: dict[str, Any] = dict(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            depth=self.depth,
            cross=self.cross,
            causal=causal,
            activation=self.activation,
            dtype=self.dtype,
            ops=self.ops,
        )
        loop = self.ops.layer_loop(fields, self.remat)
        if loop is not None and not self.is_initializing():
            return loop(self.variables["params"]["layers"], x, mask, context)
        block: Any = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.depth,
            unroll=self.ops.unroll(self.depth),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(name="layers", **fields)
        return layers(x, mask, context)[0]


class Table(nn.Module):
    """A learned array: embeddings, positions, queries.

    init_std: of its normal initialiser; initializer: another one in its stead.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init_std: float = 0.02
    initializer: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self) -> jax.Array:
        init = self.initializer or nn.initializers.normal(self.init_std)
        return self.param("value", with_axes(init, *self.axes), self.shape)


def grid_waves(extra: int) -> Callable[..., jax.Array]:
    """Initialiser of positions [extra + G * G, D]: sines and cosines of row and column, as large as
    the patch embeddings, so that places can be told from the first step on; `extra` rows are 0.
    """

    def init(_: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
        count, width = shape
        side = round((count - extra) ** 0.5)
        quarter = -(-width // 4)
        frequency = 1.0 / 10_000 ** (jnp.arange(quarter) / quarter)
        angle = jnp.arange(side)[:, None] * frequency  # [G, D / 4]
        wave = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
        rows = jnp.repeat(wave, side, axis=0)
        columns = jnp.tile(wave, (side, 1))
        table = jnp.concatenate([rows, columns], axis=1)[:, :width]
        return jnp.concatenate([jnp.zeros((extra, width)), table]).astype(dtype)

    return init


class Scalar(nn.Module):
    """A learned float32 number."""

    initial: float

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("value", lambda _: jnp.asarray(self.initial, jnp.float32))
