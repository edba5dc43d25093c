"""The transformer parts every tower is built of: the only place with parameters, scan and remat.

Shape letters: B batch, N queries, M keys, D width, F MLP width, H heads, K head width, W key width.
Parameters are float32; products run in `dtype`. How an operation runs on a platform is the business
of `coca_jax.ops`: every module carries the form that was chosen for its devices as `ops`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from coca_jax.ops import packed
from coca_jax.ops.reference import NORM_EPSILON, Reference, merge_heads, split_heads, wide
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
    def from_config(cls, model: Any, ops: Reference) -> BlockOptions:
        """The options that `config.model` sets; keys that are not there keep their defaults."""
        names = [f.name for f in dataclasses.fields(cls) if f.name not in ("dtype", "ops")]
        given = {name: model[name] for name in names if name in model}
        return cls(**given, dtype=jnp.dtype(model.dtype), ops=ops)

    def fields(self) -> dict[str, Any]:
        """{name: value}."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def beyond(self, known: Collection[str]) -> dict[str, Any]:
        """The options that are set and are not among `known`."""
        return {k: v for k, v in self.fields().items() if v and k not in known}


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
        if context is not None and mask is None and key.dtype != jnp.bfloat16:
            # Softmax does not see a constant in all keys. The query's gradient is a sum over keys
            # with weights that cancel; image tokens are much alike, and what the rounding of the
            # weights leaves of their common part was most of the float32 error of small gradients.
            key = key - jax.lax.stop_gradient(key.mean(1, keepdims=True))
        arrays = (query, key, value)
        query, key, value = (constrain(x, "batch", "length", "act_heads") for x in arrays)
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


class Step(NamedTuple):
    """What a block needs to run rows of text behind those of a cache.

    cache: of its self-attention. slot: where the rows' own keys and values go. mask: bool
    [B, N, M], which slots each row may look at, its own included.
    """

    cache: packed.Cache
    slot: jax.Array | int
    mask: jax.Array


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention when `cross`, MLP.

    One description for training, prefill and cached decoding: with a `Step` in place of the mask,
    self-attention reads and writes a cache. Decoding may give packed weights for some parts, as the
    variables 'packed' (see ops/packed.py); those parts then run as one piece each.

    cross: None, 'paper' (self-attention, cross-attention, one MLP: the layout that reproduces the
    paper's parameter counts) or 'open_clip' (a full block, then cross-attention over normalised
    context with an MLP of its own).
    causal: whether self-attention sees only a token's own place and before.
    """

    width: int
    num_heads: int
    mlp_dim: int
    depth: int
    cross: str | None = None
    causal: bool = False
    options: BlockOptions = BlockOptions()

    def setup(self) -> None:
        shared: dict[str, Any] = dict(
            out_scale=(2 * self.depth) ** -0.5,  # keeps the residual stream's variance flat
            options=self.options,
        )
        norm = functools.partial(LayerNorm, dtype=self.options.dtype, ops=self.options.ops)
        attention = functools.partial(Attention, self.width, self.num_heads, **shared)
        mlp = functools.partial(Mlp, self.mlp_dim, **shared)
        self.attention_norm, self.attention = norm(), attention()
        self.mlp_norm, self.mlp = norm(), mlp()
        if self.cross is not None:
            self.cross_norm, self.cross_attention = norm(), attention()
        if self.cross == "open_clip":
            self.context_norm = norm()
            self.cross_mlp_norm, self.cross_mlp = norm(), mlp()

    def __call__(
        self, x: jax.Array, mask: jax.Array | Step | None, context: Any
    ) -> tuple[jax.Array, packed.Cache | None]:
        """x [B, N, D] -> the same, and the cache that a Step brought, written to.

        mask: bool, broadcastable to [B, 1, N, N], of self-attention, or None; a Step in decoding.
        context: [B, M, W]; in decoding what `image_cache` gives, or in panels image tokens.
        """
        x, cache = self.attend_to_text(x, mask)
        if self.cross == "open_clip":
            x = self.feed_forward(x, "mlp")
        if self.cross is not None:
            x = self.attend_to_image(x, context)
        x = self.feed_forward(x, "cross_mlp" if self.cross == "open_clip" else "mlp")
        return x, cache

    def _packed(self, part: str) -> Any:
        return self.variables.get("packed", {}).get(part)

    def _add(self, x: jax.Array, update: jax.Array) -> jax.Array:
        x = constrain(x + update.astype(x.dtype), "batch", "length", "act_embed")
        return checkpoint_name(self.options.ops.residual_stream(x), "residual")

    def attend_to_text(
        self, x: jax.Array, mask: jax.Array | Step | None
    ) -> tuple[jax.Array, packed.Cache | None]:
        """The residual part of self-attention."""
        if not isinstance(mask, Step):
            out = self.attention(self.attention_norm(x), mask=mask, causal=self.causal)
            return self._add(x, out), None
        weights = self._packed("attention")
        if weights is not None:
            return packed.self_attention(x, weights, mask.mask, mask.slot, mask.cache)
        normal = self.attention_norm(x)
        cache = packed.write(mask.cache, *self.attention.cache(normal), mask.slot)
        return self._add(x, self.attention.attend_cached(normal, cache, mask.mask)), cache

    def attend_to_image(self, x: jax.Array, context: Any) -> jax.Array:
        """The residual part of cross-attention."""
        weights = self._packed("cross_attention")
        if weights is not None:
            return packed.cross_attention(x, weights, context)
        normal = self.cross_norm(x)
        if isinstance(context, packed.Cache):
            return self._add(x, self.cross_attention.attend_cached(normal, context))
        if self.cross == "open_clip":
            context = self.context_norm(context)
        return self._add(x, self.cross_attention(normal, context))

    def feed_forward(self, x: jax.Array, part: str) -> jax.Array:
        """The residual part of an MLP: 'mlp' or 'cross_mlp'."""
        weights = self._packed(part)
        if weights is not None:
            return packed.mlp(x, weights, self.options.activation)
        mlp, norm = getattr(self, part), getattr(self, f"{part}_norm")
        return self._add(x, mlp(norm(x)))

    def image_cache(self, tokens: jax.Array) -> packed.Cache:
        """What cross-attention reads of image tokens [B, Q, D], for a whole caption."""
        weights = self._packed("cross_attention")
        if weights is not None:
            return packed.image_cache(weights, tokens, self.num_heads, self.options.dtype)
        if self.cross == "open_clip":
            tokens = self.context_norm(tokens)
        return self.cross_attention.cache(tokens.astype(self.options.dtype))


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
    remat: str = "none"
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, context: jax.Array | None = None
    ) -> jax.Array:
        ops = self.options.ops
        mask, causal = ops.prepare_mask(mask, self.causal, x.shape[1])
        fields: dict[str, Any] = dict(
            width=x.shape[-1],
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            depth=self.depth,
            cross=self.cross,
            causal=causal,
        )
        loop = ops.layer_loop(fields | self.options.fields(), self.remat)
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
            unroll=ops.unroll(self.depth),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(name="layers", options=self.options, **fields)
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
