"""From parameters and a batch to its loss, metrics and gradients, part by part. Pure functions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.config import Config
from coca_jax.models import coca, roles
from coca_jax.models.coca import CoCa
from coca_jax.models.outputs import SHARED
from coca_jax.models.pixels import normalise_pixels
from coca_jax.training import objectives
from coca_jax.training.objectives import Inputs, Means, Objective, Tangent
from coca_jax.training.parts import Batch, Parts, merge_rows
from coca_jax.training.state import merge, trainable
from coca_jax.training.text_lengths import Lengths

Metrics = dict[str, jax.Array]
Totals = dict[str, Any]  # Objective.totals of the whole batch, by name
Values = tuple[dict[str, jax.Array], Means]  # of the losses by name, and their metrics
Found = list[tuple[Batch, Any]]  # parts of a batch with the model's outputs (coca.Outputs)


def loss_and_metrics(
    params: Any,
    model: CoCa,
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
    model: CoCa,
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
            found = run_parts(model, config, merge(params, part), rows, key, parts)
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
    kept = {objective.name: of_losses[objective.name] for objective in losses}
    return kept | {name: total / count for name, (total, count) in means.items()} | {"loss": loss}


def temperature(model: CoCa, params: Any, losses: tuple[Objective, ...]) -> Metrics:
    """The temperature of the similarities, where the whole model runs."""
    if objectives.head_alone(losses):
        return {}
    return {"temperature": 1 / model.apply({"params": params}, method="similarity")[0]}


def run_parts(
    model: CoCa, config: Config, params: Any, batch: Batch, rng: jax.Array, parts: Parts
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


def forward(model: CoCa, config: Config, params: Any, batch: Batch, rng: jax.Array) -> coca.Outputs:
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
    model: CoCa, config: Config, params: Any, batch: Batch, rng: jax.Array
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
    return coca.Outputs(*(None,) * 8, class_logits=logits)


def cast_kernels(params: Any, dtype: Any) -> Any:
    """Stacked kernels in the dtype that they are used in. Cast outside the loop over layers, their
    gradients are stacked in that dtype too: half the bytes in bfloat16, and the values that the
    products give either way."""

    def one(role: roles.Role, x: jax.Array) -> jax.Array:
        return x.astype(dtype) if role.kind == "kernel" and role.stack is not None else x

    return roles.map_with_roles(one, params)
