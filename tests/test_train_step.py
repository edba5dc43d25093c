"""The train step: both losses from one pass, exact accumulation, any mesh, finite steps only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh_state, params_of, random_batch, tiny_config, train_step_of
from ops_cases import drawn

from coca_jax.config import typed
from coca_jax.models import coca, param_groups
from coca_jax.models.image_encoder import shrink
from coca_jax.parallel import sharding
from coca_jax.training.optimizer import make_schedule
from coca_jax.training.state import init_state, state_shardings
from coca_jax.training.train_step import (
    loss_and_metrics,
    make_train_step,
    size_at,
    teacher_of,
    value_and_gradients,
)


def build(config):
    return coca.build(config.model, loss=config.loss)


def cheap(model):
    """Parameters that are no program's, which takes as long to compile as a forward pass."""
    return drawn(jax.eval_shape(functools.partial(coca.init, model), jax.random.key(0)), 0.1)


def fresh(config, draw=cheap):
    model = build(config)
    params = draw(model)
    batch = {k: jnp.asarray(v) for k, v in random_batch(config).items()}
    return model, params, batch


def compute_loss(params, model, config, batch):
    return jax.jit(lambda p, b: loss_and_metrics(p, model, config, b, jax.random.key(0)))(
        params, batch
    )


def compute_gradients(params, model, config, batch):
    return jax.jit(lambda p, b: value_and_gradients(p, model, config, b, jax.random.key(0)))(
        params, batch
    )


def assert_close(got, want, tolerance):
    """Differences relative to the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module")
def started():
    """A model of 256 joint dimensions and 512 words as it is drawn: its parameters, a batch of 64
    pairs and its metrics."""
    config = tiny_config(embed_dim=256)
    config.batch_size = 64
    config.model.text.vocab_size = 512
    model, params, batch = fresh(config, params_of)
    return config, params, batch, compute_loss(params, model, config, batch)[1]


def test_losses_at_the_start_are_those_of_guessing(started):
    *_, metrics = started
    assert abs(metrics["contrastive_loss"] - 2 * np.log(64)) < 0.5
    assert abs(metrics["captioning_loss"] - np.log(512)) < 0.1
    np.testing.assert_allclose(
        metrics["loss"], metrics["contrastive_loss"] + 2 * metrics["captioning_loss"], rtol=1e-6
    )
    np.testing.assert_allclose(metrics["temperature"], 0.07, rtol=1e-5)


def test_metrics_split_by_source_average_to_the_whole(started):
    *_, batch, metrics = started
    label = np.asarray(batch["is_label"]).mean()
    parts = label * metrics["contrastive_loss/label"]
    parts += (1 - label) * metrics["contrastive_loss/caption"]
    np.testing.assert_allclose(parts, metrics["contrastive_loss"], rtol=1e-5)


@pytest.mark.long
def test_hidden_image_tokens_change_the_captions_alone(started):
    config, params, batch, want = started
    config = config.copy_and_resolve_references()
    config.model.pooler.token_dropout = 0.7
    got = compute_loss(params, build(config), config, batch)[1]
    np.testing.assert_allclose(got["contrastive_loss"], want["contrastive_loss"], rtol=1e-6)
    assert abs(got["captioning_loss"] - want["captioning_loss"]) > 1e-4


@pytest.fixture(scope="module", params=["softmax", "sigmoid"])
def whole(request):
    """A model and a batch with the gradients and the metrics of the whole batch: config, model,
    parameters, batch, gradients, metrics."""
    config = tiny_config()
    config.loss.update(contrastive=request.param, duplicate_texts="positives", caption_chunk=16)
    config.loss.captioning_weight = 3.0
    model, params, batch = fresh(config)
    return config, model, params, batch, *compute_gradients(params, model, config, batch)


def test_every_parameter_gets_a_finite_gradient(whole):
    for path, g in jax.tree_util.tree_leaves_with_path(whole[4]):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(g).all(), name
        if "key']['bias" not in name:  # softmax does not see a constant added to every score
            assert np.abs(g).max() > 0, name


@pytest.mark.long
def test_accumulated_gradients_are_those_of_the_whole_batch(whole):
    config, model, params, batch, want, want_metrics = whole
    config = config.copy_and_resolve_references()
    config.accumulate_steps = dict(softmax=4, sigmoid=2)[config.loss.contrastive]
    got, got_metrics = compute_gradients(params, model, config, batch)
    assert set(got_metrics) == set(want_metrics)
    assert_close(got, want, 1e-5)
    assert_close(got_metrics, want_metrics, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("whole", ["softmax"], indirect=True)
def test_gradients_are_those_of_the_loss_that_is_told(whole):
    config, model, params, batch, got, _ = whole

    def told(params):
        return loss_and_metrics(params, model, config, batch, jax.random.key(0))[0]

    assert_close(got, jax.jit(jax.grad(told))(params), 1e-5)


def test_without_captioning_the_multimodal_half_is_untouched(config):
    config.loss.captioning_weight = 0.0
    model, params, batch = fresh(config)
    grads = jax.device_get(compute_gradients(params, model, config, batch)[0])
    upper = (grads["text_decoder"]["multimodal"], grads["text_decoder"]["head"])
    assert all(not np.any(g) for g in jax.tree.leaves(upper))
    assert np.any(grads["image_encoder"]["patch_embedding"]["kernel"])


@pytest.mark.long
def test_both_losses_cost_little_more_than_captioning_alone():
    """Paper, Table 8b: one forward graph serves both (FLOPs, all sizes larger here)."""
    flops = {}
    for name, weight in (("both", 1.0), ("captioning", 0.0)):
        config = tiny_config(embed_dim=128, bias=False)
        # XLA counts no operation inside of a kernel of ours.
        config.model.update(image_size=64, implementation="xla")
        config.model.image.update(width=128, mlp_dim=512)
        config.model.text.update(width=128, mlp_dim=512, max_len=32, vocab_size=2000)
        config.model.pooler.num_queries = 16
        config.loss.contrastive_weight = weight
        model = build(config)
        shapes = jax.eval_shape(functools.partial(coca.init, model), jax.random.key(0))
        params = sharding.unbox(shapes)
        batch = random_batch(config)

        def gradients(params, batch, model=model, config=config):
            return value_and_gradients(params, model, config, batch, jax.random.key(0))

        # Loops are counted once, so layers count once in both; that hides none of the difference.
        flops[name] = jax.jit(gradients).lower(params, batch).cost_analysis()["flops"]
    assert flops["both"] / flops["captioning"] < 1.02


@functools.cache
def learner(optimizer, mesh):
    """A config, its model, the jitted step, compiled once for several tests, and its shardings."""
    config = tiny_config()
    config.optimizer.update(name=optimizer, learning_rate=1e-2, schedule="constant")
    config.model.text.update(width=32, mlp_dim=64)
    if optimizer == "adamw":
        config.optimizer.ema = 0.5
    else:  # those that meshes are compared by
        config.loss.update(duplicate_texts="ignore", caption_chunk=8, contrastive_chunk=4)
    model = build(config)
    _, shardings = state_shardings(model, config, mesh)
    step = jax.jit(make_train_step(model, config), out_shardings=(shardings, None))
    return config, model, step, shardings


@functools.cache
def by_heart(optimizer, mesh):
    """A state before its first step, the step at a high rate, and a batch without equal texts."""
    config, model, step, _ = learner(optimizer, mesh)
    batch, schedule = random_batch(config), make_schedule(typed(config).optimizer, 100)
    batch["text_id"] = np.arange(config.batch_size, dtype=np.int32)[:, None].repeat(2, 1)
    batch, start = sharding.place_batch(mesh, batch), fresh_state(model, config, mesh)
    return start, lambda state, batch: step(state, batch, schedule), batch


def run(optimizer, mesh, start, steps=3):
    """Losses and parameters after some steps on the mesh from the same host-side start."""
    with jax.set_mesh(mesh):
        config, _, step, shardings = learner(optimizer, mesh)
        state, losses = jax.device_put(start, shardings), []
        schedule = make_schedule(typed(config).optimizer, steps)._replace(peak=np.float32(1e-3))
        for i in range(steps):
            batch = sharding.place_batch(mesh, random_batch(config, i))
            state, metrics = step(state, batch, schedule)
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(state.params)


@pytest.mark.parametrize(
    "optimizer, sizes",
    [("adafactor", (1, 8, 1)), ("muon", (2, 2, 2))],
)
@pytest.mark.long
def test_any_mesh_gives_the_same_training(optimizer, sizes, one_device_mesh):
    start = jax.device_get(by_heart(optimizer, one_device_mesh)[0])
    want_losses, want = run(optimizer, one_device_mesh, start)
    losses, params = run(optimizer, sharding.make_mesh(*sizes), start)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, want)


def test_a_step_that_is_not_finite_changes_nothing(one_device_mesh):
    state, step, batch = by_heart("adamw", one_device_mesh)
    params = dict(state.params)
    params["image_to_joint"] = jax.tree.map(lambda x: x * jnp.nan, params["image_to_joint"])
    after, metrics = step(state.replace(params=params), batch)
    assert int(after.step) == 1 and int(after.skipped) == 1
    assert float(metrics["skipped_steps"]) == 1
    for a, b in zip(jax.tree.leaves(after.opt_state), jax.tree.leaves(state.opt_state)):
        np.testing.assert_array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, after.ema, state.ema)
    jax.tree.map(np.testing.assert_array_equal, after.params, params)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
@pytest.mark.long
def test_one_batch_is_learned_by_heart(one_device_mesh, optimizer):
    state, step, batch = by_heart(optimizer, one_device_mesh)
    for _ in range(100):
        state, metrics = step(state, batch)
    assert float(metrics["contrastive_loss"]) < 0.05
    assert float(metrics["captioning_loss"]) < 0.05


def test_averaged_parameters_lag_behind(one_device_mesh):
    start, step, batch = by_heart("adamw", one_device_mesh)
    after, _ = step(start, batch)
    jax.tree.map(
        lambda a, p, e: np.testing.assert_allclose(e, 0.1 * a + 0.9 * p, atol=1e-7),
        *jax.device_get((start.params, after.params, after.ema)),  # no program for each shape
    )


@pytest.mark.long
def test_a_bag_of_tokens_trains_its_layer_and_the_encoder(config):
    config.loss.update(bag_weight=1.0, contrastive_weight=0.0, captioning_weight=0.0)
    model, params, batch = fresh(config)
    gradients, metrics = jax.device_get(compute_gradients(params, model, config, batch))
    assert metrics["loss"] == metrics["bag_loss"] and 0 < metrics["bag_loss"] < 6
    assert np.any(gradients["bag_head"]["value"])
    assert np.any(gradients["image_encoder"]["patch_embedding"]["kernel"])
    assert not any(np.any(g) for g in jax.tree.leaves(gradients["text_decoder"]))


def hiding(mesh):
    """A run of hidden patches alone, which compiles no text decoder: config, model, its first
    state and a batch."""
    config = tiny_config(patch_size=4, bias=False)
    config.model.image.class_token = True
    config.loss.update(hidden_weight=1.0, contrastive_weight=0.0, captioning_weight=0.0)
    config.optimizer.update(ema=0.9, learning_rate=1e-2, schedule="constant", weight_decay=0.0)
    model = build(config)
    batch = sharding.place_batch(mesh, random_batch(config))
    return config, model, fresh_state(model, config, mesh), batch


@pytest.mark.long
def test_hidden_patches_are_learned_from_the_averaged_model(one_device_mesh):
    """Micro-batches give the same teacher; the error falls on one batch, and the mask token, the
    predictor and the encoder are what learns."""
    config, model, start, batch = hiding(one_device_mesh)
    state = start
    once = jax.jit(lambda s, b: teacher_of(s, model, config, b))(state, batch)["teacher_tokens"]
    assert once.shape == (16, 16, 16)
    np.testing.assert_allclose(np.asarray(once).std(-1), 1, atol=1e-2)
    config.accumulate_steps = 4
    again = jax.jit(lambda s, b: teacher_of(s, model, config, b))(state, batch)
    np.testing.assert_allclose(again["teacher_tokens"], once, atol=1e-5)
    config.accumulate_steps = 1
    step, errors = train_step_of(model, config, 100), []
    for _ in range(60):
        state, metrics = step(state, batch)
        errors.append(float(metrics["hidden_loss"]))
    assert metrics["loss"] == metrics["hidden_loss"]
    assert np.mean(errors[-10:]) < 0.7 * np.mean(errors[:3])
    host = jax.device_get((state.params, start.params))  # no program for each shape
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), *host)
    assert moved["image_encoder"]["mask_token"]["value"] and moved["token_predictor"]["kernel"]
    assert not any(jax.tree.leaves(moved["text_decoder"]))
    kept = param_groups.without_training_aids(state.params)
    assert "token_predictor" not in kept and "mask_token" not in kept["image_encoder"]


def test_any_seed_that_a_config_may_have_draws_parameters(config, one_device_mesh):
    config.model.bias = False  # fewer arrays to draw

    def drawn_by(seed):
        config.seed = seed
        return init_state(build(config), config, one_device_mesh).params["text_decoder"]

    large = 3_000_000_000  # no int32
    one, other = drawn_by(large), drawn_by(large - 2**31)
    assert not np.array_equal(*(x["token_embedding"]["value"] for x in (one, other)))
    key = jax.random.key(large)
    wanted = sharding.unbox(jax.jit(lambda k: coca.init(build(config), k))(key))
    jax.tree.map(np.testing.assert_array_equal, one, wanted["text_decoder"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(drawn_by(2**32 - 1)))


def test_stages_of_images_begin_where_those_of_batches_do(config):
    with config.unlocked():
        config.image_sizes = ((0.1, 8), (0.2, 16))  # 0.1 + 0.2 is a bit more than 0.3
        config.model.image_size = 24
    assert [size_at(config, step, 10) for step in range(5)] == [8, 16, 16, 24, 24]
    config.image_sizes = ()
    assert size_at(config, 0, 10) == 24


@pytest.mark.long
def test_a_size_curriculum_trains_small_images_first(config, one_device_mesh):
    config.model.image_size = 32
    config.image_sizes = ((0.5, 16), (0.25, 24))
    sizes = [size_at(config, step, 8) for step in range(8)]
    assert sizes == [16] * 4 + [24] * 2 + [32] * 2
    flat = jnp.full((2, 32, 32, 3), 100, jnp.uint8)
    np.testing.assert_allclose(shrink(flat, 16), 100, rtol=1e-6)
    config, model, state, batch = hiding(one_device_mesh)
    after, metrics = train_step_of(model, config, 8, 8)(state, batch)
    assert np.isfinite(metrics["loss"])
    shape = after.params["image_encoder"]["positions"]["value"].shape
    assert shape == (17, 16)  # the table stays that of full-size images, and of a class token
