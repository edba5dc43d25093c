"""One optimizer step: one forward pass, its losses, one update. Pure functions, no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from coca_jax import losses, partitioning, text_lengths
from coca_jax.models import coca, roles
from coca_jax.models.coca import CoCa
from coca_jax.optimizer import (
    clip_by_global_norm,
    make_optimizer,
    make_schedule,
    rate_factors,
)

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes. step, skipped: int32; ema: averaged params or None.

    opt_state and ema cover only what is trained (see `trainable`).
    """

    step: jax.Array
    skipped: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def make_state(model: CoCa, config: ConfigDict, rng: jax.Array) -> TrainState:
    """A fresh state; parameters boxed with their axis names (trace it with jax.eval_shape)."""
    boxed = coca.init(model, rng)
    params = partitioning.unbox(boxed)
    zero = jnp.zeros((), jnp.int32)
    trained = trainable(params, config)
    ema = trained if config.optimizer.ema else None
    return TrainState(zero, zero, boxed, make_optimizer(config.optimizer).init(trained), ema)


def trainable(params: dict, config: ConfigDict) -> dict:
    """The part of a tree of parameters (or of anything by parameter) that the run trains.

    Everything without a head. With one: the head, and unless encoder_learning_rate is 0 what its
    loss and the losses beside it depend on; weight decay would shrink what has no gradient.
    """
    if not config.head.kind:
        return params
    frozen = config.optimizer.encoder_learning_rate == 0
    captions, pairs = config.loss.captioning_weight, config.loss.contrastive_weight
    decodes = bool(captions) or config.head.kind != "classification"

    served = {"head"} if frozen else {"head", "image"}
    if not frozen:
        served |= {"decoding"} if decodes or pairs else set()
        served |= {"captioning"} if captions or pairs else set()
        served |= {"contrastive"} if pairs else set()
    return roles.select(params, lambda part: part.serves in served)


def merge(params: dict, part: dict) -> dict:
    """`params` with the parameters in `part` put in their place."""
    merged = dict(params)
    for key, value in part.items():
        merged[key] = merge(params[key], value) if isinstance(value, dict) else value
    return merged


def state_shardings(model: CoCa, config: ConfigDict, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """(abstract state, its shardings on the mesh), without making an array.

    Raises ValueError when a parameter cannot be split evenly over the mesh.
    """
    boxed = jax.eval_shape(lambda: make_state(model, config, jax.random.key(0)))
    specs = partitioning.param_specs(boxed.params, mesh)
    abstract = boxed.replace(params=partitioning.unbox(boxed.params))
    partitioning.check_divisible(mesh, abstract.params, specs)
    scalar: Any = jax.sharding.PartitionSpec()
    tree = TrainState(
        step=scalar,
        skipped=scalar,
        params=specs,
        opt_state=partitioning.optimizer_specs(abstract.opt_state, abstract.params, specs),
        ema=trainable(specs, config) if config.optimizer.ema else None,
    )
    return abstract, partitioning.shardings(mesh, tree)


def init_state(model: CoCa, config: ConfigDict, mesh: Mesh) -> TrainState:
    """A fresh state, made directly in its place on the mesh from config.seed."""
    _, sharding = state_shardings(model, config, mesh)

    def init(seed: jax.Array) -> TrainState:
        state = make_state(model, config, jax.random.key(seed))
        return state.replace(params=partitioning.unbox(state.params))

    return jax.jit(init, out_shardings=sharding)(config.seed)


def normalise_pixels(image: jax.Array, model: ConfigDict) -> jax.Array:
    """[..., S, S, 3] in 0 to 255 -> float32, (x / 255 - mean) / std with the model's constants."""
    mean = jnp.asarray(model.image_mean, jnp.float32) * 255
    std = jnp.asarray(model.image_std, jnp.float32) * 255
    return (image.astype(jnp.float32) - mean) / std


def shrink(image: jax.Array, size: int) -> jax.Array:
    """[..., S, S, 3] -> [..., size, size, 3], averaging pixels; as it is when S = size."""
    if image.shape[-2] == size:
        return image
    shape = image.shape[:-3] + (size, size, 3)
    return jax.image.resize(image.astype(jnp.float32), shape, "linear", antialias=True)


def size_at(config: ConfigDict, step: int, steps: int) -> int:
    """Image size of a step by config.image_sizes: ((share of the run, size), ...), then the
    model's own (CLIPA: small images first, full size at the end)."""
    done = 0.0
    for share, size in config.image_sizes:
        done += share
        if step < done * steps:
            return int(size)
    return config.model.image_size


def caption_targets(tokens: jax.Array, text_valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(targets int [B, L], mask bool [B, L]): position t is to predict token t + 1, where valid."""
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return targets, jnp.pad(text_valid[:, 1:], ((0, 0), (0, 1)))


def contrastive(outputs: Any, batch: Batch, loss: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """The contrastive loss of (image_embedding, text_embedding, scale, logit_bias) by config."""
    return losses.contrastive_loss(
        outputs.image_embedding,
        outputs.text_embedding,
        outputs.scale,
        logit_bias=outputs.logit_bias,
        text_id=batch["text_id"],
        kind=loss.contrastive,
        duplicates=loss.duplicate_texts,
        chunk=loss.contrastive_chunk,
        reduction=loss.reduction,
    )


def captioning(
    outputs: Any, batch: Batch, loss: ConfigDict, num_targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The captioning loss over `num_targets` tokens; (loss, negative log-likelihoods [B, L])."""
    if isinstance(outputs.states, tuple):
        return captioning_by_length(outputs, batch, loss, num_targets)
    targets, mask = caption_targets(batch["tokens"], batch["text_valid"])
    return losses.weighted_captioning_loss(
        outputs.states,
        outputs.kernel,
        outputs.bias,
        targets,
        mask.astype(jnp.float32) / num_targets,
        chunk=loss.caption_chunk,
        z_loss=loss.z_loss,
        label_smoothing=loss.label_smoothing,
    )


def captioning_by_length(
    outputs: Any, batch: Batch, loss: ConfigDict, num_targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`captioning` of the outputs of text_lengths.Split."""
    rows, length = batch["tokens"].shape
    parts = rows // outputs.states[1].shape[0]
    texts = zip(*(text_lengths.split(batch[name], parts) for name in ("tokens", "text_valid")))
    total, nlls = jnp.zeros((), jnp.float32), []
    for states, (tokens, valid) in zip(outputs.states, texts):
        cut = dict(tokens=tokens[:, : states.shape[1]], text_valid=valid[:, : states.shape[1]])
        value, nll = captioning(outputs.replace(states=states), cut, loss, num_targets)
        total += value
        nlls.append(jnp.pad(nll, ((0, 0), (0, length - states.shape[1]))))
    return total, text_lengths.join(*nlls)


def count_targets(batch: Batch) -> jax.Array:
    """Target tokens in the batch, float32, at least 1."""
    return jnp.maximum(batch["text_valid"][:, 1:].sum(), 1).astype(jnp.float32)


def forward(
    model: CoCa, config: ConfigDict, params: Any, batch: Batch, rng: jax.Array
) -> coca.Outputs:
    """One training pass over the batch -> coca.Outputs."""
    pixels = normalise_pixels(batch["image"], config.model)
    outputs: Any = model.apply(
        {"params": cast_kernels(params, config.model.dtype)},
        pixels,
        batch["tokens"],
        batch["text_valid"],
        batch.get("prompt_len"),
        deterministic=False,
        rngs={"patch_dropout": rng},
    )
    return outputs


def head_alone(config: ConfigDict) -> bool:
    """Whether the head's loss is the only one, so that no more than the head needs is run."""
    loss = config.loss
    return bool(config.head.kind) and not (loss.contrastive_weight or loss.captioning_weight)


def classify(
    model: CoCa, config: ConfigDict, params: Any, batch: Batch, rng: jax.Array
) -> jax.Array:
    """The task head's logits in training, float32 [B, C], without the rest of the model."""
    logits: Any = model.apply(
        {"params": params},
        normalise_pixels(batch["image"], config.model),
        batch["tokens"],
        batch["prompt_len"],
        deterministic=False,
        rngs={"patch_dropout": rng},
        method="classify",
    )
    return logits


def head_loss(
    logits: jax.Array, class_id: jax.Array, label_smoothing: float, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of logits [B, C] with classes int [B], over `count` rows; -1 is no class.

    Label smoothing e gives the true class 1 - e + e / C and each other e / C (Szegedy et al.
    2016). Returns (loss, number of rows whose class has the highest logit).
    """
    known = class_id >= 0
    logs = jax.nn.log_softmax(logits)
    true = jnp.take_along_axis(logs, jnp.maximum(class_id, 0)[:, None], axis=1)[:, 0]
    rows = -(1 - label_smoothing) * true - label_smoothing * logs.mean(1)
    right = known & (logits.argmax(1) == class_id)
    return jnp.where(known, rows, 0.0).sum() / count, right.sum()


def count_known(batch: Batch) -> jax.Array:
    """Rows of the batch that have a class, float32, at least 1."""
    return jnp.maximum((batch["class_id"] >= 0).sum(), 1).astype(jnp.float32)


def cast_kernels(params: Any, dtype: Any) -> Any:
    """Stacked kernels in the dtype that they are used in. Cast outside the loop over layers, their
    gradients are stacked in that dtype too: half the bytes in bfloat16, and the values that the
    products give either way."""

    def one(role: roles.Role, x: jax.Array) -> jax.Array:
        return x.astype(dtype) if role.kind == "kernel" and role.stack is not None else x

    return roles.map_with_roles(one, params)


def loss_fn(
    params: Any, model: CoCa, config: ConfigDict, batch: Batch, rng: jax.Array
) -> tuple[jax.Array, Metrics]:
    """One forward graph, all losses (paper, Eq. 4); metrics are split by source.

    With a task head its loss is added, or stands alone where the others have weight 0.
    """
    loss = jnp.zeros((), jnp.float32)
    metrics: Metrics = {}
    if head_alone(config):
        class_logits = classify(model, config, params, batch, rng)
    else:
        outputs = forward(model, config, params, batch, rng)
        metrics["temperature"] = 1 / outputs.scale
        class_logits = outputs.class_logits
    if config.head.kind:
        count = count_known(batch)
        smoothing = config.head.label_smoothing
        value, right = head_loss(class_logits, batch["class_id"], smoothing, count)
        loss += config.head.weight * value
        metrics |= {"head_loss": value, "head_accuracy": right / count}
    if config.loss.contrastive_weight:
        value, rows = contrastive(outputs, batch, config.loss)
        loss += config.loss.contrastive_weight * value
        metrics |= {"contrastive_loss": value} | by_source("contrastive_loss", rows, 1.0, batch)
    if config.loss.captioning_weight:
        value, nll = captioning(outputs, batch, config.loss, count_targets(batch))
        loss += config.loss.captioning_weight * value
        metrics |= {"captioning_loss": value} | caption_metrics(nll, batch)
    return loss, metrics | {"loss": loss}


def caption_metrics(nll: jax.Array, batch: Batch) -> Metrics:
    """Mean negative log-likelihood per token of each source."""
    tokens = batch["text_valid"][:, 1:].sum(1).astype(jnp.float32)
    return by_source("captioning_loss", nll.sum(1), tokens, batch)


def by_source(name: str, total: jax.Array, count: jax.Array | float, batch: Batch) -> Metrics:
    """Means over alt-text rows and over label rows: {name/caption, name/label}; NaN when empty."""
    label = batch["is_label"].astype(jnp.float32)
    return {
        f"{name}/{kind}": (total * rows).sum() / (count * rows).sum()
        for kind, rows in (("caption", 1 - label), ("label", label))
    }


def value_and_gradients(
    params: Any, model: CoCa, config: ConfigDict, batch: Batch, rng: jax.Array
) -> tuple[Any, Metrics]:
    """Gradients of what is trained over the whole batch, in `accumulate_steps` micro-batches, and
    metrics. Frozen parameters are constants: nothing is computed backwards through them."""
    if config.accumulate_steps > 1:
        return accumulated_gradients(params, model, config, batch, rng)

    def objective(trained: Any) -> tuple[jax.Array, Metrics]:
        return loss_fn(merge(params, trained), model, config, batch, rng)

    return jax.grad(objective, has_aux=True)(trainable(params, config))


def accumulated_gradients(
    params: Any, model: CoCa, config: ConfigDict, batch: Batch, rng: jax.Array
) -> tuple[Any, Metrics]:
    """Exact gradients of the whole batch with the memory of one micro-batch (GradCache).

    First the embeddings of all micro-batches without gradient; then the contrastive loss over all
    pairs and its gradient with respect to each embedding; then every micro-batch again, pulling
    that gradient and its share of the captioning and the head's loss back to the parameters.
    """
    num = config.accumulate_steps
    micro = jax.tree.map(lambda x: split_rows(x, num), batch)
    rngs = jax.random.split(rng, num)
    weights = config.loss
    num_targets = count_targets(batch)

    def embed(carry: None, inputs: tuple[Batch, jax.Array]) -> tuple[None, Any]:
        outputs = forward(model, config, params, *inputs)
        return carry, (outputs.image_embedding, outputs.text_embedding)

    use_contrastive = bool(weights.contrastive_weight)
    scale, logit_bias = model.apply({"params": params}, method="similarity")
    metrics: Metrics = {} if head_alone(config) else {"temperature": 1 / scale}
    loss = jnp.zeros((), jnp.float32)
    trained = trainable(params, config)
    gradients = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
    if use_contrastive:
        _, embeddings = jax.lax.scan(embed, None, (micro, rngs))
        image, text = (merge_rows(e) for e in embeddings)

        def whole(image: Any, text: Any, similarity: Any) -> tuple[jax.Array, jax.Array]:
            outputs = _Similarity(image, text, *similarity)
            return contrastive(outputs, batch, weights)

        (value, rows), pulls = jax.value_and_grad(whole, argnums=(0, 1, 2), has_aux=True)(
            image, text, (scale, logit_bias)
        )
        d_image, d_text, d_similarity = jax.tree.map(
            lambda g: weights.contrastive_weight * g, pulls
        )
        _, pull_similarity = jax.vjp(
            lambda t: model.apply({"params": merge(params, t)}, method="similarity"), trained
        )
        gradients = jax.tree.map(jnp.add, gradients, pull_similarity(d_similarity)[0])
        cotangents = (split_rows(d_image, num), split_rows(d_text, num))
        loss += weights.contrastive_weight * value
        metrics |= {"contrastive_loss": value} | by_source("contrastive_loss", rows, 1.0, batch)
    else:
        cotangents = (None, None)

    num_known = count_known(batch) if config.head.kind else None

    def backward(carry: Any, inputs: Any) -> tuple[Any, jax.Array]:
        rows, rng, (d_image, d_text) = inputs

        def objective(trained: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            zero = jnp.zeros((), jnp.float32)
            total, value, nll = zero, zero, jnp.zeros(rows["tokens"].shape, jnp.float32)
            of_head, right = zero, jnp.zeros((), jnp.int32)
            everything = merge(params, trained)
            if head_alone(config):
                class_logits = classify(model, config, everything, rows, rng)
            else:
                outputs = forward(model, config, everything, rows, rng)
                class_logits = outputs.class_logits
            if num_known is not None:
                smoothing = config.head.label_smoothing
                of_head, right = head_loss(class_logits, rows["class_id"], smoothing, num_known)
                total += config.head.weight * of_head
            if use_contrastive:
                total += (outputs.image_embedding * d_image).sum()
                total += (outputs.text_embedding * d_text).sum()
            if weights.captioning_weight:
                value, nll = captioning(outputs, rows, weights, num_targets)
                total += weights.captioning_weight * value
            return total, ((value, of_head, right), nll)

        (_, (sums, nll)), grads = jax.value_and_grad(objective, has_aux=True)(trained)
        return jax.tree.map(jnp.add, carry, (grads, sums)), nll

    zero = jnp.zeros((), jnp.float32)
    start = (gradients, (zero, zero, jnp.zeros((), jnp.int32)))
    (gradients, sums), nll = jax.lax.scan(backward, start, (micro, rngs, cotangents))
    value, of_head, right = sums
    if num_known is not None:
        loss += config.head.weight * of_head
        metrics |= {"head_loss": of_head, "head_accuracy": right / num_known}
    if weights.captioning_weight:
        loss += weights.captioning_weight * value
        metrics |= {"captioning_loss": value} | caption_metrics(merge_rows(nll), batch)
    return gradients, metrics | {"loss": loss}


@flax.struct.dataclass
class _Similarity:
    image_embedding: jax.Array
    text_embedding: jax.Array
    scale: jax.Array
    logit_bias: jax.Array | None


def split_rows(x: jax.Array, num: int) -> jax.Array:
    """[B, ...] -> [num, B / num, ...], row i to micro-batch i % num, so that each micro-batch
    spans all devices and no row moves."""
    x = jnp.moveaxis(x.reshape((x.shape[0] // num, num) + x.shape[1:]), 1, 0)
    return partitioning.constrain(x, None, "batch", *(None,) * (x.ndim - 2))


def merge_rows(x: jax.Array) -> jax.Array:
    """The inverse of `split_rows`."""
    x = jnp.moveaxis(x, 0, 1).reshape((x.shape[0] * x.shape[1],) + x.shape[2:])
    return partitioning.constrain(x, "batch", *(None,) * (x.ndim - 1))


def make_update(
    config: ConfigDict, steps: int
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """(state, gradients of what is trained) -> (the next state, metrics of the update).

    params <- params - rate(step) x factor x rule(gradients clipped to clip_norm), where rate is
    the schedule's, factor is that of the parameter's part and layer, and rule is the optimizer's
    with its weight decay; ema <- ema x decay + params x (1 - decay), of the new parameters.

    A step whose gradient is not finite changes nothing but the step and the count of such steps.
    """
    schedule, optimizer = make_schedule(config.optimizer, steps), make_optimizer(config.optimizer)
    decay = config.optimizer.ema

    def update(state: TrainState, gradients: Any) -> tuple[TrainState, Metrics]:
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm)
        gradients = clip_by_global_norm(gradients, norm, config.optimizer.clip_norm)
        trained = trainable(state.params, config)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        rate = schedule(state.step)
        factors = rate_factors(trained, config.optimizer, bool(config.head.kind))
        moved = jax.tree.map(
            lambda p, u, f: p - rate * f * u.astype(p.dtype), trained, updates, factors
        )
        ema = state.ema
        if decay:
            ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, moved)

        def keep_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        skipped = state.skipped + jnp.where(finite, 0, 1)
        state = TrainState(
            step=state.step + 1,
            skipped=skipped,
            params=merge(state.params, keep_finite(moved, trained)),
            opt_state=keep_finite(opt_state, state.opt_state),
            ema=keep_finite(ema, state.ema),
        )
        return state, {"learning_rate": rate, "gradient_norm": norm, "skipped_steps": skipped}

    return update


def make_train_step(
    model: CoCa,
    config: ConfigDict,
    steps: int,
    image_size: int | None = None,
    lengths: text_lengths.Lengths | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """(state, batch) -> (state, metrics); jit it with the state donated.

    image_size: of a stage of the size curriculum; default: the model's.
    lengths: of captions, from text_lengths.choose; default: the model's max_len.
    """
    update = make_update(config, steps)
    image_size = image_size or config.model.image_size
    short, long = lengths or (config.model.text.max_len,) * 2
    runner: Any = model if short == long else text_lengths.Split(model, config.text_parts, short)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        batch = text_lengths.trim(batch, long) | {"image": shrink(batch["image"], image_size)}
        gradients, metrics = value_and_gradients(state.params, runner, config, batch, rng)
        state, of_update = update(state, gradients)
        return state, metrics | of_update

    return train_step
