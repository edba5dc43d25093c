"""The operations of the model in plain JAX: the definition that every other form is tested against.

A form is a class with these methods; the modules of `models/` hold one and call nothing else. Forms
of a platform derive from this one and replace what runs better in another way there.

Shape letters: B batch, N queries, M keys, D width, F MLP width, H heads, K head width (D = H K).
Products run in the dtype that is asked for; norm statistics and softmax run in float32 (in float64
where the inputs are, for checks; see `wide`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

NORM_EPSILON = 1e-5

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=True),
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": nn.silu,
}


class Before(NamedTuple):
    """What is done to the input of a convolution: `gain` times an activation of `scale` times it.

    name: of ACTIVATIONS.
    """

    name: str
    scale: float
    gain: float

    def __call__(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.name](x * self.scale) * self.gain


@functools.cache
def log_once(text: str) -> None:
    """A warning in the log, once a process for each text."""
    logging.getLogger("coca_jax").warning("%s", text)


def wide(dtype: Any) -> Any:
    """The dtype of sums, norms and softmax beside products in `dtype`: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B, N, H K] -> [B, N, H, K]."""
    return x.reshape(x.shape[:2] + (heads, x.shape[2] // heads))


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, N, H, K] -> [B, N, H K]."""
    return x.reshape(x.shape[:2] + (x.shape[2] * x.shape[3],))


def causal_mask(queries: int, keys: int) -> jax.Array:
    """bool [1, 1, N, M], True where a query may look: at its own place and before."""
    return (jnp.arange(queries)[:, None] >= jnp.arange(keys))[None, None]


def whole_mask(mask: jax.Array | None, causal: bool, length: int) -> jax.Array | None:
    """A mask [B, 1, N, M] and, when `causal`, the order of `length` tokens in one."""
    if not causal:
        return mask
    order = causal_mask(length, length)
    return order if mask is None else mask & order


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    result: Any = None,
) -> jax.Array:
    """Softmax attention [B, N, H, K] x [B, M, H, K] -> [B, N, H, K]; softmax in float32.

    mask: bool, broadcastable to [B, H, N, M]; True where a query may look. result: its dtype;
    default: value's.
    """
    weights = weigh(query, key, mask).astype(value.dtype)
    precision = wide(query.dtype)
    out = jnp.einsum("bhnm,bmhk->bnhk", weights, value, preferred_element_type=precision)
    return out.astype(result or value.dtype)


def weigh(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The weights of `attend`, [B, H, N, M], each row's sum 1, float32 at least."""
    # float32 scores in any case: bfloat16 outputs are slow on the CPU.
    precision = wide(query.dtype)
    # Heads first would be faster on one CPU device, but several on few cores then wait for each
    # other in collectives until XLA aborts.
    scores = jnp.einsum("bnhk,bmhk->bhnm", query, key, preferred_element_type=precision)
    scores = scores * query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(precision).min)
    return jax.nn.softmax(scores, axis=-1)


def attention_weights(
    query: jax.Array, key: jax.Array, mask: jax.Array | None, heads: int, causal: bool = False
) -> jax.Array:
    """The weights that `Reference.attend` gives to the same arguments, [B, H, N, M]."""
    mask = whole_mask(mask, causal, query.shape[1])
    return weigh(split_heads(query, heads), split_heads(key, heads), mask)


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


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """See Reference.convolve; by XLA's convolution, in the dtype of both."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


SLOPE, CUBE = math.sqrt(2 / math.pi), 0.044715  # of GELU by tanh (Hendrycks and Gimpel 2016)


def gelu(hidden: jax.Array) -> jax.Array:
    """GELU by its tanh approximation, computed in float32, in the dtype of `hidden`."""
    wide = hidden.astype(jnp.float32)
    tanh = jnp.tanh(wide * (SLOPE + (SLOPE * CUBE) * (wide * wide)))
    return (0.5 * wide * (1 + tanh)).astype(hidden.dtype)


def gelu_slope(hidden: jax.Array) -> jax.Array:
    """The derivative of `gelu` at `hidden` [..., F], float32."""
    wide = hidden.astype(jnp.float32)
    square = wide * wide
    tanh = jnp.tanh(wide * (SLOPE + (SLOPE * CUBE) * square))
    steep = wide * (2 * SLOPE + (6 * SLOPE * CUBE) * square)
    sigmoid = 0.5 + 0.5 * tanh
    return sigmoid * (1 + (0.5 - 0.5 * tanh) * steep)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Plain JAX on any platform. Frozen and hashable: modules carry it as a field."""

    @property
    def description(self) -> str:
        """What runs, for people."""
        return "plain JAX"

    @property
    def remat(self) -> str:
        """The remat policy of stacks where none is asked for, see block.REMAT_POLICIES."""
        return "none"

    def dense(self, x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
        """x [..., I] times kernel [I, O] -> [..., O], product and result in `dtype`."""
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        return jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), contract)

    def stream_dtype(self, dtype: Any) -> Any:
        """The dtype of what lies between products that run in `dtype`."""
        return jnp.dtype(dtype)

    def kernel_dtype(self, dtype: Any) -> Any:
        """The dtype that stacked kernels are cast to, once a step, for products in `dtype`."""
        return jnp.dtype(dtype)

    def convolve(
        self,
        x: jax.Array,
        kernel: jax.Array,
        bias: jax.Array,
        stride: int,
        dtype: Any,
        before: Before | None = None,
    ) -> jax.Array:
        """x [B, H, W, C], or before(x), convolved with a kernel [3, 3, C, F], zeros around it, plus
        bias [F] -> [B, H / stride, W / stride, F], product and result in `dtype`; stride 1 or 2, H
        and W even.
        """
        x = (before(x) if before else x).astype(dtype)
        kernel = kernel.astype(dtype)
        if x.shape[-1] <= 4:  # of an image: convolutions of so few channels are slow everywhere
            y = unfold(x, stride) @ kernel.reshape(-1, kernel.shape[-1])
        else:
            y = convolve(x, kernel, stride)
        return self.add_bias(y, bias.astype(y.dtype))

    def add_bias(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x [..., O] plus bias [O], both of one dtype."""
        return x + bias

    def bias_activation(self, x: jax.Array, bias: jax.Array, activation: str) -> jax.Array:
        """An activation of ACTIVATIONS of x [..., F] plus bias [F], in x's dtype."""
        return ACTIVATIONS[activation](checkpoint_name(self.add_bias(x, bias), "mlp"))

    def gate(self, gate: jax.Array, x: jax.Array, activation: str) -> jax.Array:
        """An activation of ACTIVATIONS of `gate` [..., F] times x [..., F], in their dtype."""
        gate, x = checkpoint_name((gate, x), "mlp")
        return ACTIVATIONS[activation](gate) * x

    def layer_norm(
        self,
        x: jax.Array,
        scale: jax.Array,
        bias: jax.Array | None,
        dtype: Any,
        epsilon: float = NORM_EPSILON,
    ) -> jax.Array:
        """x [..., D] normalised over D, times scale plus bias (float32 [D]), in `dtype`."""
        x = x.astype(wide(x.dtype))
        mean = x.mean(-1, keepdims=True)
        centred = x - mean
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + epsilon) * scale
        return (y if bias is None else y + bias).astype(dtype)

    def rms_norm(self, x: jax.Array, scale: jax.Array, dtype: Any, epsilon: float) -> jax.Array:
        """x [..., D] over its root mean square over D, times scale (float32 [D]), in `dtype`
        (Zhang and Sennrich 2019)."""
        x = x.astype(wide(x.dtype))
        inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
        return (x * inverse * scale).astype(dtype)

    def rotate(self, x: jax.Array, rotation: jax.Array, heads: int) -> jax.Array:
        """x [B, N, H K] turned by a rotation [B or 1, N, K] (models/layers.py), in x's dtype."""
        precision = wide(x.dtype)
        cos, sin = jnp.split(rotation[:, :, None].astype(precision), 2, -1)
        first, second = jnp.split(split_heads(x, heads).astype(precision), 2, -1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
        return merge_heads(turned.astype(x.dtype))

    def prepare_mask(
        self, mask: jax.Array | None, causal: bool, length: int
    ) -> tuple[jax.Array | None, bool]:
        """The mask of self-attention over `length` tokens as `attend` takes it, made once a stack.

        mask: bool, broadcastable to [B, 1, N, M], or None. Returns (mask, causal): a form whose
        attention knows causal order by itself leaves both apart.
        """
        return whole_mask(mask, causal, length), False

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None,
        heads: int,
        causal: bool = False,
    ) -> jax.Array:
        """Softmax attention [B, N, D] x [B, M, D] -> [B, N, D], heads side by side along D.

        mask: bool, broadcastable to [B, 1, N, M]; True where a query may look. causal: besides, a
        query sees its own place and before. Softmax in float32; the result in value's dtype.
        """
        mask = whole_mask(mask, causal, query.shape[1])
        query, key, value = (split_heads(x, heads) for x in (query, key, value))
        return checkpoint_name(merge_heads(attend(query, key, value, mask)), "attended")

    def add_update(self, x: jax.Array, update: jax.Array) -> jax.Array:
        """The residual stream x [B, N, D] plus what a part of a block makes of it, in x's dtype."""
        return x + update.astype(x.dtype)

    def pad_sequences(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        rotation: jax.Array | None,
        heads: int,
        causal: bool,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """What a stack of self-attention over x [B, N, D] gets, with as many rows behind each
        sequence as the form wants, hidden from the others: x, mask and rotation [B or 1, N, K].

        mask: bool, broadcastable to [B, 1, N, M], or None; causal: of the stack.
        """
        del heads, causal
        return x, mask, rotation

    def run_if(self, wanted: jax.Array, function: Callable[[Any], Any], carry: Any) -> Any:
        """function(carry) where `wanted`, bool [], holds, and `carry` as it is elsewhere."""
        return jax.lax.cond(wanted, function, lambda unchanged: unchanged, carry)

    def weight_gradient(self, x: jax.Array, g: jax.Array, dtype: Any) -> jax.Array:
        """x [N, D] turned times g [N, F], multiplied in `dtype` -> [D, F], summed and kept wide."""
        sums = (((0,), (0,)), ((), ()))
        x, g = x.astype(dtype), g.astype(dtype)
        return jax.lax.dot_general(x, g, sums, preferred_element_type=wide(dtype))

    def orthogonalise(
        self, x: jax.Array, coefficients: jax.Array, iterations: int, dtype: Any
    ) -> jax.Array:
        """x [L, M, N], M <= N, each matrix of norm 1 -> nearly orthogonal ones of the same singular
        vectors, by Muon's iterations (Jordan et al. 2024): x <- a x + (b s + c s s) x of s = x x^T
        and coefficients a, b, c. dtype: the model's; a form may round operands of products to it.
        """
        del dtype
        a, b, c = coefficients.astype(x.dtype)

        def iterate(_: Any, x: jax.Array) -> jax.Array:
            square = x @ x.swapaxes(1, 2)
            return a * x + (b * square + c * square @ square) @ x

        return jax.lax.fori_loop(0, iterations, iterate, x)

    def begin_kernels(
        self, dtype: Any, convolutions: bool, muon: bool = False
    ) -> Sequence[Future[Any]]:
        """Begins to compile, beside other work, the kernels that are compiled on this machine and
        that a train step of a model in `dtype` calls. convolutions: whether its stem has some;
        muon: whether the optimizer calls `orthogonalise`. What it gives is done when they are."""
        del dtype, convolutions, muon
        return ()

    def caption_chunk(self, tokens: int, vocab: int) -> int:
        """How many tokens the softmax layer takes at a time where `tokens` are allowed, of logits
        over `vocab` ids."""
        del vocab
        return tokens

    def for_next_product(self, x: jax.Array) -> jax.Array:
        """x, from which a second product makes its operand: another array to the compiler, so that
        each product makes its operand on the way in and none is stored."""
        return jax.lax.optimization_barrier(x)

    def unroll(self, depth: int) -> int:
        """How many layers of a stack are one body of its loop."""
        del depth
        return 1

    @property
    def layer_of(self) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
        """What takes layer i of bfloat16 parameters [L, ...], where a scan's own way is slow."""
        return None

    def layer_loop(self, block: dict[str, Any], remat: str) -> Callable[..., jax.Array] | None:
        """A loop over a stack's layers written out for a platform, or None: a scan of Block.

        block: the fields of block.Block. The loop takes (parameters stacked over layers, x, mask,
        context) and returns x.
        """
        del block, remat
        return None
