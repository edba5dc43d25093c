"""What one forward pass of the model gives."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from coca_jax.ops.reference import wide

# Fields of Outputs that belong to the model: all rows share them.
SHARED = ("kernel", "bias", "scale", "logit_bias", "bag_kernel")


@flax.struct.dataclass
class Outputs:
    """What one forward pass gives.

    image_embedding, text_embedding: float32 [B, E], L2-normalised. image_tokens: [B, Q, D], what
    the decoder attends to. states: [B, L, D], the decoder's output before the softmax layer.
    kernel [D, V], bias [V] or None: the softmax layer. scale: float32, exp of the learned log
    inverse temperature. logit_bias: float32, or None without the sigmoid loss. class_logits:
    float32 [B, C] of the task head, or None without one. pooled: [B, W], the mean of the encoder's
    tokens, and bag_kernel: float32 [W, V], where a bag of tokens is learned; else None.
    predicted_tokens: [B, N, W], of patches some of which are hidden, and hidden: bool [B, N],
    which; None unless hidden patches are learned, and in training.
    """

    image_embedding: jax.Array
    text_embedding: jax.Array
    image_tokens: jax.Array
    states: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    scale: jax.Array
    logit_bias: jax.Array | None
    class_logits: jax.Array | None
    pooled: jax.Array | None = None
    bag_kernel: jax.Array | None = None
    predicted_tokens: jax.Array | None = None
    hidden: jax.Array | None = None

    @property
    def logits(self) -> jax.Array:
        """float32 [B, L, V]; position t predicts token t + 1."""
        logits = jnp.einsum(
            "bld,dv->blv",
            self.states,
            self.kernel.astype(self.states.dtype),
            preferred_element_type=wide(self.states.dtype),
        )
        return logits if self.bias is None else logits + self.bias
