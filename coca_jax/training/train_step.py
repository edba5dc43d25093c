"""One optimizer step: gradients of the batch, one update. Pure functions, no I/O."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from coca_jax.config import Config, Recipe, shapes, typed
from coca_jax.config.shapes import Size
from coca_jax.data import batch_schedule
from coca_jax.models import coca, lora, param_groups
from coca_jax.models.coca import SHARED
from coca_jax.models.image_encoder import normalise_pixels, shrink
from coca_jax.models.network import Network
from coca_jax.ops import decode_layouts
from coca_jax.ops.reference import Reference
from coca_jax.parallel import sharding
from coca_jax.training import losses as objectives
from coca_jax.training.feed import Lengths, trim
from coca_jax.training.losses import ESTIMATE, Inputs, Means, Objective, Tangent
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
from coca_jax.training.state import Alike, TrainState, learning, trainable

# The parts of a batch, over which losses and gradients add up.
#
# A batch is cut twice. Into micro-batches, one after another, for their memory; and each of these
# into the rows with the longest captions and the others, which are cut to their own length. Row i
# goes to micro-batch i % n, and the longest captions stand in every m-th place of a micro-batch (see
# `text_lengths.arrange`), so that every part spans all devices and no row moves.


Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Parts:
    """How a batch is cut.

    micro_batches: how many. long_every: of so many rows one has a long caption; 1: captions are
    not told apart. short: the length to which the captions of the other rows are cut.
    """

    micro_batches: int = 1
    long_every: int = 1
    short: int = 0

    @classmethod
    def of(cls, config: Config, lengths: Lengths | None = None) -> Parts:
        """By config.accumulate_steps, config.text_parts and the lengths of a batch, as
        `text_lengths.choose` gives them; None: all captions have the model's length."""
        short, long = lengths or (0, 0)
        return cls(config.accumulate_steps, 1 if short == long else config.text_parts, short)

    @property
    def count(self) -> int:
        """How many parts there are in all."""
        return self.micro_batches * (1 if self.long_every == 1 else 2)

    def micro(self, batch: Batch) -> Batch:
        """The micro-batches of a batch: fields [B, ...] become [n, B / n, ...]."""
        return jax.tree.map(lambda x: split_rows(x, self.micro_batches), batch)

    def by_length(self, batch: Batch) -> list[Batch]:
        """The parts of one micro-batch: the rows with short captions and those with long ones."""
        if self.long_every == 1:
            return [batch]
        cut = {name: split_long(x, self.long_every) for name, x in batch.items()}
        others, long = ({name: pair[i] for name, pair in cut.items()} for i in (0, 1))
        return [trim(others, self.short), long]

    def join(self, rows: Sequence[jax.Array]) -> jax.Array:
        """What was made of the parts of `by_length`, [b, ...] each -> [B, ...], in place again."""
        return rows[0] if len(rows) == 1 else join_long(*rows)


def split_rows(x: jax.Array, num: int) -> jax.Array:
    """[B, ...] -> [num, B / num, ...], row i to micro-batch i % num, so that each micro-batch
    spans all devices and no row moves."""
    x = jnp.moveaxis(x.reshape((x.shape[0] // num, num) + x.shape[1:]), 1, 0)
    return sharding.constrain(x, None, "batch", *(None,) * (x.ndim - 2))


def merge_rows(x: jax.Array) -> jax.Array:
    """The inverse of `split_rows`."""
    x = jnp.moveaxis(x, 0, 1).reshape((x.shape[0] * x.shape[1],) + x.shape[2:])
    return sharding.constrain(x, "batch", *(None,) * (x.ndim - 1))


def split_long(x: jax.Array, every: int) -> tuple[jax.Array, jax.Array]:
    """Rows [B, ...] -> the others [B - B / every, ...] and the long ones [B / every, ...].

    Both span all devices and no row moves.
    """
    groups = x.reshape((x.shape[0] // every, every) + x.shape[1:])

    def rows(part: jax.Array) -> jax.Array:
        part = part.reshape((-1,) + x.shape[1:])
        return sharding.constrain(part, "batch", *(None,) * (x.ndim - 1))

    return rows(groups[:, :-1]), rows(groups[:, -1:])


def join_long(others: jax.Array, long: jax.Array) -> jax.Array:
    """The inverse of `split_long`."""
    rows = long.shape[0]
    groups = [x.reshape((rows, -1) + x.shape[1:]) for x in (others, long)]
    x = jnp.concatenate(groups, 1).reshape((-1,) + long.shape[1:])
    return sharding.constrain(x, "batch", *(None,) * (x.ndim - 1))


# From parameters and a batch to its loss, metrics and gradients, part by part. Pure functions.


Metrics = dict[str, jax.Array]
Totals = dict[str, Any]  # Objective.totals of the whole batch, by name
Values = tuple[dict[str, jax.Array], Means]  # of the losses by name, and their metrics
Found = list[tuple[Batch, Any]]  # parts of a batch with the model's outputs (coca.Outputs)


def loss_and_metrics(
    params: Any,
    model: Network,
    config: Config,
    batch: Batch,
    rng: jax.Array,
    lengths: Lengths | None = None,
) -> tuple[jax.Array, Metrics]:
    """One forward graph, all losses (paper, Eq. 4); metrics are split by source.

    batch: its fields, [B, ...] each. lengths: of its captions, see `text_lengths.choose`.
    """
    parts = Parts.of(config, lengths)
    losses = objectives.of(config, model.options.ops)
    found = run_parts(model, config, params, batch, rng, parts)
    values = evaluate(losses, found, _totals(losses, batch), parts)[1]
    metrics = finish(losses, values) | temperature(model, params, losses)
    return metrics["loss"], metrics


def value_and_gradients(
    params: Any,
    model: Network,
    config: Config,
    batch: Batch,
    rng: jax.Array,
    lengths: Lengths | None = None,
) -> tuple[Any, Metrics]:
    """(exact gradients of what is trained over the whole batch, metrics), with the memory of one
    of `accumulate_steps` micro-batches. Frozen parameters are constants: nothing is computed
    backwards through them. batch, lengths: as of `loss_and_metrics`."""
    parts = Parts.of(config, lengths)
    losses = objectives.of(config, model.options.ops)
    totals = _totals(losses, batch)
    trained = trainable(params, config)

    def gradients_of(terms: tuple[Objective, ...], rows: Batch, key: jax.Array) -> Any:
        def objective(part: Any) -> tuple[jax.Array, Values]:
            found = run_parts(model, config, param_groups.merge(params, part), rows, key, parts)
            return evaluate(terms, found, totals, parts)

        return jax.grad(objective, has_aux=True)(trained)

    if parts.micro_batches == 1:
        gradients, values = gradients_of(losses, batch, rng)
    else:
        keys = jax.random.split(rng, parts.micro_batches)
        run = functools.partial(run_parts, model, config, params, parts=parts)
        terms, batch, values = linearise(losses, run, batch, keys, parts)

        def backward(carry: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, Values]:
            gradients, found = gradients_of(terms, *part)
            return jax.tree.map(jnp.add, carry, gradients), found

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
        gradients, each = jax.lax.scan(backward, zeros, (parts.micro(batch), keys))
        values = tuple(a | b for a, b in zip(values, jax.tree.map(lambda x: x.sum(0), each)))
    return gradients, finish(losses, values) | temperature(model, params, losses)


def linearise(
    losses: tuple[Objective, ...], run: Any, batch: Batch, keys: jax.Array, parts: Parts
) -> tuple[tuple[Objective, ...], Batch, Values]:
    """Makes of each loss that couples rows one that adds up over micro-batches.

    First what it reads of all micro-batches, without gradient (`run`: of a micro-batch and a key);
    then its value over all rows and the gradient by each input. Returns (all losses, the batch with
    these gradients as fields, the values found).
    """
    coupled = tuple(objective for objective in losses if objective.couples)
    terms = tuple(objective for objective in losses if not objective.couples)
    values: dict[str, jax.Array] = {}
    metrics: Means = {}
    if not coupled:
        return terms, batch, (values, metrics)

    def read(_: None, part: tuple[Batch, jax.Array]) -> tuple[None, list[dict[str, Any]]]:
        found = run(*part)
        return None, [_joined(objective.outputs, found, parts) for objective in coupled]

    _, stacked = jax.lax.scan(read, None, (parts.micro(batch), keys))
    for objective, outputs in zip(coupled, stacked):
        outputs = {
            name: x if x is None else x[0] if name in SHARED else merge_rows(x)
            for name, x in outputs.items()
        }
        fields = {name: batch[name] for name in objective.fields}

        def value(
            outputs: dict[str, Any], objective: Objective = objective, fields: Inputs = fields
        ) -> tuple[jax.Array, Means]:
            return objective.value({**outputs, **fields}, objective.totals(fields))

        (values[objective.name], means), slopes = jax.value_and_grad(value, has_aux=True)(outputs)
        metrics |= means
        slopes = {k: objective.weight * g for k, g in slopes.items() if g is not None}
        shared = {k: g / parts.count for k, g in slopes.items() if k in SHARED}
        tangent = Tangent(objective, shared, tuple(k for k in slopes if k not in SHARED))
        batch = batch | {tangent.field(k): slopes[k] for k in tangent.rows}
        terms += (tangent,)
    return terms, batch, (values, metrics)


def evaluate(
    losses: tuple[Objective, ...], found: Found, totals: Totals, parts: Parts
) -> tuple[jax.Array, Values]:
    """(the weighted sum of the losses over the parts `found`, the values and metrics of each)."""
    loss = jnp.zeros((), jnp.float32)
    values: dict[str, jax.Array] = {}
    metrics: Means = {}
    for objective in losses:
        names = (*objective.outputs, *objective.fields)
        cuts = [found] if objective.couples else [[part] for part in found]
        each = [
            objective.value(_joined(names, cut, parts), totals.get(objective.name)) for cut in cuts
        ]
        value, means = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), each)
        loss += objective.weight * value
        values[objective.name] = value
        metrics |= means
    return loss, (values, metrics)


def _joined(names: tuple[str, ...], found: Found, parts: Parts) -> dict[str, Any]:
    """Fields of the outputs and of the batch over the rows of all the parts, by name."""
    inputs: dict[str, Any] = {}
    for name in names:
        each = [rows[name] if name in rows else getattr(outputs, name) for rows, outputs in found]
        whole = each[0] is None or name in SHARED
        inputs[name] = each[0] if whole else parts.join(each)
    return inputs


def _totals(losses: tuple[Objective, ...], batch: Batch) -> Totals:
    return {o.name: o.totals({name: batch[name] for name in o.fields}) for o in losses}


def finish(losses: tuple[Objective, ...], values: Values) -> Metrics:
    """The metrics of a batch: the losses, their weighted sum, and each metric's mean."""
    of_losses, means = values
    loss = jnp.zeros((), jnp.float32)
    for objective in losses:
        loss += objective.weight * of_losses[objective.name]
    reported = {objective.name: of_losses[objective.name] for objective in losses}
    return (
        reported | {name: total / count for name, (total, count) in means.items()} | {"loss": loss}
    )


def temperature(model: Network, params: Any, losses: tuple[Objective, ...]) -> Metrics:
    """The temperature of the similarities, where the whole model runs."""
    if objectives.head_alone(losses):
        return {}
    return {"temperature": 1 / model.apply({"params": params}, method="similarity")[0]}


def run_parts(
    model: Network, config: Config, params: Any, batch: Batch, rng: jax.Array, parts: Parts
) -> Found:
    """The parts of one micro-batch with the model's outputs over each."""
    if objectives.head_alone(objectives.of(config, model.options.ops)):
        return [(batch, classify(model, config, params, batch, rng))]
    cuts = parts.by_length(batch)
    keys = [rng] if len(cuts) == 1 else [jax.random.fold_in(rng, i) for i in range(len(cuts))]
    return [(cut, forward(model, config, params, cut, key)) for cut, key in zip(cuts, keys)]


def draws(config: Config) -> bool:
    """Whether a step draws numbers: which patches and image tokens it leaves out or hides."""
    model = config.model
    left_out = model.image.patch_dropout or model.pooler.token_dropout
    return bool(left_out or config.loss.hidden_weight)


def _rngs(config: Config, rng: jax.Array) -> dict[str, jax.Array]:
    """For Flax's modules: none where nothing is drawn, so that a module which draws and is not
    named in `draws` is refused, and does not draw alike in runs of all seeds."""
    return {"patch_dropout": rng} if draws(config) else {}


def forward(
    model: Network, config: Config, params: Any, batch: Batch, rng: jax.Array
) -> coca.Outputs:
    """One training pass over the batch -> coca.Outputs."""
    outputs: Any = model.apply(
        {"params": cast_kernels(params, model.kernel_dtype)},
        _pixels(batch, config),
        batch["tokens"],
        batch["text_valid"],
        batch.get("prompt_len"),
        encoded=batch.get("encoded"),
        deterministic=False,
        rngs=_rngs(config, rng),
    )
    return outputs


def _pixels(batch: Batch, config: Config) -> jax.Array | None:
    """Of the images, as the model takes them; None where their tokens stand in the batch."""
    return normalise_pixels(batch["image"], config.model) if "image" in batch else None


def classify(
    model: Network, config: Config, params: Any, batch: Batch, rng: jax.Array
) -> coca.Outputs:
    """One training pass over what the task head reads alone: outputs with class_logits only."""
    logits: Any = model.apply(
        {"params": params},
        _pixels(batch, config),
        batch["tokens"],
        batch["prompt_len"],
        encoded=batch.get("encoded"),
        deterministic=False,
        rngs=_rngs(config, rng),
        method="classify",
    )
    return coca.Outputs(class_logits=logits)


def cast_kernels(params: Any, dtype: Any) -> Any:
    """Stacked kernels in the dtype that they are used in. Cast outside the loop over layers, their
    gradients are stacked in that dtype too: half the bytes in bfloat16, and the values that the
    products give either way."""

    def one(role: param_groups.Role, x: jax.Array) -> jax.Array:
        return x.astype(dtype) if role.kind == "kernel" and role.stack is not None else x

    return param_groups.map_with_roles(one, params)


TrainStep = Callable[[TrainState, Batch, Schedule], tuple[TrainState, Metrics]]


def size_at(config: Config, step: int, steps: int) -> Size:
    """Image size of a step by config.image_sizes: ((share of the run, size), ...), then the
    model's own (CLIPA: small images first, full size at the end)."""
    shares, sizes = zip(*config.image_sizes) if config.image_sizes else ((), ())
    number = (
        bisect.bisect_right(batch_schedule.starts(shares, config.stage_steps or steps), step) - 1
    )
    return [*map(shapes.shortest, sizes), config.model.image_size][number]


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
            dual = config.model.family != "coca"
            factors = rate_factors(trained, config.optimizer, has_head, words, dual_encoder=dual)
            moved = jax.tree.map(
                lambda p, u, f: p - rate * f * u.astype(p.dtype), trained, updates, factors
            )
            moved = param_groups.with_temperature(moved, config.loss.min_temperature)

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
            params=param_groups.merge(state.params, moved),
            opt_state=keep_finite(opt_state, state.opt_state),
            ema=ema,
            estimates=state.estimates,
        )
        return state, {"learning_rate": rate, "gradient_norm": norm, "skipped_steps": skipped}

    return update


def make_train_step(
    model: Network,
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
        batch |= stored_estimates(state, batch) | teacher_of(state, model, config, batch)
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
    optimizer = without_schedule(config.optimizer)
    return Alike(Config().replace_unchecked(**sections, optimizer=optimizer))


def shared_train_step(
    model: Network,
    alike: Alike,
    image_size: Size | None = None,
    lengths: Lengths | None = None,
) -> TrainStep:
    """`make_train_step`, the same function each time that it would compute the same: JAX keeps what
    it traced of a function, and to trace a step takes seconds. alike: by `of_step`."""
    longest = alike.config.model.text.max_len
    size = image_size or alike.config.model.image_size
    return _cached_train_step(model, alike, size, lengths or (longest, longest))


@functools.lru_cache(maxsize=8)
def _cached_train_step(model: Network, alike: Alike, size: Size, lengths: Lengths) -> TrainStep:
    return make_train_step(model, alike.config, size, lengths)


def teacher_of(state: TrainState, model: Network, config: Config, batch: Batch) -> Batch:
    """The tokens that the averaged model makes of the images, each of mean 0 and variance 1, where
    hidden patches are learned: float32 [B, N, W], a micro-batch at a time."""
    if not config.loss.hidden_weight:
        return {}
    params = param_groups.merge(state.params, state.ema)

    def tokens(image: jax.Array) -> jax.Array:
        pixels = normalise_pixels(image, config.model)
        found: Any = model.apply({"params": params}, pixels, method="patch_tokens")
        return decode_layouts.standardise(found)

    if config.accumulate_steps == 1:
        return {"teacher_tokens": tokens(batch["image"])}
    each = jax.lax.map(tokens, split_rows(batch["image"], config.accumulate_steps))
    return {"teacher_tokens": merge_rows(each)}


def stored_estimates(state: TrainState, batch: Batch) -> Batch:
    """What the state keeps of the examples in a batch, as fields of it."""
    stored = state.estimates or {}
    return {ESTIMATE.format(side): table[batch["example"]] for side, table in stored.items()}


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
