"""Operations as an NVIDIA GPU runs them best: cuDNN's attention, GELU with its bias in one pass.

Products keep bfloat16 results, as cuBLAS makes them, norms keep their statistics for the gradient,
and layers are not looped over: by the roofline of the compiled step (docs/performance.md) a loop
costs more in slices of stacked tensors than it saves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from coca_jax.ops.reference import (
    ACTIVATIONS,
    CUBE,
    NORM_EPSILON,
    SLOPE,
    Reference,
    gelu_slope,
    log_once,
    merge_heads,
    split_heads,
    wide,
)
from coca_jax.parallel import sharding

AT_MOST_ONCE = "at_most_once"  # the scope of loops of one turn or none (estimate/gpu.py)
# Triton's products take the activation's place in cuBLAS's (`_activated`).
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
WIDEST_HEAD = 128  # of cuDNN's attention on every architecture that has it; in multiples of 8


@dataclasses.dataclass(frozen=True)
class Gpu(Reference):
    """cudnn: whether attention is cuDNN's; False leaves it to XLA."""

    cudnn: bool = True

    @property
    def description(self) -> str:
        attention = "cuDNN attention" if self.cudnn else "XLA's attention"
        return f"GPU: {attention}, fused bias and GELU, layers unrolled"

    def dense(self, x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
        # Of three-dimensional products XLA transposes operands for the gradient of the kernel.
        rows = x.astype(dtype).reshape((-1, x.shape[-1]))
        return jnp.dot(rows, kernel.astype(dtype)).reshape(x.shape[:-1] + kernel.shape[1:])

    def bias_activation(self, x: jax.Array, bias: jax.Array, activation: str) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])  # as the product has them, which takes the activation in
        return bias_activation(rows, bias, activation).reshape(x.shape)

    def gate(self, gate: jax.Array, x: jax.Array, activation: str) -> jax.Array:
        return gated(gate, x, activation)

    def rotate(self, x: jax.Array, rotation: jax.Array, heads: int) -> jax.Array:
        # Halves change places by a reversal, which a pass over x takes in; slices and what joins
        # them would be written, and so would their gradients.
        precision = wide(x.dtype)
        halves = x.reshape((*x.shape[:2], heads, 2, -1)).astype(precision)
        cos, sin = jnp.split(rotation[:, :, None, None].astype(precision), 2, -1)
        across = jnp.concatenate([-sin, sin], -2)
        turned = halves * cos + jax.lax.rev(halves, (3,)) * across
        return turned.astype(x.dtype).reshape(x.shape)

    def prepare_mask(
        self, mask: jax.Array | None, causal: bool, length: int
    ) -> tuple[jax.Array | None, bool]:
        return (mask, causal) if self.cudnn else super().prepare_mask(mask, causal, length)

    def layer_norm(
        self,
        x: jax.Array,
        scale: jax.Array,
        bias: jax.Array | None,
        dtype: Any,
        epsilon: float = NORM_EPSILON,
    ) -> jax.Array:
        plain = bias is None or epsilon != NORM_EPSILON  # not as the form below has it
        if x.dtype == dtype == jnp.bfloat16 and not plain:
            return layer_norm(x, scale, bias)
        return super().layer_norm(x, scale, bias, dtype, epsilon)

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None,
        heads: int,
        causal: bool = False,
    ) -> jax.Array:
        # A mask [1] of integers is the number of keys that are no padding (`pad_sequences`).
        width = query.shape[2] // heads
        why = _refusal(query.dtype, width) if self.cudnn else "switched off"
        if why:
            if self.cudnn:
                log_once(f"attention of {heads} heads of {width} runs without cuDNN: {why}")
            return super().attend(query, key, value, mask, heads, causal)
        query, key, value = (split_heads(x, heads) for x in (query, key, value))
        return checkpoint_name(
            merge_heads(library_attention(query, key, value, mask, causal)), "attended"
        )

    def add_update(self, x: jax.Array, update: jax.Array) -> jax.Array:
        mesh = sharding.active_mesh()
        if mesh is None or mesh.size == 1:
            return _add_rows(x, update)
        if x.shape[0] % sharding.batch_parts(mesh):
            return super().add_update(x, update)
        # On each device by itself: a constraint on layouts is not split, the whole batch would be
        # gathered for it.
        own = sharding.spec("batch", "length", "act_embed")
        add = jax.shard_map(
            _add_rows, mesh=mesh, in_specs=(own, own), out_specs=own, check_vma=False
        )
        return add(x, update)

    def pad_sequences(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        rotation: jax.Array | None,
        heads: int,
        causal: bool,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        # Once a stack, where `library_attention` would pad queries, keys and values of each layer.
        length = x.shape[1]
        if length % 2 == 0 or not self.cudnn or _refusal(x.dtype, x.shape[2] // heads):
            return x, mask, rotation
        if mask is not None:
            queries = int(mask.shape[2] > 1)
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 1)))
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, queries), (0, 0)), constant_values=True)
        elif not causal:
            mask = jnp.full((1,), length, jnp.int32)
        if rotation is not None:
            rotation = jnp.pad(rotation, ((0, 0), (0, 1), (0, 0)))
        return jnp.pad(x, ((0, 0), (0, 1), (0, 0))), mask, rotation

    def run_if(self, wanted: jax.Array, function: Callable[[Any], Any], carry: Any) -> Any:
        # A loop works in place; of a condition XLA copies what goes in and what comes out.
        with jax.named_scope(AT_MOST_ONCE):
            return jax.lax.fori_loop(0, wanted.astype(jnp.int32), lambda _, c: function(c), carry)

    def for_next_product(self, x: jax.Array) -> jax.Array:
        return x  # cuBLAS reads its operands from memory: one is made for all products

    def unroll(self, depth: int) -> int:
        # Deeper stacks take the compiler too long at once: loops of as many layers as divide them.
        return depth if depth <= 24 else max(n for n in range(1, 9) if depth % n == 0)


def _add_rows(x: jax.Array, update: jax.Array) -> jax.Array:
    # As rows: of the sum of three-dimensional arrays cuBLAS's product makes a copy of x first. Left
    # to itself XLA lays the stream out with the batch inside, and transposes it for every product.
    rows = (a.reshape(-1, a.shape[-1]) for a in (x, update.astype(x.dtype)))
    out = with_layout_constraint(jnp.add(*rows), Layout(major_to_minor=(0, 1)))
    return out.reshape(x.shape)


def _refusal(dtype: jnp.dtype, head_width: int) -> str:
    """Why cuDNN's attention does not take such heads; '' where it does."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and not {jnp.dtype(dtype).name}"
    if head_width % 8 or head_width > WIDEST_HEAD:
        return f"it takes heads as wide as a multiple of 8 up to {WIDEST_HEAD}"
    return ""


def library_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    causal: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """jax.nn's attention [B, N, H, K] x [B, M, H, K] -> [B, N, H, K], for shapes cuDNN takes.

    cuDNN takes no odd lengths with a mask in training, and no single query; jax refuses odd lengths
    without one too (0.10.2 takes its empty bias for one). So queries and keys are padded to an even
    number; where neither a mask nor the causal order hides a padded key, cuDNN is told how many
    there are. mask: as of `Gpu.attend`.
    """
    count, keys = query.shape[1], key.shape[1]
    lengths = None
    if mask is not None and mask.ndim == 1:
        lengths, mask = jnp.broadcast_to(mask, query.shape[:1]), None
    elif keys % 2 and mask is None and not causal:
        lengths = jnp.full(query.shape[:1], keys, jnp.int32)
    if count % 2:
        query = _pad(query, 1)
    if keys % 2:
        key, value = _pad(key, 1), _pad(value, 1)
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0),) * 3 + ((0, 1),))  # padded keys are hidden
    if mask is not None:
        if mask.shape[2] == 1:  # cuDNN takes it by query
            mask = jnp.broadcast_to(mask, mask.shape[:2] + (query.shape[1], mask.shape[3]))
        elif mask.shape[2] < query.shape[1]:
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=True)
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return out[:, :count]


def _pad(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def bias_activation(x: jax.Array, bias: jax.Array, activation: str) -> jax.Array:
    """An activation of ACTIVATIONS of x [..., F] plus bias [F], in x's dtype. For the gradient only
    their sum is kept."""
    return _activated(x + bias, activation)


def _activated(hidden: jax.Array, activation: str) -> jax.Array:
    if activation != "gelu":
        return ACTIVATIONS[activation](hidden)
    # In these very steps and in the dtype of the product XLA takes it, and the bias, as a part of
    # cuBLAS's product, which computes it of its float32 sums and writes `hidden` beside it.
    cubed = hidden * (hidden * hidden)
    return hidden * (0.5 * (1 + jnp.tanh(SLOPE * (hidden + CUBE * cubed))))


def _slope(hidden: jax.Array, activation: str) -> jax.Array:
    """The derivative of an activation, float32 at least."""
    if activation == "gelu":
        return gelu_slope(hidden)
    exact = hidden.astype(wide(hidden.dtype))
    return jax.jvp(ACTIVATIONS[activation], (exact,), (jnp.ones_like(exact),))[1]


def _forward(x, bias, activation):
    hidden = _named(x + bias, "mlp")
    return _activated(hidden, activation), (hidden, bias)


def _named(x: jax.Array, name: str) -> jax.Array:
    """checkpoint_name(x, name) by its bits: floats that it keeps jax rounds to their dtype, which
    stands between a product and what cuBLAS would take in."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, name), x.dtype)


def _backward(activation, saved, g):
    # Without the barrier the forward pass would save tanh in float32 for this one, four bytes a
    # number to write and to read, where making it again costs nothing beside the memory.
    hidden, bias = jax.lax.optimization_barrier(saved)
    # A product in the dtype itself: of float32 rounded behind it the compiler would store float32
    # for the sum; like this both come out of one pass.
    dx = g * _slope(hidden, activation).astype(hidden.dtype)
    d_bias = dx.astype(wide(dx.dtype)).sum(tuple(range(dx.ndim - 1)))
    return dx, d_bias.astype(bias.dtype)


bias_activation.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(gate: jax.Array, x: jax.Array, activation: str) -> jax.Array:
    """An activation of ACTIVATIONS of `gate` [..., F] times x [..., F]. For the gradient these two
    are kept, and both gradients come out of one pass; GELU is a part of the product that makes
    `gate`, see _activated."""
    return _gated_forward(gate, x, activation)[0]


def _gated_forward(gate, x, activation):
    gate, x = _named(gate, "mlp"), _named(x, "mlp")
    return _activated(gate, activation) * x, (gate, x)


def _gated_backward(activation, saved, g):
    gate, x = jax.lax.optimization_barrier(saved)
    exact = gate.astype(wide(gate.dtype))
    value = ACTIVATIONS[activation](exact).astype(gate.dtype)
    slope = _slope(gate, activation).astype(gate.dtype)
    return jax.lax.optimization_barrier((g * x * slope, g * value))


gated.defvjp(_gated_forward, _gated_backward)


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """[..., D] normalised over D, times scale plus bias (float32 [D]), in x's dtype; statistics in
    float32. They are kept for the gradient, so that its sums over rows are one pass each."""
    return _norm_forward(x, scale, bias)[0]


def _norm_forward(x, scale, bias):
    # Both sums in one pass, of the distances from the row's first number: the mean of their squares
    # is at most D + 1 times the variance, so that float32 cancels little however far the mean is.
    exact = x.astype(jnp.float32)
    first = exact[..., :1]
    away = (exact - first).mean(-1, keepdims=True)
    mean = first + away
    variance = jnp.square(exact - first).mean(-1, keepdims=True) - jnp.square(away)
    inverse = jax.lax.rsqrt(variance + NORM_EPSILON)
    mean, inverse = (checkpoint_name(s, "statistics") for s in (mean, inverse))
    y = (exact - mean) * inverse * scale + bias
    return y.astype(x.dtype), (x, mean, inverse, scale)


def _norm_backward(saved, g):
    # Without the barrier the statistics are made again for every sum, and x minus its mean stored.
    x, mean, inverse, scale = jax.lax.optimization_barrier(saved)
    normal = (x.astype(jnp.float32) - mean) * inverse
    g = g.astype(jnp.float32)
    rows = tuple(range(x.ndim - 1))
    d_scale, d_bias = (g * normal).sum(rows), g.sum(rows)
    scaled = g * scale
    along = (scaled * normal).mean(-1, keepdims=True)
    dx = inverse * (scaled - scaled.mean(-1, keepdims=True) - normal * along)
    return dx.astype(x.dtype), d_scale, d_bias


layer_norm.defvjp(_norm_forward, _norm_backward)
