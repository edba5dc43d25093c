"""One optimizer step: one forward pass, both losses, one update. Pure functions, no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from coca_jax import losses, partitioning
from coca_jax.models import coca
from coca_jax.models.coca import CoCa
from coca_jax.optimizer import clip_by_global_norm, make_optimizer, make_schedule

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes. step, skipped: int32; ema: averaged params or None."""

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
    ema = params if config.optimizer.ema else None
    return TrainState(zero, zero, boxed, make_optimizer(config.optimizer).init(params), ema)


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
        ema=specs if config.optimizer.ema else None,
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
    """[B, S, S, 3] in 0 to 255 -> float32, (x / 255 - mean) / std with the model's constants."""
    mean = jnp.asarray(model.image_mean, jnp.float32) * 255
    std = jnp.asarray(model.image_std, jnp.float32) * 255
    return (image.astype(jnp.float32) - mean) / std


def shrink(image: jax.Array, size: int) -> jax.Array:
    """[B, S, S, 3] -> [B, size, size, 3], averaging pixels; as it is when S = size."""
    if image.shape[1] == size:
        return image
    shape = (image.shape[0], size, size, 3)
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


def count_targets(batch: Batch) -> jax.Array:
    """Target tokens in the batch, float32, at least 1."""
    return jnp.maximum(batch["text_valid"][:, 1:].sum(), 1).astype(jnp.float32)


def forward(
    model: CoCa, config: ConfigDict, params: Any, batch: Batch, rng: jax.Array
) -> coca.Outputs:
    """One training pass over the batch -> coca.Outputs."""
    pixels = normalise_pixels(batch["image"], config.model)
    outputs: Any = model.apply(
        {"params": cast_kernels(params, model.dtype)},
        pixels,
        batch["tokens"],
        batch["text_valid"],
        deterministic=False,
        rngs={"patch_dropout": rng},
    )
    return outputs


def cast_kernels(params: Any, dtype: Any) -> Any:
    """Stacked kernels in the dtype that they are used in. Cast outside the loop over layers, their
    gradients are stacked in that dtype too: half the bytes in bfloat16, and the values that the
    products give either way."""

    def one(path: Any, x: jax.Array) -> jax.Array:
        names = [getattr(k, "key", None) for k in path]
        return x.astype(dtype) if "layers" in names and names[-1] == "kernel" else x

    return jax.tree_util.tree_map_with_path(one, params)


def loss_fn(
    params: Any, model: CoCa, config: ConfigDict, batch: Batch, rng: jax.Array
) -> tuple[jax.Array, Metrics]:
    """One forward graph, both losses (paper, Eq. 4); metrics are split by source."""
    outputs = forward(model, config, params, batch, rng)
    loss = jnp.zeros((), jnp.float32)
    metrics: Metrics = {}
    if config.loss.contrastive_weight:
        value, rows = contrastive(outputs, batch, config.loss)
        loss += config.loss.contrastive_weight * value
        metrics |= {"contrastive_loss": value} | by_source("contrastive_loss", rows, 1.0, batch)
    if config.loss.captioning_weight:
        value, nll = captioning(outputs, batch, config.loss, count_targets(batch))
        loss += config.loss.captioning_weight * value
        metrics |= {"captioning_loss": value} | caption_metrics(nll, batch)
    return loss, metrics | {"loss": loss, "temperature": 1 / outputs.scale}


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
    """Gradients of the whole batch and metrics, in `accumulate_steps` micro-batches."""
    if config.accumulate_steps == 1:
        grad = jax.grad(loss_fn, has_aux=True)
        return grad(params, model, config, batch, rng)
    return accumulated_gradients(params, model, config, batch, rng)


def accumulated_gradients(
    params: Any, model: CoCa, config: ConfigDict, batch: Batch, rng: jax.Array
) -> tuple[Any, Metrics]:
    """Exact gradients of the whole batch with the memory of one micro-batch (GradCache).

    First the embeddings of all micro-batches without gradient; then the contrastive loss over all
    pairs and its gradient with respect to each embedding; then every micro-batch again, pulling
    that gradient and its share of the captioning loss back to the parameters.
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
    metrics: Metrics = {"temperature": 1 / scale}
    loss = jnp.zeros((), jnp.float32)
    gradients = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
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
            lambda p: model.apply({"params": p}, method="similarity"), params
        )
        gradients = jax.tree.map(jnp.add, gradients, pull_similarity(d_similarity)[0])
        cotangents = (split_rows(d_image, num), split_rows(d_text, num))
        loss += weights.contrastive_weight * value
        metrics |= {"contrastive_loss": value} | by_source("contrastive_loss", rows, 1.0, batch)
    else:
        cotangents = (None, None)

    def backward(carry: Any, inputs: Any) -> tuple[Any, jax.Array]:
        rows, rng, (d_image, d_text) = inputs

        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            outputs = forward(model, config, params, rows, rng)
            total = jnp.zeros((), jnp.float32)
            value, nll = jnp.zeros((), jnp.float32), jnp.zeros(rows["tokens"].shape, jnp.float32)
            if use_contrastive:
                total += (outputs.image_embedding * d_image).sum()
                total += (outputs.text_embedding * d_text).sum()
            if weights.captioning_weight:
                value, nll = captioning(outputs, rows, weights, num_targets)
                total += weights.captioning_weight * value
            return total, (value, nll)

        (_, (value, nll)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        gradients, captioning_total = carry
        return (jax.tree.map(jnp.add, gradients, grads), captioning_total + value), nll

    start = (gradients, jnp.zeros((), jnp.float32))
    (gradients, value), nll = jax.lax.scan(backward, start, (micro, rngs, cotangents))
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


def make_train_step(
    model: CoCa, config: ConfigDict, steps: int, image_size: int | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """(state, batch) -> (state, metrics); jit it with the state donated.

    image_size: of a stage of the size curriculum; default: the model's.

    A step whose gradient is not finite changes nothing but the step and the count of such steps.
    """
    schedule, optimizer = make_schedule(config.optimizer, steps), make_optimizer(config.optimizer)
    decay = config.optimizer.ema
    image_size = image_size or config.model.image_size

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        batch = batch | {"image": shrink(batch["image"], image_size)}
        gradients, metrics = value_and_gradients(state.params, model, config, batch, rng)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm)
        gradients = clip_by_global_norm(gradients, norm, config.optimizer.clip_norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        rate = schedule(state.step)
        params = jax.tree.map(lambda p, u: p - rate * u.astype(p.dtype), state.params, updates)
        ema = state.ema
        if decay:
            ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, params)

        def keep_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        skipped = state.skipped + jnp.where(finite, 0, 1)
        state = TrainState(
            step=state.step + 1,
            skipped=skipped,
            params=keep_finite(params, state.params),
            opt_state=keep_finite(opt_state, state.opt_state),
            ema=keep_finite(ema, state.ema),
        )
        return state, metrics | {
            "learning_rate": rate,
            "gradient_norm": norm,
            "skipped_steps": skipped,
        }

    return train_step
