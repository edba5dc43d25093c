"""The parts that every tower is built of: norms, projections, attention, MLP, tables.

Shape letters: B batch, N queries, M keys, D width, F MLP width, H heads, K head width, W key width.
Parameters are float32; products run in `dtype`. How an operation runs on a platform is the business
of `coca_jax.ops`: every module carries the form that was chosen for its devices as `ops`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from coca_jax.config import BLOCK, Model
from coca_jax.models import initializers
from coca_jax.ops import decode_layouts
from coca_jax.ops.reference import (
    ACTIVATIONS,
    NORM_EPSILON,
    Reference,
    attention_weights,
    merge_heads,
    split_heads,
    wide,
)
from coca_jax.parallel.sharding import constrain, with_axes

# A parameter of a module: its initialiser, its shape and the names of its axes.


def parameter(
    module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...], *axes: str
) -> jax.Array:
    """The module's parameter, float32 [*shape], drawn by `init` (key, shape) where it is not there
    yet. axes: logical names of its dimensions (see partitioning.RULES).

    Of one that is there Flax would trace the initialiser again at each call, for its shape alone: a
    thirteenth of the time in which a step is traced. Raises ValueError for another shape.
    """
    if module.is_initializing() or not module.has_variable("params", name):
        value: jax.Array = module.param(name, with_axes(init, *axes), shape)
        return value
    value = nn.meta.unbox(module.get_variable("params", name))
    if value.shape != tuple(shape):
        path = "/".join((*module.path, name))
        raise ValueError(f"parameter {path} is {list(value.shape)}, and the model's {list(shape)}")
    return value


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """What the blocks and poolers of all towers share. A key of `config.model` with the name of a
    field sets it, which config.BLOCK names too; forms written for the paper's block step aside for
    an option they do not know.

    activation: of the MLP, a key of ops.reference.ACTIVATIONS.
    gated_mlp: an MLP's activation is a gate of a second projection (Shazeer 2020).
    norm: 'layer' or 'rms' (Zhang and Sennrich 2019). norm_eps: added to the variance.
    bias: whether products and norms have one, but for those of queries and keys.
    layer_scale: what every residual part is scaled with by channel, at first (Touvron et al. 2021);
        0: no such scale.
    positions: 'learned' tables that are added, 'rope' (see rotary.py), or 'both'.
    qk_norm: RMS norm of queries and keys in each head, with a learned scale (Henry et al. 2020;
        Dehghani et al. 2023, Section 3.1); qk_norm_kind: or 'layer', LayerNorm with scale and bias.
    dtype: of products. ops: the form of the operations.
    """

    activation: str = "gelu"
    gated_mlp: bool = False
    norm: str = "layer"
    norm_eps: float = NORM_EPSILON
    bias: bool = True
    layer_scale: float = 0.0
    positions: str = "learned"
    qk_norm: bool = False
    qk_norm_kind: str = "rms"
    dtype: Any = jnp.float32
    ops: Reference = Reference()

    @classmethod
    def from_config(
        cls, model: Model, ops: Reference, own: Mapping[str, Any] | None = None
    ) -> BlockOptions:
        """The options that `config.model` sets, but for those that a tower has of its `own`.

        Raises TypeError where BLOCK of config/model.py does not name the fields of this class: a
        key that only one of both has would be read, and have no effect.
        """
        fields = {f.name for f in dataclasses.fields(cls)} - {"dtype", "ops"}
        apart = fields ^ set(BLOCK)
        if apart:
            raise TypeError(
                f"{cls.__name__} of models/layers.py and BLOCK of config/model.py differ in "
                f"{', '.join(sorted(apart))}; name it in both"
            )
        given = {name: getattr(model, name) for name in BLOCK} | dict(own or {})
        return cls(**given, dtype=jnp.dtype(model.dtype), ops=ops)

    def of_products(self) -> dict[str, Any]:
        """Fields of the projections in blocks."""
        return dict(use_bias=self.bias, dtype=self.dtype, ops=self.ops)

    def fields(self) -> dict[str, Any]:
        """{name: value}."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def beyond(self, known: Collection[str]) -> dict[str, Any]:
        """The options that are not as in the paper's block and not among `known`."""
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        return {k: v for k, v in self.fields().items() if v != usual[k] and k not in known}

    @property
    def learned(self) -> bool:
        """Whether towers have a table of positions."""
        return self.positions != "rope"

    @property
    def rotary(self) -> bool:
        """Whether positions turn queries and keys."""
        return self.positions != "learned"


# What the parameters of all modules are, by their names; see roles.Role.
LEAVES = dict(kernel="kernel", bias="bias", scale="norm", gain="norm", value="table")
BY_HEAD = ("query", "key", "value")  # projections whose outputs are heads and their width
RECORDED = "attention"  # a collection: whoever makes it mutable gets the weights of every attention


class Norm(nn.Module):
    """The options' norm over the last axis; statistics in float32, output in their dtype."""

    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options, shape = self.options, x.shape[-1:]
        scale = parameter(self, "scale", nn.initializers.ones, shape, "norm")
        if options.norm == "rms":
            return options.ops.rms_norm(x, scale, options.dtype, options.norm_eps)
        bias = None
        if options.bias:
            bias = parameter(self, "bias", nn.initializers.zeros, shape, "norm")
        return options.ops.layer_norm(x, scale, bias, options.dtype, options.norm_eps)


class LayerScale(nn.Module):
    """x [..., D] times a learned gain [D] that starts at `initial`, in x's dtype."""

    initial: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(self.initial)
        gain = parameter(self, "gain", init, x.shape[-1:], "norm")
        return x * gain.astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention over a text's past, a whole sequence, or another one.

    kv_heads: heads of keys and values, each for as many heads of queries that stand together
    (grouped-query attention, Ainslie et al. 2023); 0: as many as of queries. turned: whether calls
    bring a rotation.
    Raises ValueError when the heads do not divide the width.
    """

    width: int
    num_heads: int
    kv_heads: int = 0
    turned: bool = False
    out_scale: float = 1.0
    options: BlockOptions = BlockOptions()

    def setup(self) -> None:
        width, heads = self.width, self.num_heads
        if width % heads:
            raise ValueError(
                f"num_heads={heads} does not divide the width {width}; choose a divisor"
            )
        shape = (heads, width // heads)
        kv_shape = (self.num_kv_heads, width // heads)
        options = self.options.of_products()
        inward: dict[str, Any] = dict(axes=("embed", "heads", "head_width"), **options)
        self.query = Projection(shape, **inward)
        # Softmax does not see a constant in all scores of a query, so the bias of keys that are
        # neither normed nor turned has no gradient but rounding errors, and Adam would make
        # full-sized steps of those.
        seen = self.options.qk_norm or self.turned
        self.key = Projection(kv_shape, train_bias=seen, **inward)
        self.value = Projection(kv_shape, **inward)
        self.out = Projection(
            (width,),
            in_shape=shape,
            axes=("heads", "head_width", "embed"),
            init_scale=self.out_scale,
            **options,
        )
        if self.options.qk_norm:
            self.query_norm = HeadNorm(heads, self.options)
            self.key_norm = HeadNorm(self.num_kv_heads, self.options, train_bias=self.turned)

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.num_heads

    def queries(self, x: jax.Array, rotation: jax.Array | None = None) -> jax.Array:
        """x [B, N, D] -> [B, N, H K], turned by `rotation` (see rotary.py)."""
        query = self.query(x)
        if self.options.qk_norm:
            query = self.query_norm(query)
        if rotation is not None:
            query = self.options.ops.rotate(query, rotation, self.num_heads)
        return checkpoint_name(query, "qkv")

    def keys_and_values(
        self, context: jax.Array, rotation: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """context [B, M, W] -> two of [B, M, G K] for G heads of keys, turned by `rotation`."""
        key, value = self.key(context), self.value(context)
        if self.options.qk_norm:
            key = self.key_norm(key)
        if rotation is not None:
            key = self.options.ops.rotate(key, rotation, self.num_kv_heads)
        return checkpoint_name(key, "qkv"), checkpoint_name(value, "qkv")

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
        causal: bool = False,
        rotation: jax.Array | None = None,
    ) -> jax.Array:
        """x [B, N, D] attends to context [B, M, W], or to itself when that is None: [B, N, D].

        mask: bool, broadcastable to [B, 1, N, M], True where a query may look; causal: it sees its
        own place and before. rotation: of x, where it attends to itself.
        """
        query = self.queries(x, rotation)
        key, value = self.keys_and_values(x if context is None else context, rotation)
        if context is not None and mask is None and self.options.dtype != jnp.bfloat16:
            # Softmax does not see a constant in all keys. The query's gradient is a sum over keys
            # with weights that cancel; image tokens are much alike, and what the rounding of the
            # weights leaves of their common part was most of the float32 error of small gradients.
            key = key - jax.lax.stop_gradient(key.mean(1, keepdims=True))
        if self.num_kv_heads < self.num_heads:
            key, value = (self._for_all_heads(x) for x in (key, value))
        arrays = (query, key, value)
        query, key, value = (constrain(x, "batch", "length", "act_heads") for x in arrays)
        if self.is_mutable_collection(RECORDED) and not self.is_initializing():
            weights = attention_weights(query, key, mask, self.num_heads, causal)
            self.sow(RECORDED, "weights", weights)
        return self.out(self.options.ops.attend(query, key, value, mask, self.num_heads, causal))

    def _for_all_heads(self, x: jax.Array) -> jax.Array:
        """[B, M, G K] -> [B, M, H K]: each head for all the heads of queries that share it."""
        each = split_heads(x, self.num_kv_heads)
        return merge_heads(jnp.repeat(each, self.num_heads // self.num_kv_heads, axis=2))

    def attend_cached(
        self,
        x: jax.Array,
        cache: decode_layouts.Cache,
        mask: jax.Array | None = None,
        rotation: jax.Array | None = None,
    ) -> jax.Array:
        """x [B, N, D] attends to keys and values that are there already; mask: bool [B, N, M]."""
        (query,) = decode_layouts.split(self.queries(x, rotation), 1, self.num_heads)
        query = query.astype(jnp.float32) * query.shape[-1] ** -0.5
        return self.out(decode_layouts.attend(query, cache, mask))

    def cache(self, context: jax.Array, rotation: jax.Array | None = None) -> decode_layouts.Cache:
        """Keys and values of context [B, M, W] as `attend_cached` takes them, [B, G, M, K]."""
        joined = jnp.concatenate(self.keys_and_values(context, rotation), axis=-1)
        return decode_layouts.Cache(*decode_layouts.split(joined, 2, self.num_kv_heads))


class HeadNorm(nn.Module):
    """Norm of each head of [B, N, H K] over K by qk_norm_kind, times a scale [K]; statistics in
    float32. train_bias: whether softmax sees the bias of 'layer', see Attention.setup."""

    num_heads: int
    options: BlockOptions = BlockOptions()
    train_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = split_heads(x, self.num_heads)
        scale = parameter(self, "scale", nn.initializers.ones, heads.shape[-1:], "norm")
        exact = heads.astype(wide(x.dtype))
        if self.options.qk_norm_kind == "layer":
            bias = parameter(self, "bias", nn.initializers.zeros, heads.shape[-1:], "norm")
            bias = bias if self.train_bias else jax.lax.stop_gradient(bias)
            plain, epsilon = Reference(), self.options.norm_eps
            return merge_heads(plain.layer_norm(exact, scale, bias, x.dtype, epsilon))
        inverse = jax.lax.rsqrt(jnp.square(exact).mean(-1, keepdims=True) + self.options.norm_eps)
        return merge_heads((exact * inverse * scale).astype(x.dtype))


class Projection(nn.Module):
    """Linear map of the last axis of x to the axes `features`, side by side in one, with bias.

    The kernel has the shape in_shape + features; in_shape: () is the last axis of x as it is.
    axes: logical names of the kernel's dimensions (see partitioning.RULES).
    activation: of ACTIVATIONS, behind the bias; '': none.
    exact: float32 products are that on TPUs and GPUs too, where they round operands by default.
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
    exact: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        in_shape = self.in_shape or (width,)
        init = initializers.truncated_normal(self.init_scale * width**-0.5)
        kernel = parameter(self, "kernel", init, in_shape + self.features, *self.axes)
        # Else what the environment says counts: None here would take its place.
        exact = jax.default_matmul_precision("highest") if self.exact else contextlib.nullcontext()
        with exact:
            y = self.ops.dense(x, kernel.reshape((width, math.prod(self.features))), self.dtype)
        if not self.use_bias:
            act = ACTIVATIONS[self.activation] if self.activation else None
            return y if act is None else act(checkpoint_name(y, "mlp"))
        names = self.axes[len(in_shape) :]
        names = ("norm",) if names == ("embed",) else names  # as small as a norm: replicate
        bias = parameter(self, "bias", nn.initializers.zeros, self.features, *names)
        bias = bias if self.train_bias else jax.lax.stop_gradient(bias)
        bias = bias.astype(y.dtype).reshape(-1)
        if self.activation:
            return self.ops.bias_activation(y, bias, self.activation)
        return self.ops.add_bias(y, bias)


class Mlp(nn.Module):
    """Two-layer perceptron D -> F -> D; gated: the activation of `gate` times `in`."""

    mlp_dim: int
    out_scale: float = 1.0
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = self.options.of_products()
        inward: dict[str, Any] = dict(axes=("embed", "mlp"), **options)
        activation, shape = self.options.activation, (self.mlp_dim,)
        if self.options.gated_mlp:
            gate, hidden = (Projection(shape, name=n, **inward)(x) for n in ("gate", "in"))
            hidden = self.options.ops.gate(gate, hidden, activation)
        else:
            hidden = Projection(shape, activation=activation, name="in", **inward)(x)
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
        init = self.initializer or initializers.normal(self.init_std)
        return parameter(self, "value", init, self.shape, *self.axes)


def grid_waves(extra: int, grid: tuple[int, int]) -> Callable[..., jax.Array]:
    """Initialiser of positions [extra + R * C, D] of a grid of R x C patches: sines and cosines of
    row and column, as large as the patch embeddings, so that places can be told from the first step
    on; `extra` rows are 0.
    """

    def init(_: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
        width = shape[1]
        quarter = -(-width // 4)
        frequency = 1.0 / 10_000 ** (jnp.arange(quarter) / quarter)
        angle = jnp.arange(max(grid))[:, None] * frequency  # [G, D / 4]
        wave = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
        rows = jnp.repeat(wave[: grid[0]], grid[1], axis=0)
        columns = jnp.tile(wave[: grid[1]], (grid[0], 1))
        table = jnp.concatenate([rows, columns], axis=1)[:, :width]
        return jnp.concatenate([jnp.zeros((extra, width)), table]).astype(dtype)

    return init


class Scalar(nn.Module):
    """A learned float32 number."""

    initial: float

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("value", lambda _: jnp.asarray(self.initial, jnp.float32))


# What a module says of the parameters of its parts, beside the axes that it gives to each.


BOTTOM, STACK, TOP = "bottom", "stack", "top"  # where in its tower: below, in or above the layers


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model, by its place in the tree of parameters.

    serves: what it works for ("image", "text", "words" ...), as losses name what they train: a
    run none of whose losses does leaves it alone. tower: 'image' or 'text', as far as the
    embedding; '' for none. place: below, in or above the tower's layers, which layer decay counts.
    optional: weights to start from may lack it. aid: a loss alone reads it, so that weights for
    other programs leave it out. wide: it is computed in float32 in any case. positions: how
    positions are fitted to another size: 'grid' or 'text'.
    """

    serves: str
    tower: str = ""
    place: str = TOP
    optional: bool = False
    aid: bool = False
    wide: bool = False
    positions: str = ""


# Rotary positions (Su et al. 2021): queries and keys are turned by their places, so that a score
# depends on how far two tokens are apart.
#
# `Reference.rotate` (ops/reference.py) turns; this makes rotations.
# A rotation is float32 [B or 1, N, K]: the cosines of a head's K / 2 angles, and their sines. Number
# i of a head's first half and number i of its second one are turned together by angle i. A token at
# no place, as a class token, has angles of 0. Of images the first half of the angles goes by the row
# and the other by the column (Heo et al. 2024, axial).
#
# Shape letters: B batch, N tokens, H heads, K head width.


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
