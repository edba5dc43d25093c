"""Cached decoding with packed weights: the residual parts of a block, each as few products.

A step of decoding runs a few rows through every weight, so it is the reading of weights that takes
the time. Packed, they lie in the form in which they are read best: query, key and value are one
matrix with the score's 1 / sqrt(K) in it, and a matrix is a dict whose key names its form:

  kernel      [D, F], as XLA multiplies on an accelerator.
  transposed  [F, D], multiplied from the left. XLA's product on a CPU packs its right operand at
              each call, which then is the few rows of a step and not the matrix.
  panels      blocks of 32 columns for `cpu/decode_kernels`, which run a part in one call; float32,
              or in the layout 'bfloat16_panels' bfloat16.

Every dict may have a bias too. `block.Block` says in which order the parts run; it asks `knows`
which of its parts were packed, and runs the others by its own modules.

Shape letters: B images, N rows of an image, M cache slots, D width, F outputs, H heads, K head
width, Q image tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from coca_jax.ops.cpu_kernels import decode
from coca_jax.ops.reference import ACTIVATIONS, NORM_EPSILON

NEVER = -1e30  # score of what must not be seen or chosen; a sum of many of them is still finite
STREAMED = 2**23  # parameters of a text decoder that no cache holds: 32 MiB of them

# How matrices are packed; 'reference' packs none, and Block's own modules decode.
Layout = Literal["reference", "kernel", "transposed", "panels", "bfloat16_panels"]
LAYOUTS = ("reference", "kernel", "transposed", "panels", "bfloat16_panels")
PANELS = {"panels": jnp.float32, "bfloat16_panels": jnp.bfloat16}  # their dtypes


class Cache(NamedTuple):
    """Keys and values of one attention, [B, H, M, K]."""

    key: jax.Array
    value: jax.Array


def choose_layout(
    platform: str,
    implementation: str,
    *,
    num_weights: int,
    head_widths: set[int],
    mlp_widths: set[int],
    dtype: str,
) -> Layout:
    """The layout in which decoding is fastest.

    platform: of the devices; implementation, dtype: of the model. num_weights: of the text
    decoder. 'panels' is for weights that no cache holds: a small model's are in cache, where the
    kernels gain nothing, and compiling them would delay its first caption by seconds.
    """
    if implementation == "reference":
        return "reference"
    if platform != "cpu":
        return "kernel"
    fits = all(k % decode.HEAD == 0 and k <= decode.WIDEST_HEAD for k in head_widths)
    # XLA cannot split the kernels' calls over several devices.
    alone = jax.device_count() == 1 and fits
    if implementation == "auto" and alone and num_weights >= STREAMED:
        halves = dtype == "bfloat16" and all(width % 2 == 0 for width in mlp_widths)
        if halves and decode.available_in_bfloat16():
            return "bfloat16_panels"
        if decode.available():
            return "panels"
    return "transposed"


def pack_matrix(kernel: jax.Array, bias: jax.Array | None, dtype: Any, layout: Layout) -> dict:
    """One matrix [D, F] with its bias [F] in the form of a layout, in `dtype`; panels in their own.

    A bias stays float32.
    """
    kernel = kernel.astype(dtype)
    if layout in PANELS:
        packed = dict(panels=decode.panels(kernel, PANELS[layout]))
    else:
        packed = dict(transposed=kernel.T) if layout == "transposed" else dict(kernel=kernel)
    return packed if bias is None else packed | dict(bias=bias.reshape(-1))


def standardise(x: jax.Array) -> jax.Array:
    """x [..., D] less its mean over its standard deviation, float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + NORM_EPSILON)


def norm(weights: dict, x: jax.Array) -> jax.Array:
    """Layer norm with dict(scale=, bias=), float32; or, beside its `epsilon`, what lies under the
    key `layer`, perhaps without bias, or `rms`."""
    if "epsilon" in weights:
        x = x.astype(jnp.float32)
        inner = weights["rms"] if "rms" in weights else weights["layer"]
        centred = x if "rms" in weights else x - x.mean(-1, keepdims=True)
        square = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(square + weights["epsilon"]) * inner["scale"]
        return y + inner["bias"] if "bias" in inner else y
    return standardise(x) * weights["scale"] + weights["bias"]


def dense(weights: dict, x: jax.Array) -> jax.Array:
    """x [..., D] -> float32 [..., F], one product with a matrix that is not in panels."""
    if "transposed" in weights:
        kernel = weights["transposed"]
        rows = x.reshape(-1, x.shape[-1]).astype(kernel.dtype)
        count = rows.shape[0]
        if isinstance(count, int) and count > 4:  # vectors of 8: 6 rows take longer than 8
            rows = jnp.pad(rows, ((0, -count % 8), (0, 0)))
        y = jax.lax.dot_general(
            kernel, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        # Without the barrier the compiler turns the transposed product back into rows @ kernel.
        y = jax.lax.optimization_barrier(y)[:, :count].T
    else:
        kernel = weights["kernel"]
        rows = x.reshape(-1, x.shape[-1]).astype(kernel.dtype)
        y = jnp.dot(rows, kernel, preferred_element_type=jnp.float32)
    y = y.reshape(x.shape[:-1] + y.shape[-1:])
    return y + weights["bias"] if "bias" in weights else y


def split(x: jax.Array, parts: int, heads: int) -> list[jax.Array]:
    """[B, N, parts D] -> parts x [B, H, N, K]."""
    batch, length, width = x.shape
    x = x.reshape(batch, length, parts, heads, width // parts // heads)
    return [x[:, :, i].transpose(0, 2, 1, 3) for i in range(parts)]


def write(cache: Cache, key: jax.Array, value: jax.Array, slot: jax.Array | int) -> Cache:
    """The cache with keys and values [B, H, N, K] at slots slot ... slot + N - 1."""
    zero = jnp.int32(0)  # with jax_enable_x64 a 0 would be int64, and all must be of one type
    start = (zero, zero, jnp.asarray(slot, jnp.int32), zero)
    return Cache(
        jax.lax.dynamic_update_slice(cache.key, key.astype(cache.key.dtype), start),
        jax.lax.dynamic_update_slice(cache.value, value.astype(cache.value.dtype), start),
    )


def attend(query: jax.Array, cache: Cache, mask: jax.Array | None) -> jax.Array:
    """[B, H, N, K] over a cache [B, G, M, K] -> [B, N, H K], float32; the query has the scale in
    it. Where G is less than H, H / G heads of queries one after another share a head of keys. mask:
    bool [B, N, M]."""
    key, value = cache
    batch, heads, rows, width = query.shape
    each = heads // key.shape[1]
    if each > 1:  # heads that share keys are more rows to them
        query = query.reshape(batch, heads // each, each * rows, width)
        mask = None if mask is None else jnp.tile(mask, (1, each, 1))
    scores = jnp.einsum(
        "bhnk,bhmk->bhnm", query.astype(key.dtype), key, preferred_element_type=jnp.float32
    )
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, NEVER)
    # Divided after the product: at many rows a pass over the weights costs a third of attention.
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = jnp.einsum(
        "bhnm,bhmk->bhnk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    out = out / weights.sum(-1, keepdims=True)
    out = out.reshape(batch, heads, rows, width)
    return out.transpose(0, 2, 1, 3).reshape(batch, rows, -1)


# The residual parts of a block. x: float32 [B, N, D]; what comes back is x plus what is added.


def self_attention(
    x: jax.Array, weights: dict, mask: jax.Array, slot: jax.Array | int, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Attention to a text's past: x, and the cache with the rows' own at `slot`. mask: bool
    [B, N, M], which slots each row may look at, its own included."""
    if "panels" in weights["qkv"]:
        parts = weights["norm"], weights["qkv"], weights["out"]
        x, *cache_ = decode.self_attention(x, *parts, mask, slot, *cache)
        return x, Cache(*cache_)
    heads = cache.key.shape[1]
    query, key, value = split(dense(weights["qkv"], norm(weights["norm"], x)), 3, heads)
    cache = write(cache, key, value, slot)
    return x + dense(weights["out"], attend(query, cache, mask)), cache


def cross_attention(x: jax.Array, weights: dict, image: Cache | jax.Array) -> jax.Array:
    """Attention to an image: its keys and values, or in panels its tokens, see `image_cache`."""
    if "panels" in weights["query"]:
        parts = weights["norm"], weights["query"], weights["out"]
        if isinstance(image, Cache):
            return decode.cached_image_attention(x, *parts, *image)
        return decode.image_attention(x, *parts, weights["shared"], image)
    assert isinstance(image, Cache)
    heads = image.key.shape[1]
    (query,) = split(dense(weights["query"], norm(weights["norm"], x)), 1, heads)
    return x + dense(weights["out"], attend(query, image, None))


def image_cache(weights: dict, tokens: jax.Array, heads: int, dtype: Any) -> Cache:
    """Keys and values of image tokens [B, Q, D], by a block's packed cross-attention, in `dtype`;
    in panels float32, which the kernels read."""
    if "context_norm" in weights:
        tokens = norm(weights["context_norm"], tokens)
    key, value = split(dense(weights["kv"], tokens), 2, heads)
    if "panels" in weights["query"]:
        return Cache(key, value)
    return Cache(key.astype(dtype), value.astype(dtype))


def shared_tokens(tokens: jax.Array, standard: bool, dtype: Any) -> jax.Array:
    """Image tokens [B, Q, D] as all blocks in panels of `dtype` read them, D in whole panels;
    standard: standardised first, where blocks have a norm of their own over them."""
    if standard:
        tokens = standardise(tokens)
    pad = -tokens.shape[2] % decode.PANEL
    return jnp.pad(tokens.astype(dtype), ((0, 0), (0, 0), (0, pad)))


def mlp(x: jax.Array, weights: dict, activation: str) -> jax.Array:
    """The MLP; activation: a key of ACTIVATIONS."""
    if "panels" in weights["in"]:
        return decode.mlp(x, weights["norm"], weights, activation)
    hidden = ACTIVATIONS[activation](dense(weights["in"], norm(weights["norm"], x)))
    return x + dense(weights["out"], hidden)


def log_probs(x: jax.Array, norm_weights: dict, head: dict) -> jax.Array:
    """The log-softmax of the softmax layer of the normed x: float32 [B, N, V]."""
    if "panels" in head:
        return decode.log_probs(x, norm_weights, head)
    return jax.nn.log_softmax(dense(head, norm(norm_weights, x)))
