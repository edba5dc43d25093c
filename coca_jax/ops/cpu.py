"""Operations as XLA's CPU backend runs them best.

In bfloat16 only products run in it: their operands are rounded, their results and all between
products is float32. The backend has no bfloat16 arithmetic of its own, so that every other
operation would convert there and back, and a stack of layers is converted whole at each write.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.ops.cpu_kernels import build, conv, turn
from coca_jax.ops.cpu_kernels import muon as muon_kernels
from coca_jax.ops.reference import (
    NORM_EPSILON,
    Before,
    Reference,
    attend,
    checkpoint_name,
    convolve,
    merge_heads,
    split_heads,
    whole_mask,
    wide,
)
from coca_jax.parallel import sharding

# Since 0.10 jaxlib has two libraries for a CPU. YNNPACK's convolutions take twice the time of
# Eigen's, forward and backward; products are left to it. Without the second, both of AdamW's
# moments are copied whole before they are written in place. Without the third the zeros that loops
# add gradients to are made when a step begins, for all stacks. See docs/performance.md.
ORDER = "xla_cpu_scheduler_type"
OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "xla_cpu_copy_insertion_use_region_analysis": True,
    ORDER: "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
MOST_LOGITS = 2**25  # at a time, 128 MiB in float32


@functools.cache
def compiler_options(devices: int = 1) -> dict[str, Any]:
    """Those of OPTIONS that this jaxlib knows; of several devices, whose collectives must meet in
    one order, the compiler's own order stays."""
    wanted = OPTIONS if devices == 1 else {k: v for k, v in OPTIONS.items() if k != ORDER}
    return {name: value for name, value in wanted.items() if _known({name: value})}


def _known(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _alone() -> bool:
    """Whether all is on one device."""
    mesh = sharding.active_mesh()
    return mesh is None or mesh.size == 1


def _by_images(function: Any, images: int) -> Any | None:
    """function(images [B, ...], *weights) -> [B, ...] run by each device on its own images, as XLA
    cannot split the call of a kernel; None where `images` do not divide over the devices."""
    mesh = sharding.active_mesh()
    if mesh is None or _alone():
        return function
    if images % sharding.batch_parts(mesh):
        return None
    own, whole = sharding.spec("batch"), sharding.spec()

    def run(x: jax.Array, *weights: jax.Array) -> jax.Array:
        specs = (own,) + (whole,) * len(weights)
        split = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)
        return split(x, *weights)

    return run


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, w: jax.Array, dtype: Any, kernels: bool = False) -> jax.Array:
    """[N, D] x [D, F] multiplied in `dtype` with wide results, forward and backward. kernels: use
    `turn_kernels` where they are."""
    return jnp.dot(x.astype(dtype), w.astype(dtype), preferred_element_type=wide(dtype))


def _forward(x, w, dtype, kernels):
    return product(x, w, dtype, kernels), (x, w)


def _backward(dtype, kernels, residuals, g):
    x, w = residuals
    g = g.astype(dtype)
    result = wide(dtype)
    dx = jax.lax.dot_general(
        g, w.astype(dtype), (((1,), (1,)), ((), ())), preferred_element_type=result
    )
    dw = Cpu(kernels=kernels).weight_gradient(x, g, dtype)
    return dx.astype(x.dtype), dw.astype(w.dtype)


product.defvjp(_forward, _backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., F] plus bias [F]. The bias's gradient is a product with ones: XLA's sums over rows
    read memory at a quarter of its rate."""
    return x + bias


def _bias_backward(_: None, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return g, _column_sum(g)


add_bias.defvjp(lambda x, bias: (x + bias, None), _bias_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def normalise(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x [..., D] at mean 0 and variance 1 over D, times scale [D]; forward and backward in half the
    time that XLA's sums over rows and columns take, as all of these are products with ones."""
    return _normalise(x, scale, epsilon)[0]


def _normalise(x, scale, epsilon):
    centred = x - _row_mean(x)
    inverse = jax.lax.rsqrt(_row_mean(jnp.square(centred)) + epsilon)
    unit = centred * inverse
    return unit * scale, (unit, inverse, scale)


def _normalise_backward(epsilon, residuals, g):
    unit, inverse, scale = residuals
    scaled = g * scale
    dx = (scaled - _row_mean(scaled) - unit * _row_mean(scaled * unit)) * inverse
    return dx, _column_sum(g * unit)


normalise.defvjp(_normalise, _normalise_backward)


def _row_mean(x: jax.Array) -> jax.Array:
    """The mean over the last axis, [..., D] -> [..., 1]."""
    depth = x.shape[-1]
    rows = x.reshape(-1, depth) @ jnp.full((depth, 1), 1 / depth, x.dtype)
    return rows.reshape(*x.shape[:-1], 1)


def _column_sum(x: jax.Array) -> jax.Array:
    """The sum over all axes but the last, [..., D] -> [D]."""
    rows = x.reshape(-1, x.shape[-1])
    return (jnp.ones((1, rows.shape[0]), x.dtype) @ rows)[0]


@jax.custom_vjp
def layer_by_bits(stack: jax.Array, number: jax.Array) -> jax.Array:
    """Layer `number` of bfloat16 [L, ...], as integers: XLA has no slices of bfloat16 here, and
    would convert the whole stack to float32 at each call, and every slice of that back."""
    bits = jax.lax.bitcast_convert_type(stack, jnp.uint16)
    layer = jax.lax.dynamic_index_in_dim(bits, number, keepdims=False)
    return jax.lax.bitcast_convert_type(layer, jnp.bfloat16)


def _layer_backward(residuals: tuple, g: jax.Array) -> tuple[jax.Array, None]:
    stack, number = residuals
    return jnp.zeros_like(stack).at[number].set(g), None


layer_by_bits.defvjp(lambda stack, i: (layer_by_bits(stack, i), (stack, i)), _layer_backward)


@dataclasses.dataclass(frozen=True)
class Cpu(Reference):
    """Two-dimensional products: XLA repacks the operands of batched ones on a CPU.

    kernels: use `conv_kernels`, which XLA did not make itself.
    """

    kernels: bool = True

    @property
    def description(self) -> str:
        return "CPU: two-dimensional products with float32 results"

    @property
    def remat(self) -> str:
        return "named"  # writing and reading the stacks costs more than computing again

    def begin_kernels(
        self, dtype: Any, convolutions: bool, muon: bool = False
    ) -> Sequence[Future[Any]]:
        if not self.kernels or build.switched_off():
            return ()
        halves = jnp.dtype(dtype) == jnp.bfloat16
        used = [turn] if halves and _alone() else []
        either = [conv] * convolutions + [muon_kernels] * (muon and _alone())
        define = build.BFLOAT16 if halves and build.multiplies_bfloat16() else ""
        begun = [build.begin(kernels.SOURCE, "") for kernels in used]
        return [*begun, *(build.begin(kernels.SOURCE, define) for kernels in either)]

    def stream_dtype(self, dtype: Any) -> Any:
        return wide(dtype)

    def kernel_dtype(self, dtype: Any) -> Any:
        return wide(dtype)

    @property
    def layer_of(self) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
        return layer_by_bits

    def dense(self, x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
        rows = product(x.reshape((-1, x.shape[-1])), kernel, jnp.dtype(dtype), self.kernels)
        return rows.reshape(x.shape[:-1] + kernel.shape[1:])

    def weight_gradient(self, x: jax.Array, g: jax.Array, dtype: Any) -> jax.Array:
        halves = dtype == jnp.bfloat16 and _alone()
        if self.kernels and halves and turn.available():
            return turn.weight_gradient(x, g)
        return super().weight_gradient(x, g, dtype)

    def orthogonalise(
        self, x: jax.Array, coefficients: jax.Array, iterations: int, dtype: Any
    ) -> jax.Array:
        if self.kernels and _alone() and muon_kernels.fits(x):
            halves = jnp.dtype(dtype) == jnp.bfloat16 and muon_kernels.available_in_bfloat16()
            if halves or muon_kernels.available():
                return muon_kernels.orthogonalise(x, coefficients, iterations, halves)
        return super().orthogonalise(x, coefficients, iterations, dtype)

    def caption_chunk(self, tokens: int, vocab: int) -> int:
        parts = max(1, -(-tokens * vocab // MOST_LOGITS))
        return -(-tokens // parts)

    def convolve(
        self,
        x: jax.Array,
        kernel: jax.Array,
        bias: jax.Array,
        stride: int,
        dtype: Any,
        before: Before | None = None,
    ) -> jax.Array:
        # With float32 results also of rounded operands, and of an image's few channels too: XLA
        # would convert bfloat16 to and fro.
        result = wide(dtype)
        kernels = self.kernels and result == jnp.float32 and conv.fits(x, kernel, stride)
        halves = kernels and dtype == jnp.bfloat16 and conv.available_in_bfloat16()
        relu = before is not None and before.name == "relu" and x.dtype == jnp.float32
        rectify = relu and (halves or dtype == jnp.float32)
        run = functools.partial(conv.convolve, stride=stride, rectify=rectify, halves=halves)
        there = kernels and (halves or conv.available())
        run = _by_images(run, x.shape[0]) if there else None
        if run is not None and rectify:  # a ReLU commutes with its factors, the kernel's as well
            kernel = kernel * (before.scale * before.gain)
        elif before:
            x = before(x)
        if not halves or run is None:
            x, kernel = (a.astype(dtype).astype(result) for a in (x, kernel))
        if run is None:
            return self.add_bias(convolve(x, kernel, stride), bias.astype(result))
        return run(*(a.astype(result) for a in (x, kernel, bias)))

    def add_bias(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        return add_bias(x, bias)

    def layer_norm(
        self,
        x: jax.Array,
        scale: jax.Array,
        bias: jax.Array | None,
        dtype: Any,
        epsilon: float = NORM_EPSILON,
    ) -> jax.Array:
        y = normalise(x.astype(wide(x.dtype)), scale, epsilon)
        return (y if bias is None else add_bias(y, bias)).astype(wide(dtype))

    def rms_norm(self, x: jax.Array, scale: jax.Array, dtype: Any, epsilon: float) -> jax.Array:
        return super().rms_norm(x, scale, wide(dtype), epsilon)

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None,
        heads: int,
        causal: bool = False,
    ) -> jax.Array:
        mask = whole_mask(mask, causal, query.shape[1])
        query, key, value = (split_heads(x, heads) for x in (query, key, value))
        out = attend(query, key, value, mask, wide(value.dtype))
        return checkpoint_name(merge_heads(out), "attended")
