"""Task heads: what is trained and at which rate, their loss, what they see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    fresh_state,
    random_batch,
    tiny,
    tiny_config,
    train_step_of,
)
from jax.interpreters import partial_eval
from ops_cases import drawn

from coca_jax.config import Loss, heads
from coca_jax.models import coca, param_groups
from coca_jax.models.image_encoder import normalise_pixels
from coca_jax.parallel import sharding
from coca_jax.training import losses as objectives
from coca_jax.training import optimizer
from coca_jax.training.losses import head_loss
from coca_jax.training.state import state_shardings, trainable
from coca_jax.training.train_step import value_and_gradients

pytestmark = pytest.mark.usefixtures("compile_once")


CLASSES = 5


def head_config(kind="classification", **changes):
    config = tiny_config(bias=False)  # fewer arrays
    config.head.kind = kind
    config.loss.update(contrastive_weight=0.0, captioning_weight=0.0)
    config.optimizer.update(schedule="constant", warmup_steps=0, weight_decay=0.0)
    config.optimizer.update(changes)
    return config


def build(config):
    return coca.build(config.model, head=config.head, num_classes=CLASSES)


@functools.cache
def _shapes(model):
    return jax.eval_shape(lambda: sharding.unbox(coca.init(model, jax.random.key(0))))


def abstract_params(model):
    """Of a module, traced once for all tests."""
    return jax.tree.map(lambda x: x, _shapes(model))  # the caller's own


def fresh(model):
    """Parameters of which none is zero, as the classifier's are at the beginning."""
    return drawn(_shapes(model))


def head_batch(config, seed=0):
    batch = random_batch(config, seed)
    rng = np.random.default_rng(seed)
    if config.head.kind == "pair":
        batch["image"] = np.stack([batch["image"], batch["image"][::-1]], 1)
    batch["class_id"] = rng.integers(-1, CLASSES, config.batch_size).astype(np.int32)
    batch["prompt_len"] = np.minimum(batch["text_valid"].sum(1) - 1, 3).astype(np.int32)
    return batch


def run_steps(config, mesh, steps=2):
    model = build(config)
    start = fresh_state(model, config, mesh)
    step = train_step_of(model, config, 100)
    state = start
    for i in range(steps):
        state, metrics = step(state, sharding.place_batch(mesh, head_batch(config, i)))
    return jax.device_get(start), jax.device_get(state), metrics


def largest_move(start, end, *path):
    for key in path:
        start, end = start[key], end[key]
    moves = jax.tree.map(lambda a, b: np.abs(a - b).max(), start, end)
    return max(jax.tree.leaves(moves))


def test_a_frozen_encoder_stays_bit_for_bit_and_has_no_optimizer_state(one_device_mesh):
    config = head_config(encoder_learning_rate=0.0, ema=0.5, weight_decay=0.1)
    start, end, metrics = run_steps(config, one_device_mesh)
    for part in start.params:
        if part != "head":
            jax.tree.map(np.testing.assert_array_equal, start.params[part], end.params[part])
    assert largest_move(start.params, end.params, "head", "classifier") > 1e-3
    assert largest_move(start.params, end.params, "head", "pooler") > 1e-4
    assert set(end.ema) == {"head"}
    head = sum(x.size for x in jax.tree.leaves(start.params["head"]))
    assert sum(x.size for x in jax.tree.leaves(end.opt_state)) == 2 * head + 1  # Adam's count
    assert np.isfinite(metrics["head_loss"]) and "captioning_loss" not in metrics


def test_a_frozen_encoder_costs_no_backward_pass():
    flops = {}
    for rate in (0.0, 1e-4):
        config = head_config(encoder_learning_rate=rate)
        # XLA counts no operation inside of a kernel of ours.
        config.model.update(image_size=64, implementation="xla")
        config.model.image.update(depth=1)
        model = build(config)
        params = abstract_params(model)
        batch = head_batch(config)

        def gradients(params, batch, model=model, config=config):
            rng = jax.random.key(0)
            return value_and_gradients(params, model, config, batch, rng)

        grads, _ = jax.eval_shape(gradients, params, batch)
        assert ("image_encoder" in grads) == (rate > 0)
        flops[rate] = jax.jit(gradients).lower(params, batch).cost_analysis()["flops"]
    assert flops[0.0] < 0.55 * flops[1e-4]


def test_only_what_the_losses_read_is_trained():
    """Weight decay would shrink what has no gradient."""

    def parts(kind, **loss):
        config = head_config(kind, encoder_learning_rate=1e-4)
        config.loss.update(loss)
        params = abstract_params(build(config))
        found = trainable(params, config)
        return set(found), set(params["text_decoder"]) - set(found.get("text_decoder", {}))

    assert parts("classification")[0] == {"head", "image_encoder"}
    read, left = parts("answer")
    assert read == {"head", "image_encoder", "generative_pooler", "text_decoder"}
    assert left == {"cls", "unimodal_norm", "head"}
    assert parts("answer", captioning_weight=1.0)[1] == {"cls", "unimodal_norm"}
    assert parts("classification", captioning_weight=1.0)[0] == read
    read, left = parts("classification", contrastive_weight=1.0)
    assert {"contrastive_pooler", "generative_pooler", "log_scale", "text_to_joint"} < read
    assert left == {"multimodal", "multimodal_norm", "head"}


@pytest.mark.parametrize(
    ("pooler", "kind"),
    [
        *(("cascade", "classification"), ("parallel", "answer")),
        *(("open_clip", "answer"), ("none", "classification")),
    ],
)
def test_a_loss_serves_the_parts_that_it_depends_on(pooler, kind):
    """And no other one, which weight decay would shrink: by what jax's program of it reads."""
    changes = {"head.kind": kind, "model.pooler.kind": pooler, "model.bias": False}
    config = tiny(**changes, **{"model.image.class_token": pooler == "none"})
    weights = {name: 1.0 for name in vars(Loss()) if name.endswith("_weight")}
    sizes = dict(teacher_width=16, global_examples=40)
    config = config.change({"loss": weights | sizes | dict(contrastive="sigmoid")})
    model = coca.build(config.model, head=config.head, num_classes=CLASSES, loss=config.loss)
    params, batch = abstract_params(model), every_field(config)
    losses = []
    for objective in objectives.OBJECTIVES:
        every = objective is objectives.GlobalContrastive
        given = config.change({"loss.contrastive": "global" if every else "sigmoid"})
        losses.append(objective.of(given, objectives.REFERENCE))

    def values(params):
        rngs = {"patch_dropout": jax.random.key(0)}
        given = [batch[k] for k in ("pixels", "tokens", "text_valid", "prompt_len")]
        found = model.apply({"params": params}, *given, deterministic=False, rngs=rngs)
        inputs = batch | vars(found)
        return [loss.value(inputs, loss.totals(inputs))[0] for loss in losses]

    program = jax.make_jaxpr(values)(params).jaxpr
    paths = [path for path in param_groups.PARTS if leaves(params, path)]
    # Numbers of the similarity do not decay, nor do what stands for [CLS], which is cut off again,
    # and for hidden patches.
    aside = {("log_scale",), ("logit_bias",), ("text_decoder", "cls")}
    aside.add(("image_encoder", "mask_token"))
    for number, loss in enumerate(losses):
        read = partial_eval.dce_jaxpr(program, [i == number for i in range(len(losses))])[1]
        read = jax.tree.unflatten(jax.tree.structure(params), read)
        depends = {path for path in paths if any(leaves(read, path))}
        found = param_groups.served(params, loss.serves, heads.pooler_kind(pooler))
        served = {path for path in paths if leaves(found, path)}
        assert len(served) > 5 and depends - aside == served - aside, loss.name


def every_field(config):
    """All fields of a batch that some loss reads, and its pixels."""
    batch, rows = head_batch(config), config.batch_size
    rng = np.random.default_rng(0)
    batch |= {f"teacher_{side}": rng.normal(size=(rows, 16)) for side in ("image", "text")}
    batch["teacher_tokens"] = rng.normal(size=(rows, 4, 16))
    batch |= {f"estimate/{side}": np.zeros(rows, np.float32) for side in ("image", "text")}
    batch["pixels"] = normalise_pixels(batch["image"], config.model)
    return {name: jnp.asarray(x) for name, x in batch.items()}


def leaves(tree, path):
    """The arrays of a tree of parameters at a path."""
    for name in path:
        tree = tree.get(name, {})
    return jax.tree.leaves(tree)


def test_head_and_layers_move_at_their_own_rates(one_device_mesh):
    config = head_config(learning_rate=1e-2, encoder_learning_rate=1e-3, layer_decay=0.5)
    start, end, _ = run_steps(config, one_device_mesh)
    for part in ("text_decoder", "generative_pooler", "contrastive_pooler", "image_to_joint"):
        jax.tree.map(np.testing.assert_array_equal, start.params[part], end.params[part])
    # The classifier begins at zero, so all else has its first gradient in the second step, where
    # Adam's update is the same multiple of the rate for every weight.
    head = largest_move(start.params, end.params, "head", "pooler", "attention", "value")
    top = largest_move(start.params, end.params, "image_encoder", "final_norm")
    np.testing.assert_allclose(top / head, 0.1, rtol=0.02)
    blocks = [
        t.params["image_encoder"]["blocks"]["layers"]["mlp"]["in"]["kernel"] for t in (start, end)
    ]
    moves = np.abs(blocks[1] - blocks[0]).max((1, 2))
    bottom = largest_move(start.params, end.params, "image_encoder", "patch_embedding")
    np.testing.assert_allclose(np.array([bottom, *moves]) / top, [0.125, 0.25, 0.5], rtol=0.05)


def test_rate_factors_of_both_towers():
    config = head_config(learning_rate=1e-2, encoder_learning_rate=1e-3, layer_decay=0.5)
    params = abstract_params(build(config))
    factors = optimizer.rate_factors(params, config.optimizer, True)
    decoder = factors["text_decoder"]
    kernel = ("layers", "mlp", "in", "kernel")
    for half, want in (("unimodal", [1 / 16, 1 / 8]), ("multimodal", [1 / 4, 1 / 2])):
        found = decoder[half]
        for key in kernel:
            found = found[key]
        assert found.shape == (2, 1, 1)
        np.testing.assert_allclose(found.ravel(), 0.1 * np.array(want), rtol=1e-6)
    np.testing.assert_allclose(decoder["token_embedding"]["value"], 0.1 / 32)
    np.testing.assert_allclose(decoder["multimodal_norm"]["scale"], 0.1)
    np.testing.assert_allclose(factors["generative_pooler"]["query"]["value"], 0.1)
    assert factors["head"]["classifier"]["kernel"] == 1.0


def test_a_head_may_be_wider_than_the_model():
    config = head_config()
    config.head.update(num_queries=2, width=48, num_heads=6)
    config.model.image.width = 32
    head = abstract_params(build(config))["head"]
    attention = head["pooler"]["attention"]
    assert head["pooler"]["query"]["value"].shape == (2, 48)
    assert attention["query"]["kernel"].shape == (48, 6, 8)
    assert attention["value"]["kernel"].shape == (32, 6, 8)
    assert head["classifier"]["kernel"].shape == (2 * 48, CLASSES)


def test_a_head_and_its_optimizer_state_split_over_the_mesh():
    config = head_config(encoder_learning_rate=0.0, ema=0.9)
    mesh = sharding.make_mesh(1, 8, 1)
    abstract, shardings = state_shardings(build(config), config, mesh)
    kernels = [shardings.params, shardings.ema, shardings.opt_state[0].mu]
    specs = {tuple(tree["head"]["classifier"]["kernel"].spec) for tree in kernels}
    assert specs == {("fsdp", None)}
    assert set(abstract.opt_state[0].mu) == {"head"}


def test_head_loss_against_numpy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4)).astype(np.float32)
    class_id = np.array([0, 3, -1, 2, 2, -1], np.int32)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rows = []
    for row, c in enumerate(class_id):
        if c >= 0:
            target = np.full(4, 0.2 / 4)
            target[c] += 0.8
            rows.append(-(target * logs[row]).sum())
    count = jnp.asarray(4.0)
    loss, right = head_loss(jnp.asarray(logits), jnp.asarray(class_id), 0.2, count)
    np.testing.assert_allclose(loss, np.mean(rows), rtol=1e-5)
    assert int(right) == ((logits.argmax(1) == class_id) & (class_id >= 0)).sum()


@pytest.mark.parametrize(
    "kind, captioning",
    [pytest.param("classification", 0.0, marks=pytest.mark.slow), ("answer", 1.0)],
)
@pytest.mark.long
def test_accumulated_head_gradients_are_those_of_the_whole_batch(kind, captioning):
    config = head_config(kind)
    config.loss.update(captioning_weight=captioning, caption_chunk=16)
    config.head.label_smoothing = 0.1
    model = build(config)
    params = fresh(model)
    batch = {k: jnp.asarray(v) for k, v in head_batch(config).items()}
    found = []
    for steps in (1, 4):
        config.accumulate_steps = steps
        found.append(
            jax.jit(lambda p, b: value_and_gradients(p, model, config, b, jax.random.key(0)))(
                params, batch
            )
        )
    (want, want_metrics), (got, got_metrics) = found
    assert set(want_metrics) == set(got_metrics)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(float(np.abs(b).max()), 1e-3))
    for name in want_metrics:
        if np.isfinite(want_metrics[name]):
            np.testing.assert_allclose(got_metrics[name], want_metrics[name], rtol=1e-4)


def test_rows_without_a_class_do_not_count_in_the_mean_of_the_head():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    class_id = jnp.asarray([0, -1, 2, -1], jnp.int32)
    head = objectives.Head(1.0, 0.0, False)
    total = head.totals(dict(class_id=class_id))
    loss, _ = head.value(dict(class_id=class_id, class_logits=jnp.asarray(logits)), total)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(loss, -(logs[0, 0] + logs[2, 2]) / 2, rtol=1e-5)


def test_the_head_does_not_see_the_answer():
    config = head_config("answer")
    model = build(config)
    params = fresh(model)
    batch = head_batch(config)
    pixels = np.asarray(normalise_pixels(jnp.asarray(batch["image"]), config.model))
    forward = jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs).class_logits)

    def run(tokens):
        return forward(params, pixels, tokens, batch["text_valid"], batch["prompt_len"])

    want = run(batch["tokens"])
    other = np.where(
        np.arange(8) < batch["prompt_len"][:, None], batch["tokens"], batch["tokens"] // 2 + 1
    )
    np.testing.assert_allclose(run(other), want, atol=1e-6)
    alone = jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs, method="classify"))(
        params, pixels, batch["tokens"], batch["prompt_len"]
    )
    np.testing.assert_allclose(alone, want, atol=1e-5)
    changed = np.where(np.arange(8) == 1, 7, batch["tokens"])
    assert np.abs(run(changed) - want).max() > 1e-3


def test_a_pair_is_two_passes_side_by_side():
    config = head_config("pair")
    model = build(config)
    params = fresh(model)
    kernel = params["head"]["classifier"]["kernel"]
    assert kernel.shape == (2 * 16, CLASSES)
    params["head"]["classifier"]["kernel"] = np.concatenate([kernel[:16]] * 2)
    batch = head_batch(config)
    pixels = np.asarray(normalise_pixels(jnp.asarray(batch["image"]), config.model))

    forward = jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs, method="classify"))

    def logits(pixels):
        return forward(params, pixels, batch["tokens"], batch["prompt_len"])

    found = logits(pixels)
    assert found.shape == (config.batch_size, CLASSES)
    # With the same weights for both places the order of the images cannot matter.
    np.testing.assert_allclose(logits(pixels[:, ::-1]), found, atol=1e-5)
    other = np.stack([pixels[:, 0], np.roll(pixels[:, 0], 1, 0)], 1)
    assert np.abs(logits(other) - found).max() > 1e-3
