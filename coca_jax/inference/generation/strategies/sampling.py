"""Greedy decoding and sampling: one token after the other, each caption by itself."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from coca_jax.config.base import Seed
from coca_jax.inference.generation.processors.base import Context, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp
from coca_jax.inference.generation.strategies.base import Fixed, Loop, Strategy, write


@dataclasses.dataclass(frozen=True)
class Sampling(Strategy):
    """Takes the most probable token, or a random one."""

    title: ClassVar[str] = "sampling"
    remedy: ClassVar[str] = "Set num_beams=1"
    streams: ClassVar[bool] = True

    do_sample: bool = option(
        False, "Sample tokens; otherwise take the most probable one.", static=True
    )
    seed: Seed = option(0, "Seed of sampling.")

    @classmethod
    def is_asked(cls, config: Any) -> bool:
        return True

    @classmethod
    def check(cls, config: Any) -> None:
        if config.num_return_sequences > 1 and not config.do_sample:
            raise ValueError(
                f"num_return_sequences={config.num_return_sequences}: greedy decoding has one "
                "caption per image. Set do_sample=True or num_beams."
            )

    def arrays(self) -> Sampling:
        seed: Any = np.uint32(self.seed)
        return dataclasses.replace(self, seed=seed)

    def step(
        self,
        context: Context,
        fixed: Fixed,
        loop: Loop,
        log_probs: jax.Array,
        scores: jax.Array,
    ) -> Loop:
        if self.do_sample:
            token = sample(scores, self.seed, fixed.rows, loop.step)
        else:
            token = _argmax(scores)
        gain = jnp.take_along_axis(log_probs, token[..., None], axis=2)[..., 0]
        going = ~loop.done
        added = jnp.where(going, token, -1)
        length = loop.length + going
        return loop._replace(
            clock=loop.clock + 1,
            step=loop.step + 1,
            token=token,
            history=write(loop.history, added, context.slots + loop.step),
            log_prob=loop.log_prob + jnp.where(going, gain, 0.0),
            length=length,
            done=loop.done | (token == context.eos_id) | (length >= fixed.limit[:, None]),
        )


def _argmax(x: jax.Array) -> jax.Array:
    """First index of the largest value of the last axis: two plain reductions, which XLA vectorizes
    on a CPU; argmax it does not."""
    size = x.shape[-1]
    index = jnp.where(x == x.max(-1, keepdims=True), jnp.arange(size, dtype=jnp.int32), size)
    return index.min(-1)


def sample(scores: jax.Array, seed: Any, rows: jax.Array, step: jax.Array) -> jax.Array:
    """A token for each caption, int32 [B, W], drawn with the softmax of scores [B, W, V].

    Its random number depends on the seed, the image's number (rows [B]), the caption's place and
    the step [B], so that a caption is the same in any batch.
    """
    probs = jax.nn.softmax(scores, axis=-1)
    batch, width, size = probs.shape

    def number(row: jax.Array, caption: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.key(seed)
        for part in (row, caption, step):
            key = jax.random.fold_in(key, part)
        return jax.random.uniform(key, dtype=jnp.float32)  # whatever jax_enable_x64 says

    rows = jnp.broadcast_to(rows[:, None], (batch, width))
    captions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    steps = jnp.broadcast_to(jnp.reshape(step, (-1, 1)), (batch, width))
    uniform = jax.vmap(jax.vmap(number))(rows, captions, steps)
    # Inverse of the cumulative distribution, in two levels: first the block, then the token in it.
    block = 256
    probs = jnp.pad(probs, ((0, 0), (0, 0), (0, -size % block)))
    blocks = probs.reshape(batch, width, -1, block)
    sums = blocks.sum(-1)
    target = uniform * sums.sum(-1)
    which, rest = _pick(sums, target)
    inner = jnp.take_along_axis(blocks, which[..., None, None], axis=2)[:, :, 0]
    return which * block + _pick(inner, rest)[0]


def _pick(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index where the running sum of weights [..., N] passes target [...], and what is left
    of target there; the heaviest index where rounding keeps the sum below the target."""
    total = jnp.cumsum(weights, axis=-1)
    passed = total > target[..., None]
    index = jnp.where(passed.any(-1), jnp.argmax(passed, -1), jnp.argmax(weights, -1))
    before = jnp.take_along_axis(total - weights, index[..., None], axis=-1)[..., 0]
    return index.astype(jnp.int32), jnp.maximum(target - before, 0.0)
