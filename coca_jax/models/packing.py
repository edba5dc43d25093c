"""The parameters of a block as packed weights: which of them become which matrix of a part."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.models.layers import BlockOptions
from coca_jax.ops import packed
from coca_jax.ops.cpu import decode_kernels
from coca_jax.ops.packed import Layout
from coca_jax.ops.reference import say_once

# Of layers.BlockOptions: what the parts of a block may have, and what does not touch a norm.
KNOWN_OPTIONS = ("activation", "dtype", "ops")
KNOWN_AROUND_NORM = (
    *KNOWN_OPTIONS,
    "gated_mlp",
    "layer_scale",
    "positions",
    "qk_norm",
    "qk_norm_kind",
)
# The norms that go with a part when it is packed.
NORMS = dict(
    attention=("attention_norm",),
    cross_attention=("cross_norm", "context_norm"),
    mlp=("mlp_norm",),
    cross_mlp=("cross_mlp_norm",),
)


def last_norm(params: dict, options: BlockOptions) -> dict:
    """The norm behind the last block, as packed.norm takes it."""
    if not options.beyond(KNOWN_AROUND_NORM):
        return params
    return {options.norm: params, "epsilon": jnp.float32(options.norm_eps)}


def pack_block(params: dict, dtype: Any, layout: Layout, unknown: dict[str, Any]) -> dict:
    """The parts of one layer's parameters, packed: {part: its weights}, {} where nothing is.

    params: of block.Block. unknown: options of the block beyond KNOWN_OPTIONS that are set; its
    modules alone know what they mean, so that nothing is packed.
    """
    if unknown:
        say_once(f"decoding runs the block's own modules: packing does not know {unknown}")
    if layout == "reference" or unknown:
        return {}
    found: dict[str, Any] = {"attention": _pack_attention(params["attention"], dtype, layout)}
    if "cross_attention" in params:
        norm = params.get("context_norm")
        found["cross_attention"] = _pack_cross(params["cross_attention"], norm, dtype, layout)
    for name in ("mlp", "cross_mlp"):
        if name in params:
            found[name] = {
                k: packed.pack_matrix(v["kernel"], v["bias"], dtype, layout)
                for k, v in params[name].items()
            }
    for name, part in found.items():
        part["norm"] = params["cross_norm" if name == "cross_attention" else f"{name}_norm"]
    return found


def _matrix(kernel: jax.Array, num_in: int = 1) -> jax.Array:
    """A kernel whose first num_in axes are inputs, as a matrix."""
    return kernel.reshape(int(np.prod(kernel.shape[:num_in])), -1)


def _join(part: dict, names: tuple[str, ...], dtype: Any, layout: Layout) -> dict:
    """Several projections as one; the query's with the scale of the scores in it."""
    scale = part["query"]["kernel"].shape[-1] ** -0.5
    kernels = [part[n]["kernel"] * (scale if n == "query" else 1.0) for n in names]
    biases = [part[n]["bias"].reshape(-1) * (scale if n == "query" else 1.0) for n in names]
    kernel = jnp.concatenate([_matrix(k).astype(dtype) for k in kernels], axis=1)
    return packed.pack_matrix(kernel, jnp.concatenate(biases), dtype, layout)


def _out(part: dict, dtype: Any, layout: Layout) -> dict:
    return packed.pack_matrix(_matrix(part["out"]["kernel"], 2), part["out"]["bias"], dtype, layout)


def _pack_attention(part: dict, dtype: Any, layout: Layout) -> dict:
    qkv = _join(part, ("query", "key", "value"), dtype, layout)
    return dict(qkv=qkv, out=_out(part, dtype, layout))


def _pack_cross(part: dict, norm: dict | None, dtype: Any, layout: Layout) -> dict:
    found: dict[str, Any] = dict(
        query=_join(part, ("query",), dtype, layout),
        # Image keys are computed once, from many rows: there the plain product is best.
        kv=_join(part, ("key", "value"), dtype, "kernel"),
        out=_out(part, dtype, layout),
    )
    if norm is not None:
        found["context_norm"] = norm
    if layout in packed.PANELS:
        found["shared"] = _shared(part, norm, packed.PANELS[layout])
    return found


def _shared(part: dict, norm: dict | None, dtype: Any) -> dict:
    """Keys and values moved to the query's side, see decode_kernels.image_attention.

    What the bias of the keys adds is the same at every token, and so nothing to the softmax.
    """
    key, value = part["key"]["kernel"], part["value"]["kernel"]  # [D, H, K]
    bias = part["value"]["bias"].reshape(-1)
    if norm is not None:
        bias = bias + jnp.einsum("d,dhk->hk", norm["bias"], value).reshape(-1)
        key, value = (norm["scale"][:, None, None] * x for x in (key, value))
    padded = jnp.pad(value, ((0, -value.shape[0] % decode_kernels.PANEL), (0, 0), (0, 0)))
    panels = jax.vmap(functools.partial(decode_kernels.panels, dtype=dtype))
    return dict(
        query=panels(key.transpose(1, 2, 0)),
        value=panels(padded.transpose(1, 0, 2)),
        bias=bias,
    )
