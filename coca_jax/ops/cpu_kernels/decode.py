"""Kernels for decoding on a CPU: the residual parts of a block, with weights in panels.

XLA's own products reach memory at less than half its rate when there are few rows, which is what a
step of decoding has. On two cores of an Intel Xeon with AMX captions take 2.0 times as long without
these kernels at batch 16, and 1.3 times at batch 1.

The kernels are compiled twice, for panels of float32 and of bfloat16. The latter, for processors
that multiply pairs of those, round the other operand of each product too, and image tokens; sums
and all between products are float32.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.ops.cpu_kernels import build

PANEL = 32  # columns of a panel
KERNELS = ("self_attention", "image_attention", "cached_image_attention", "mlp", "logits")
HEAD, WIDEST_HEAD = 16, 128
ACTIVATIONS = ("gelu", "gelu_exact", "relu", "quick_gelu")  # of its MLP
SOURCE = pathlib.Path(__file__).with_name("decode_kernels.cc")


def available() -> bool:
    """Whether the kernels are there: compiles and registers them at first use (`build`)."""
    return build.register(
        SOURCE, KERNELS, "Captions on this CPU will take 1.3 to 2.1 times as long as they need"
    )


def available_in_bfloat16() -> bool:
    """The same of those for bfloat16; False without a word on a processor that lacks it."""
    without = "Captions of bfloat16 models on this CPU are computed in float32, which takes longer"
    return build.register_bfloat16(SOURCE, KERNELS, without)


def panels(kernel: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """[D, F] as the kernels read it, padded with zeros: float32 [ceil(F / 32), D, 32], or bfloat16
    [ceil(F / 32), D / 2, 32, 2] of an even D."""
    depth, width = kernel.shape
    kernel = jnp.pad(kernel.astype(dtype), ((0, 0), (0, -width % PANEL)))
    if kernel.dtype == jnp.bfloat16:
        return kernel.reshape(depth // 2, 2, -1, PANEL).transpose(2, 0, 3, 1)
    return kernel.reshape(depth, -1, PANEL).transpose(1, 0, 2)


# Below, x is float32 [B, N, D], N rows of each of B images, and what comes back is x plus what is
# added to it. A norm is dict(scale=[D], bias=[D]), a dense layer dict(panels=, bias=[F]) of a
# kernel [D, F]. K, the width of a head, must be a multiple of HEAD, up to WIDEST_HEAD.


def self_attention(
    x: jax.Array,
    norm: dict,
    qkv: dict,
    out: dict,
    mask: jax.Array,
    slot: jax.Array | int,
    key: jax.Array,
    value: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention to the past: (x, key, value) with the rows' own at slots slot ... slot + N - 1.

    qkv: [D, 3 D], the score's scale in it. key, value: float32 [B, H, M, K]. mask: bool [B, N, M],
    at least one true in each row; what it hides is not read.
    """
    shapes = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (x, key, value)]
    call = jax.ffi.ffi_call(
        _target("self_attention", qkv), shapes, input_output_aliases={9: 1, 10: 2}
    )
    slot = jnp.asarray(slot, jnp.int32)
    y, key, value = call(x, *_norm(norm), *_dense(qkv), *_dense(out), mask, slot, key, value)
    return y, key, value


def image_attention(
    x: jax.Array, norm: dict, query: dict, out: dict, shared: dict, tokens: jax.Array
) -> jax.Array:
    """Attention to image tokens [B, Q, D'] that all layers share, D' = D padded to whole panels; of
    the panels' dtype.

    q (x Wk)^T = (q Wk^T) x^T, and the weights times (x Wv) are (the weights times x) Wv. That is
    more arithmetic for a row, but all layers read the same tokens, which stay in cache, where keys
    and values of every layer come from memory at every step.

    shared: dict(query=, value=), panels [H, ...] of Wk^T [K, D'] and of Wv [D', K] for each head,
    and bias=[D], the values'.
    """
    weights = (shared["query"], shared["value"], shared["bias"])
    call = jax.ffi.ffi_call(_target("image_attention", query), _like(x))
    return call(x, *_norm(norm), *_dense(query), *_dense(out), *weights, tokens)


def cached_image_attention(
    x: jax.Array, norm: dict, query: dict, out: dict, key: jax.Array, value: jax.Array
) -> jax.Array:
    """Attention to keys and values of images, float32 [B, H, Q, K]."""
    call = jax.ffi.ffi_call(_target("cached_image_attention", query), _like(x))
    return call(x, *_norm(norm), *_dense(query), *_dense(out), key, value)


def mlp(x: jax.Array, norm: dict, weights: dict, activation: str) -> jax.Array:
    """The MLP with weights["in"] and weights["out"]; activation: of ACTIVATIONS."""
    call = jax.ffi.ffi_call(_target("mlp", weights["in"]), _like(x))
    parts = (*_dense(weights["in"]), *_dense(weights["out"]))
    return call(x, *_norm(norm), *parts, activation=activation)


def log_probs(x: jax.Array, norm: dict, head: dict) -> jax.Array:
    """The log-softmax of the head of the normed x, nothing added: float32 [B, N, F]."""
    shapes = ((*x.shape[:2], head["bias"].shape[0]), x.shape[:2])
    call = jax.ffi.ffi_call(
        _target("logits", head), [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    )
    logits, log_sum_exp = call(x, *_norm(norm), *_dense(head))
    return logits - log_sum_exp[..., None]


def _target(name: str, layer: dict) -> str:
    """The kernel of that name for the panels of a layer."""
    return build.target(name, layer["panels"].dtype == jnp.bfloat16)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _norm(norm: dict) -> tuple[jax.Array, jax.Array]:
    return norm["scale"], norm["bias"]


def _dense(layer: dict) -> tuple[jax.Array, jax.Array]:
    return layer["panels"], layer["bias"]
