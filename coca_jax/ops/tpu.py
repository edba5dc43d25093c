"""Operations as the TPU compiler runs them best; see forms.py, attention.py, layer_loop.py and
the kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.ops import tpu_attention, tpu_layer_loop, tpu_norm
from coca_jax.ops.reference import NORM_EPSILON, Reference, log_once, whole_mask


@dataclasses.dataclass(frozen=True)
class Tpu(Reference):
    """bfloat16 by forms.py and kernels; other dtypes mostly as the reference.

    kernels: whether attention and the norms' gradient may be kernels of our own and a tower's
    layers the loop written out by hand; False leaves all of it to XLA.
    """

    kernels: bool = True

    @property
    def description(self) -> str:
        own = "own kernels and layer loop" if self.kernels else "no kernels of our own"
        return f"TPU: {own}, sums on the matrix unit"

    def add_bias(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        return tpu_norm.add_bias(x, bias)

    def bias_activation(self, x: jax.Array, bias: jax.Array, activation: str) -> jax.Array:
        if activation == "gelu":
            return tpu_norm.bias_gelu(x, bias)
        return super().bias_activation(x, bias, activation)

    def layer_norm(
        self,
        x: jax.Array,
        scale: jax.Array,
        bias: jax.Array | None,
        dtype: Any,
        epsilon: float = NORM_EPSILON,
    ) -> jax.Array:
        if x.dtype == dtype == jnp.bfloat16 and bias is not None:
            return tpu_norm.layer_norm(x, scale, bias, epsilon)
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
        mask = whole_mask(mask, causal, query.shape[1])
        return tpu_attention.attend(query, key, value, mask, heads, kernels=self.kernels)

    def layer_loop(self, block: dict[str, Any], remat: str) -> Callable[..., jax.Array] | None:
        """layer_loop.run where it knows every option of the block; it keeps what the remat policy
        'named' keeps, so it stands for no other."""
        if not self.kernels or remat != "named":
            return None
        known = dict(activation="gelu", dtype=jnp.bfloat16, kv_heads=0)
        other = {k: v for k, v in block.items() if k in known and v != known[k]}
        # Set to False or 0 too: no option is among them that is as usual.
        other |= {k: v for k, v in block.items() if k not in KNOWN_FIELDS}
        if block["cross"] not in (None, "paper"):
            other["cross"] = block["cross"]
        if other:
            log_once(
                "the layers run by XLA's loop: the one written out does not know " + str(other)
            )
            return None
        return functools.partial(tpu_layer_loop.run, heads=block["num_heads"], epsilon=NORM_EPSILON)


# Fields of block.Block that layer_loop computes, or has as usual; any other is an option that it
# does not know.
KNOWN_FIELDS = (
    "width",
    "causal",
    "num_heads",
    "kv_heads",
    "mlp_dim",
    "depth",
    "cross",
    "activation",
    "dtype",
    "ops",
)
