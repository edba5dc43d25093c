"""One optimizer step: gradients of the batch, one update. Pure functions, no I/O."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from coca_jax import image_shape
from coca_jax.config import Config, Recipe, typed
from coca_jax.data import stages
from coca_jax.image_shape import Size
from coca_jax.models import roles
from coca_jax.models.coca import CoCa
from coca_jax.models.pixels import normalise_pixels, shrink
from coca_jax.ops import packed
from coca_jax.ops.reference import Reference
from coca_jax.training import lora
from coca_jax.training.gradients import Metrics, draws, value_and_gradients
from coca_jax.training.objectives import ESTIMATE
from coca_jax.training.optimizer import (
    Schedule,
    average_decay,
    averages,
    clip_by_global_norm,
    learning_rate,
    make_optimizer,
    rate_factors,
    without_schedule,
)
from coca_jax.training.parts import Batch, merge_rows, split_rows
from coca_jax.training.state import Alike, TrainState, learning, merge, trainable
from coca_jax.training.text_lengths import Lengths, trim

TrainStep = Callable[[TrainState, Batch, Schedule], tuple[TrainState, Metrics]]


def size_at(config: Config, step: int, steps: int) -> Size:
    """Image size of a step by config.image_sizes: ((share of the run, size), ...), then the
    model's own (CLIPA: small images first, full size at the end)."""
    shares, sizes = zip(*config.image_sizes) if config.image_sizes else ((), ())
    number = bisect.bisect_right(stages.starts(shares, config.stage_steps or steps), step) - 1
    return [*map(image_shape.shortest, sizes), config.model.image_size][number]


def make_update(
    config: Config,
    ops: Reference | None = None,
) -> Callable[[TrainState, Any, Schedule], tuple[TrainState, Metrics]]:
    """(state, gradients of what is trained, schedule) -> (the next state, metrics of the update).

    params <- params - rate(step) x factor x rule(gradients clipped to clip_norm), where rate is
    the schedule's, factor is that of the parameter's part and layer (0 of what no loss depends on),
    and rule is the optimizer's with its weight decay; the temperature of the similarities goes no
    lower than loss.min_temperature; ema <- ema x decay + params x (1 - decay), of the new
    parameters, where decay is optimizer.average_decay.

    A step whose gradient is not finite changes nothing but the step and the count of such steps; in
    the mean over steps (average_share) the parameters, as they stay, count once more.
    """
    optimizer = make_optimizer(config.optimizer, ops, config.model.dtype)

    def update(state: TrainState, gradients: Any, schedule: Schedule) -> tuple[TrainState, Metrics]:
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm)
        gradients = clip_by_global_norm(gradients, norm, config.optimizer.clip_norm)
        trained = trainable(state.params, config)
        rate = learning_rate(config.optimizer.schedule, schedule, state.step)
        if config.optimizer.lora_rank:
            moved, opt_state = lora.step(
                trained, gradients, state.opt_state, config.optimizer, rate
            )
        else:
            updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
            has_head, words = bool(config.head.kind), learning(config)
            factors = rate_factors(trained, config.optimizer, has_head, words)
            moved = jax.tree.map(
                lambda p, u, f: p - rate * f * u.astype(p.dtype), trained, updates, factors
            )
            moved = roles.with_temperature(moved, config.loss.min_temperature)

        def keep_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        moved, ema = keep_finite(moved, trained), state.ema
        if averages(config.optimizer):
            teaches = config.loss.hidden_weight > 0
            decay = average_decay(config.optimizer, schedule, state.step, teaches)
            ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, moved)
            if not config.optimizer.average_share:  # of which each step counts, this one as well
                ema = keep_finite(ema, state.ema)

        skipped = state.skipped + jnp.where(finite, 0, 1)
        state = TrainState(
            step=state.step + 1,
            skipped=skipped,
            params=merge(state.params, moved),
            opt_state=keep_finite(opt_state, state.opt_state),
            ema=ema,
            estimates=state.estimates,
        )
        return state, {"learning_rate": rate, "gradient_norm": norm, "skipped_steps": skipped}

    return update


def make_train_step(
    model: CoCa,
    config: Config,
    image_size: Size | None = None,
    lengths: Lengths | None = None,
) -> TrainStep:
    """(state, batch, schedule) -> (state, metrics); jit it with the state donated.

    image_size: of a stage of the size curriculum; default: the model's.
    lengths: of captions, from text_lengths.choose; default: the model's max_len.
    """
    update = make_update(config, model.options.ops)
    image_size = image_size or config.model.image_size
    length = lengths[1] if lengths else config.model.text.max_len

    def train_step(
        state: TrainState, batch: Batch, schedule: Schedule
    ) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        batch = trim(batch, length)
        if "image" in batch:
            batch |= {"image": shrink(batch["image"], image_size)}
        batch |= kept_of(state, batch) | teacher_of(state, model, config, batch)
        gradients, metrics = value_and_gradients(state.params, model, config, batch, rng, lengths)
        before = state.skipped
        state, of_update = update(state, gradients, schedule)
        state, metrics = keep(state, batch, metrics, state.skipped == before)
        return state, metrics | of_update

    return train_step


def of_step(config: Recipe) -> Alike:
    """What a train step follows from beside its module, all else as by default: equal for configs
    whose steps are the same program. Runs of other lengths and rates share it, and of other seeds
    unless a step draws."""
    config = typed(config)
    keys = ["accumulate_steps", "text_parts", "model", "head", "loss"]
    keys += ["seed"] * draws(config)
    sections: dict[str, Any] = {key: getattr(config, key) for key in keys}
    return Alike(Config(**sections, optimizer=without_schedule(config.optimizer)))


def shared_train_step(
    model: CoCa,
    alike: Alike,
    image_size: Size | None = None,
    lengths: Lengths | None = None,
) -> TrainStep:
    """`make_train_step`, the same function each time that it would compute the same: JAX keeps what
    it traced of a function, and to trace a step takes seconds. alike: by `of_step`."""
    longest = alike.config.model.text.max_len
    size = image_size or alike.config.model.image_size
    return _kept_train_step(model, alike, size, lengths or (longest, longest))


@functools.lru_cache(maxsize=8)
def _kept_train_step(model: CoCa, alike: Alike, size: Size, lengths: Lengths) -> TrainStep:
    return make_train_step(model, alike.config, size, lengths)


def teacher_of(state: TrainState, model: CoCa, config: Config, batch: Batch) -> Batch:
    """The tokens that the averaged model makes of the images, each of mean 0 and variance 1, where
    hidden patches are learned: float32 [B, N, W], a micro-batch at a time."""
    if not config.loss.hidden_weight:
        return {}
    params = merge(state.params, state.ema)

    def tokens(image: jax.Array) -> jax.Array:
        pixels = normalise_pixels(image, config.model)
        found: Any = model.apply({"params": params}, pixels, method="patch_tokens")
        return packed.standardise(found)

    if config.accumulate_steps == 1:
        return {"teacher_tokens": tokens(batch["image"])}
    each = jax.lax.map(tokens, split_rows(batch["image"], config.accumulate_steps))
    return {"teacher_tokens": merge_rows(each)}


def kept_of(state: TrainState, batch: Batch) -> Batch:
    """What the state keeps of the examples in a batch, as fields of it."""
    kept = state.estimates or {}
    return {ESTIMATE.format(side): table[batch["example"]] for side, table in kept.items()}


def keep(
    state: TrainState, batch: Batch, metrics: Metrics, finite: jax.Array
) -> tuple[TrainState, Metrics]:
    """The state with what a step found of its examples, and the metrics without it; a step that was
    not finite changes nothing."""
    if state.estimates is None:
        return state, metrics
    new = {}
    for side, table in state.estimates.items():
        rows = jnp.where(finite, metrics[ESTIMATE.format(side)], table[batch["example"]])
        new[side] = table.at[batch["example"]].set(rows)
    rest = {name: x for name, x in metrics.items() if x.ndim == 0}
    return state.replace(estimates=new), rest
