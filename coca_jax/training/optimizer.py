"""Schedules and optimizers: Adafactor as the paper runs it, AdamW, Muon, clipping, part rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from coca_jax.config import Optimizer
from coca_jax.models.layers import TOP
from coca_jax.models.param_groups import Role, depths, map_with_roles, tower_rates
from coca_jax.ops.reference import Reference

MUON_MOMENTUM, MUON_ITERATIONS = 0.95, 4
MUON_RMS = 0.2  # of its updates: about AdamW's, so that the learning rates are alike


DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {  # by the share of the decay that is over
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + jnp.cos(jnp.pi * t)),
    "constant": lambda t: jnp.ones_like(t),
    "wsd": lambda t: 1 - jnp.sqrt(t),
}


class Schedule(NamedTuple):
    """What a step must know of its run's length and rates. Numbers, which a compiled step is given:
    runs that differ in these alone share its program.

    peak: float32, the learning rate after `warmup` steps. decay_from, decay_steps: from which step
    on it falls, and for how many. average_from: the first step that is averaged (average_share).
    All int32 but peak, and scalars.
    """

    peak: Any
    warmup: Any
    decay_from: Any
    decay_steps: Any
    average_from: Any


def make_schedule(optimizer: Optimizer, steps: int) -> Schedule:
    """The schedule of a run of so many steps: see `learning_rate`.

    Raises ValueError for a warm-up longer than the run.
    """
    optimizer.check_warmup(steps)
    first = optimizer.warmup_steps
    if optimizer.schedule == "wsd":
        first = max(first, steps - max(1, round(optimizer.decay_share * steps)))
    average_from = steps - max(1, round(optimizer.average_share * steps))
    numbers = (optimizer.warmup_steps, first, max(1, steps - first), average_from)
    return Schedule(np.float32(optimizer.learning_rate), *map(np.int32, numbers))


def learning_rate(kind: str, schedule: Schedule, step: jax.Array | int) -> jax.Array:
    """The learning rate of a step, float32: linear warm-up from 0, then 'linear' or 'cosine' to 0,
    or 'constant', or 'wsd': constant, and over the last decay_share of the steps down to 0 as
    1 - sqrt(share of them), which can start from any step of a constant run (Haegele et al. 2024).
    """
    step = jnp.asarray(step, jnp.float32)
    rise = jnp.minimum(1.0, (step + 1) / jnp.maximum(1, schedule.warmup))
    progress = jnp.clip((step - schedule.decay_from) / schedule.decay_steps, 0.0, 1.0)
    return schedule.peak * rise * DECAYS[kind](progress)


def without_schedule(optimizer: Optimizer) -> Optimizer:
    """The optimizer as a step's program has it: what `Schedule` holds is as by default, and rates
    of parts are multiples of the learning rate."""
    parts = ("encoder_learning_rate", "image_learning_rate", "text_learning_rate")
    rates = {part: getattr(optimizer, part) for part in parts}
    relative = {k: v / optimizer.learning_rate for k, v in rates.items() if v > 0}
    plain = Optimizer()
    # The ratio of two rates may be above 1, which is not allowed in a config.
    return optimizer.replace_unchecked(
        learning_rate=1.0,
        warmup_steps=plain.warmup_steps,
        decay_share=plain.decay_share,
        average_share=float(optimizer.average_share > 0),
        **relative,
    )


def averages(optimizer: Optimizer) -> bool:
    """Whether a run keeps averaged parameters beside its own."""
    return optimizer.ema > 0 or optimizer.average_share > 0


def average_decay(
    optimizer: Optimizer, schedule: Schedule, step: jax.Array, teaches: bool = False
) -> Any:
    """The share that the average of step 0, 1, ... has in that of the next one. Over the last part
    of a run (average_share) the average is the mean of the parameters behind each of its steps.
    Else it is `ema`, and at most (1 + step) / (10 + step), as TensorFlow's moving averages have it:
    after 300 steps of 0.9999 the average would be the start by 97%. Of an average that teaches
    (loss.hidden_weight) it is `ema` always: one that is nearly the student teaches nothing."""
    if not optimizer.average_share:
        if teaches:
            return optimizer.ema
        done = jnp.asarray(step, jnp.float32)
        return jnp.minimum(optimizer.ema, (1 + done) / (10 + done))
    counted = jnp.maximum(step - schedule.average_from, 0).astype(jnp.float32)
    return counted / (counted + 1)


def make_optimizer(
    optimizer: Optimizer, ops: Reference | None = None, dtype: Any = jnp.float32
) -> optax.GradientTransformation:
    """The update rule of `_rule`, and with l2_to_start the pull to where the run started. ops: the
    form of the operations, the reference by default; dtype: the model's."""
    rule = _rule(optimizer, ops or Reference(), dtype)
    if not optimizer.l2_to_start:
        return rule
    return optax.chain(rule, pull_to_start(optimizer.l2_to_start))


def orthogonalises(optimizer: Optimizer) -> bool:
    """Whether the rule calls `Reference.orthogonalise`."""
    return optimizer.name == "muon"


def _rule(optimizer: Optimizer, ops: Reference, dtype: Any) -> optax.GradientTransformation:
    """The update rule without learning rate: `train_step` multiplies by minus the schedule.

    Adafactor: factored second moment with decay min(beta2, 1 - t^-0.8), first moment beta1 kept in
    bfloat16, update clipping 1.0, decoupled weight decay (paper Section 4.1). Every layer of a
    stack is an array of its own, as it would be without stacks.
    Muon (Jordan et al. 2024): the momentum of each kernel made orthogonal, with updates of AdamW's
    size (Liu et al. 2025); AdamW for the vocabulary's matrices and all that is no kernel.
    Raises ValueError for an unknown name.
    """
    decay = optax.add_decayed_weights(optimizer.weight_decay, mask=is_matrix)
    if optimizer.name == "adafactor":
        factored = optax.scale_by_factored_rms(
            min_dim_size_to_factor=32,
            decay_rate_fn=lambda step, power: jnp.minimum(
                optimizer.beta2, 1 - (jnp.asarray(step, jnp.float32) + 1) ** -power
            ),
        )
        return optax.chain(
            _factored_by_layer(factored),
            optax.stateless(_clip_by_layer),
            optax.ema(optimizer.beta1, debias=False, accumulator_dtype=jnp.bfloat16),
            decay,
        )
    if optimizer.name == "adamw":
        adam = optax.scale_by_adam(optimizer.beta1, optimizer.beta2)
        return optax.chain(adam, decay)
    if orthogonalises(optimizer):
        momentum = scale_by_muon(
            ns_steps=0, beta=MUON_MOMENTUM, weight_dimension_numbers=kernel_axes
        )
        kernels = optax.chain(_iterated(momentum, ops, dtype), optax.stateless(_equal_rms))
        rest = optax.scale_by_adam(optimizer.beta1, optimizer.beta2)
        return optax.chain(optax.partition(dict(kernel=kernels, rest=rest), _parts), decay)
    raise ValueError(f"optimizer.name={optimizer.name!r}; choose 'adafactor', 'adamw' or 'muon'")


def _factored_by_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule` for each layer of a stack: of a whole stack of 32 layers or more it would take these
    for one of the two axes that it factors a norm's or a bias's second moment over.

    The state is a FactoredState of stacks; what it holds for nothing, of shape [1], stays that.
    """

    def each(function: Any, params: Any, *trees: Any) -> list[Any]:
        """Trees of what function(whether it is a stack, leaf, leaves...) gives."""
        leaves, tree = jax.tree.flatten(params)
        stacked = jax.tree.leaves(map_with_roles(lambda role, _: role.stack is not None, params))
        found = map(function, stacked, leaves, *map(jax.tree.leaves, trees))
        return [jax.tree.unflatten(tree, one) for one in zip(*found)]

    def layers(whole: bool) -> optax.FactoredState:
        """The axis of layers in each part of a stack's state. whole: nothing is factored."""
        return optax.FactoredState(None, *((None, None, 0) if whole else (0, 0, None)))

    def init(params: Any) -> Any:
        def one(stacked: bool, param: jax.Array) -> Any:
            if not stacked:
                return rule.init(param)[1:]
            whole = rule.init(param[0]).v.shape == param.shape[1:]
            return jax.vmap(rule.init, out_axes=layers(whole))(param)[1:]

        return optax.FactoredState(jnp.zeros((), jnp.int32), *each(one, params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        def one(stacked: bool, update: jax.Array, param: jax.Array, *parts: jax.Array) -> Any:
            mine, run = optax.FactoredState(state.count, *parts), rule.update
            if stacked:
                axes = layers(mine.v.ndim == param.ndim)
                run = jax.vmap(run, (0, axes, 0), (0, axes))
            update, new = run(update, mine, param)
            return update, *new[1:]

        updates, *parts = each(one, updates, params, *state[1:])
        return updates, optax.FactoredState(optax.safe_increment(state.count), *parts)

    return optax.GradientTransformation(init, update)


def _clip_by_layer(updates: Any, params: Any = None) -> Any:
    """Updates whose root mean square is at most 1, of every layer and every other array."""
    clip = optax.clip_by_block_rms(1.0)

    def one(role: Role, update: jax.Array) -> jax.Array:
        def of(x: jax.Array) -> jax.Array:
            return clip.update(x, clip.init(x))[0]

        return jax.vmap(of)(update) if role.stack is not None else of(update)

    return map_with_roles(one, updates)


def _iterated(
    muon: optax.GradientTransformation, ops: Reference, dtype: Any
) -> optax.GradientTransformation:
    """Muon by the iterations of `ops`. muon: optax's without any, which gives the momentum of each
    matrix with norm 1."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        momentum, new = muon.update(updates, state, params)

        def one(x: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
            rows, columns = (math.prod(x.shape[i] for i in side) for side in axes)
            matrices = x.reshape(-1, rows, columns)
            wide = matrices if rows <= columns else matrices.swapaxes(1, 2)
            wide = ops.orthogonalise(wide, state.ns_coeffs, MUON_ITERATIONS, dtype)
            return (wide if rows <= columns else wide.swapaxes(1, 2)).reshape(x.shape)

        return jax.tree.map(one, momentum, kernel_axes(momentum)), new

    return optax.GradientTransformation(muon.init, update)


class Start(NamedTuple):
    """Where the first step found the parameters; `taken`: whether there was one."""

    taken: jax.Array
    params: Any


def pull_to_start(strength: float) -> optax.GradientTransformation:
    """Adds strength x (parameter - its value before the first step) to updates: L2 towards the
    start, which keeps what was learned before (L2-SP, Li et al. 2018), decoupled as weight decay.
    A task head, which starts anew, is left out."""

    def init(params: Any) -> Any:
        return Start(jnp.zeros((), bool), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        start = jax.tree.map(lambda s, p: jnp.where(state.taken, s, p), state.params, params)

        def one(role: Role, u: Any) -> float:
            return 0.0 if role.part.serves == "head" else strength

        pulls = map_with_roles(one, updates)
        moved = jax.tree.map(lambda u, f, p, s: u + f * (p - s), updates, pulls, params, start)
        return moved, Start(jnp.ones((), bool), start)

    return optax.GradientTransformation(init, update)


def kernel_axes(params: Any) -> Any:
    """Muon's view of each leaf as a matrix: the axes that a kernel sums over, and those of its
    outputs; layers are apart. None for what is no kernel, and for the softmax over the vocabulary.
    """

    def one(role: Role, leaf: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        if role.kind != "kernel":
            return None
        first, split = int(role.stack is not None), leaf.ndim - role.outputs
        return MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, leaf.ndim)))

    return map_with_roles(one, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def _parts(params: Any) -> Any:
    axes = kernel_axes(params)
    return jax.tree.map(lambda _, a: "rest" if a is None else "kernel", params, axes)


def _equal_rms(updates: Any, params: Any) -> Any:
    """An orthogonal matrix has RMS 1 / sqrt(its longer side)."""
    del params

    def one(update: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
        sides = [np.prod([update.shape[i] for i in side]) for side in axes]
        return MUON_RMS * np.sqrt(max(sides)) * update

    return jax.tree.map(one, updates, kernel_axes(updates))


def rate_factors(
    params: Any,
    optimizer: Optimizer,
    has_head: bool,
    words: Set[str] | None = None,
    *,
    dual_encoder: bool = False,
) -> Any:
    """The learning rate of each parameter over `learning_rate`: a tree of floats, or of arrays
    [depth, 1, ...] for stacked layers.

    The head has 1, all else encoder_learning_rate / learning_rate; without a head the image encoder
    has image_learning_rate / learning_rate and all else 1. Of a dual encoder all of a tower has its
    rate, image_learning_rate or text_learning_rate. layer_decay d multiplies layer i
    of a tower of L by d^(L - i) and what lies below its first layer by d^(L + 1); in the decoder
    the two halves count as one tower; the norms at the end, the poolers and the projections are at
    the top, with d^0 (as in BEiT, Bao et al. 2022). The projections into the joint space have
    projection_rate of what they had. Parts that serve none of `words`, those of the run's losses,
    have 0: weight decay would shrink what has no gradient. None: all are learned.
    """
    encoder, decay = 1.0, optimizer.layer_decay
    sides = tower_rates(optimizer) if dual_encoder else {}
    if has_head and optimizer.encoder_learning_rate >= 0:
        encoder = optimizer.encoder_learning_rate / optimizer.learning_rate
    image = encoder
    if not has_head and optimizer.image_learning_rate > 0:
        image = optimizer.image_learning_rate / optimizer.learning_rate
    towers = depths(params)

    def one(role: Role, leaf: Any) -> Any:
        if role.part.serves == "head":
            return 1.0
        if words is not None and role.part.serves not in words:
            return 0.0
        own = image if role.part.serves == "image" else encoder
        if dual_encoder:
            rate = sides.get(role.part.tower, -1)
            own = rate / optimizer.learning_rate if rate > 0 else 1.0
        if role.part.wide and role.kind != "table":  # beside them single numbers alone are wide
            own *= optimizer.projection_rate
        if role.part.place == TOP or decay == 1.0:
            return own
        stacks = towers.get(role.part.tower, {})
        total = sum(stacks.values())
        if role.stack is None:
            return own * decay ** (total + 1)
        below = sum(list(stacks.values())[: list(stacks).index(role.stack)])
        layer = below + np.arange(leaf.shape[0])
        factors = (own * decay ** (total - layer)).astype(np.float32)
        return factors.reshape((-1,) + (1,) * (leaf.ndim - 1))

    return map_with_roles(one, params)


def is_matrix(params: Any) -> Any:
    """True for kernels and tables of two or more dimensions, stacked layers not counted."""
    return map_with_roles(
        lambda role, leaf: role.kind in ("kernel", "table") and role.dimensions(leaf) >= 2, params
    )


def clip_by_global_norm(gradients: Any, norm: jax.Array, limit: float) -> Any:
    """Scales gradients so that their global norm is at most `limit` (0: no limit)."""
    if not limit:
        return gradients
    factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * factor, gradients)
