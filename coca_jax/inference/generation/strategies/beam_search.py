"""Beam search over one shared cache.

Shape letters: B images, W beams of an image, T slots of prompt and new tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Interval

from coca_jax.inference.generation.processors.base import NEVER, Context, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp
from coca_jax.inference.generation.strategies.base import Fixed, Loop, Strategy, write


class Finished(NamedTuple):
    """Finished captions of an image, best first; score NEVER where there is none."""

    score: jax.Array  # [B, W], over tokens^length_penalty
    log_prob: jax.Array  # [B, W], the model's
    length: jax.Array  # int32 [B, W]
    history: jax.Array  # int32 [B, W, T]


class Beams(NamedTuple):
    """The state of the search besides the loop's."""

    score: jax.Array  # [B, W], sum of the scores after all processors
    finished: Finished


class Candidates(NamedTuple):
    """Continuations of an image's beams by one token, best first: N = 2 W of them, or fewer."""

    score: jax.Array  # [B, N]
    parent: jax.Array  # int32 [B, N], the beam that each continues
    token: jax.Array  # int32 [B, N]
    log_prob: jax.Array  # [B, N]


@dataclasses.dataclass(frozen=True)
class BeamSearch(Strategy):
    """Extends the most probable captions of each image. All beams of an image end together."""

    title: ClassVar[str] = "beam search"
    remedy: ClassVar[str] = "Set num_beams above 1"
    priority: ClassVar[int] = 10
    streams: ClassVar[bool] = False

    num_beams: Annotated[int, Interval(ge=1)] = option(
        1, "Beams of beam search; 1: none.", most=8, static=True
    )
    length_penalty: Annotated[float, Interval(ge=-10, le=10)] = option(
        1.0, "Beams are ranked by log probability / tokens^this."
    )
    early_stopping: bool | Literal["never"] = option(
        False,
        "End an image's search when num_beams captions are finished (true), when no unfinished "
        "beam ranks above them as it stands (false), or when none could later (never).",
        static=True,
    )

    @classmethod
    def is_asked(cls, config: Any) -> bool:
        return bool(config.num_beams > 1)

    @classmethod
    def check(cls, config: Any) -> None:
        if config.num_return_sequences > config.num_beams:
            raise ValueError(
                f"num_return_sequences={config.num_return_sequences}: more than "
                f"num_beams={config.num_beams}. Raise num_beams."
            )

    def check_ids(self, count: int) -> None:
        if self.num_beams > count:  # each takes memory, and they all begin with other tokens
            raise ValueError(
                f"num_beams={self.num_beams}: the vocabulary has {count} ids. Give at most as many."
            )

    @property
    def width(self) -> int:
        return self.num_beams

    def start(self, loop: Loop) -> Loop:
        zeros = jnp.zeros_like(loop.log_prob)
        finished = Finished(zeros + NEVER, zeros, loop.length, loop.history)
        # All beams start alike: only the first may go on, or they would stay alike.
        return loop._replace(own=Beams(zeros.at[:, 1:].set(NEVER), finished))

    def step(
        self,
        context: Context,
        fixed: Fixed,
        loop: Loop,
        log_probs: jax.Array,
        scores: jax.Array,
    ) -> Loop:
        found = self.candidates(loop, log_probs, scores)
        history = write(_take(loop.history, found.parent), found.token, context.slots + loop.step)
        return self.extend(context, fixed, loop, found, history)

    def candidates(self, loop: Loop, log_probs: jax.Array, scores: jax.Array) -> Candidates:
        """The best continuations of all beams of each image."""
        batch, width, vocab = scores.shape
        per_beam = min(2 * width, vocab)
        best, token = jax.lax.top_k(scores, per_beam)
        total = (loop.own.score[..., None] + best).reshape(batch, -1)
        gain = jnp.take_along_axis(log_probs, token, axis=2)
        log_prob = (loop.log_prob[..., None] + gain).reshape(batch, -1)
        score, at = jax.lax.top_k(total, min(2 * width, total.shape[1]))
        token = _take(token.reshape(batch, -1), at)
        return Candidates(score, at // per_beam, token, _take(log_prob, at))

    def extend(
        self, context: Context, fixed: Fixed, loop: Loop, found: Candidates, history: jax.Array
    ) -> Loop:
        """The loop with the continuations of every image; finished images stay as they are.

        Candidates that end, and are among the W best, become finished captions. The W best of the
        others go on. Images at their limit finish their beams as they stand.
        """
        width, limit = loop.done.shape[1], fixed.limit[:, None]
        score, parent, token, log_prob = found
        length = jnp.broadcast_to(loop.step[:, None] + 1, token.shape)
        ends = (token == context.eos_id) & (jnp.arange(token.shape[1]) < width)
        ranked = jnp.where(ends & (score > NEVER / 2), self._rank(score, length), NEVER)
        finished = _best(loop.own.finished, Finished(ranked, log_prob, length, history), width)
        score, at = jax.lax.top_k(jnp.where(token == context.eos_id, NEVER, score), width)
        parent, token, log_prob = _take(parent, at), _take(token, at), _take(log_prob, at)
        history, length = _take(history, at), _take(length, at)
        last = length >= limit
        ranked = jnp.where(last & (score > NEVER / 2), self._rank(score, length), NEVER)
        finished = _best(finished, Finished(ranked, log_prob, length, history), width)
        over = last.any(1, keepdims=True) | self._is_decided(score, length, limit, finished)
        done = loop.done

        def keep(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(done.reshape(done.shape + (1,) * (new.ndim - 2)), old, new)

        return loop._replace(
            clock=loop.clock + 1,
            step=loop.step + 1,
            token=token,
            past=jnp.take_along_axis(loop.past, parent[:, :, None, None], axis=1),
            history=history,
            log_prob=log_prob,
            done=done | over,
            length=length,
            own=Beams(score, jax.tree.map(keep, loop.own.finished, finished)),
        )

    def _is_decided(
        self, score: jax.Array, length: jax.Array, limit: jax.Array, finished: Finished
    ) -> jax.Array:
        """Whether no beam [B, W] displaces the captions to return any more: bool [B, 1]."""
        if self.early_stopping is True:
            return finished.score[:, -1:] > NEVER / 2
        reach = self._rank(score, length)
        if self.early_stopping == "never":  # a score only falls: at once, or at the limit
            longest = jnp.maximum(limit, length)
            reach = jnp.maximum(self._rank(score, length + 1), self._rank(score, longest))
        worst = finished.score[:, self.num_return_sequences - 1 : self.num_return_sequences]
        return worst >= reach.max(1, keepdims=True)

    def finish(self, loop: Loop) -> tuple[jax.Array, jax.Array, jax.Array]:
        count, best = self.num_return_sequences, loop.own.finished
        return best.history[:, :count], best.length[:, :count], best.log_prob[:, :count]

    def _rank(self, score: jax.Array, length: jax.Array) -> jax.Array:
        return score / length.astype(jnp.float32) ** self.length_penalty


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """Entries `at` [B, M] of the second axis of x [B, N, ...]."""
    return jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1)


def _best(old: Finished, new: Finished, count: int) -> Finished:
    """The `count` best of both along the second axis, best first; earlier ones win ties."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
    score, at = jax.lax.top_k(both.score, count)
    return jax.tree.map(lambda x: _take(x, at), both)._replace(score=score)
