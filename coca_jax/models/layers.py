"""The parts that every tower is built of: norms, projections, attention, MLP, tables.

Shape letters: B batch, N queries, M keys, D width, F MLP width, H heads, K head width, W key width.
Parameters are float32; products run in `dtype`. How an operation runs on a platform is the business
of `coca_jax.ops`: every module carries the form that was chosen for its devices as `ops`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from coca_jax.config import Model
from coca_jax.ops import packed
from coca_jax.ops.reference import (
    NORM_EPSILON,
    Reference,
    attention_weights,
    merge_heads,
    split_heads,
    wide,
)
from coca_jax.partitioning import constrain, with_axes


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """What the blocks and poolers of all towers share. A key of `config.model` with the name of a
    field sets it; forms written for the paper's block step aside for an option they do not know.

    activation: of the MLP, a key of ops.reference.ACTIVATIONS.
    qk_norm: RMS norm of queries and keys in each head, with a learned scale (Henry et al. 2020;
        Dehghani et al. 2023, Section 3.1).
    dtype: of products. ops: the form of the operations.
    """

    activation: str = "gelu"
    qk_norm: bool = False
    dtype: Any = jnp.float32
    ops: Reference = Reference()

    @classmethod
    def from_config(cls, model: Model, ops: Reference) -> BlockOptions:
        """The options that `config.model` sets."""
        names = [f.name for f in dataclasses.fields(cls) if f.name not in ("dtype", "ops")]
        given = {name: getattr(model, name) for name in names}
        return cls(**given, dtype=jnp.dtype(model.dtype), ops=ops)

    def fields(self) -> dict[str, Any]:
        """{name: value}."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def beyond(self, known: Collection[str]) -> dict[str, Any]:
        """The options that are set and are not among `known`."""
        return {k: v for k, v in self.fields().items() if v and k not in known}


# What the parameters of all modules are, by their names; see roles.Role.
LEAVES = dict(kernel="kernel", bias="bias", scale="norm", gain="norm", value="table")
BY_HEAD = ("query", "key", "value")  # projections whose outputs are heads and their width
RECORDED = "attention"  # a collection: whoever makes it mutable gets the weights of every attention


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
    """Multi-head attention over a text's past, a whole sequence, or another one.

    Raises ValueError when the heads do not divide the width.
    """

    width: int
    num_heads: int
    out_scale: float = 1.0
    options: BlockOptions = BlockOptions()

    def setup(self) -> None:
        width, heads = self.width, self.num_heads
        if width % heads:
            raise ValueError(
                f"num_heads={heads} does not divide the width {width}; choose a divisor"
            )
        shape = (heads, width // heads)
        options: dict[str, Any] = dict(dtype=self.options.dtype, ops=self.options.ops)
        inward: dict[str, Any] = dict(axes=("embed", "heads", "head_width"), **options)
        self.query = Projection(shape, **inward)
        # Softmax does not see a constant in all scores of a query, so the bias of keys that are not
        # normed has no gradient but rounding errors, and Adam would make full-sized steps of those.
        self.key = Projection(shape, train_bias=self.options.qk_norm, **inward)
        self.value = Projection(shape, **inward)
        self.out = Projection(
            (width,),
            in_shape=shape,
            axes=("heads", "head_width", "embed"),
            init_scale=self.out_scale,
            **options,
        )
        if self.options.qk_norm:
            self.query_norm = HeadNorm(heads)
            self.key_norm = HeadNorm(heads)

    def queries(self, x: jax.Array) -> jax.Array:
        """x [B, N, D] -> [B, N, H K]."""
        query = self.query(x)
        if self.options.qk_norm:
            query = self.query_norm(query)
        return checkpoint_name(query, "qkv")

    def keys_and_values(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """context [B, M, W] -> two of [B, M, H K]."""
        key, value = self.key(context), self.value(context)
        if self.options.qk_norm:
            key = self.key_norm(key)
        return checkpoint_name(key, "qkv"), checkpoint_name(value, "qkv")

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
        causal: bool = False,
    ) -> jax.Array:
        """x [B, N, D] attends to context [B, M, W], or to itself when that is None: [B, N, D].

        mask: bool, broadcastable to [B, 1, N, M], True where a query may look; causal: it sees its
        own place and before.
        """
        query = self.queries(x)
        key, value = self.keys_and_values(x if context is None else context)
        if context is not None and mask is None and self.options.dtype != jnp.bfloat16:
            # Softmax does not see a constant in all keys. The query's gradient is a sum over keys
            # with weights that cancel; image tokens are much alike, and what the rounding of the
            # weights leaves of their common part was most of the float32 error of small gradients.
            key = key - jax.lax.stop_gradient(key.mean(1, keepdims=True))
        arrays = (query, key, value)
        query, key, value = (constrain(x, "batch", "length", "act_heads") for x in arrays)
        if self.is_mutable_collection(RECORDED) and not self.is_initializing():
            weights = attention_weights(query, key, mask, self.num_heads, causal)
            self.sow(RECORDED, "weights", weights)
        return self.out(self.options.ops.attend(query, key, value, mask, self.num_heads, causal))

    def attend_cached(
        self, x: jax.Array, cache: packed.Cache, mask: jax.Array | None = None
    ) -> jax.Array:
        """x [B, N, D] attends to keys and values that are there already; mask: bool [B, N, M]."""
        (query,) = packed.split(self.queries(x), 1, self.num_heads)
        query = query.astype(jnp.float32) * query.shape[-1] ** -0.5
        return self.out(packed.attend(query, cache, mask))

    def cache(self, context: jax.Array) -> packed.Cache:
        """Keys and values of context [B, M, W] as `attend_cached` takes them, [B, H, M, K]."""
        joined = jnp.concatenate(self.keys_and_values(context), axis=-1)
        return packed.Cache(*packed.split(joined, 2, self.num_heads))


class HeadNorm(nn.Module):
    """RMS norm of each head of [B, N, H K] over K, times a scale [K]; statistics in float32."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = split_heads(x, self.num_heads)
        scale = self.param("scale", with_axes(nn.initializers.ones, "norm"), heads.shape[-1:])
        exact = heads.astype(wide(x.dtype))
        inverse = jax.lax.rsqrt(jnp.square(exact).mean(-1, keepdims=True) + NORM_EPSILON)
        return merge_heads((exact * inverse * scale).astype(x.dtype))


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
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options: dict[str, Any] = dict(dtype=self.options.dtype, ops=self.options.ops)
        hidden = Projection(
            (self.mlp_dim,),
            axes=("embed", "mlp"),
            activation=self.options.activation,
            name="in",
            **options,
        )(x)
        hidden = constrain(hidden, "batch", "length", "act_mlp")
        return Projection(
            x.shape[-1:], axes=("mlp", "embed"), init_scale=self.out_scale, name="out", **options
        )(hidden)


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
