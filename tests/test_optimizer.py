"""The update rule against its definitions (update_rules.py), several steps long.

Trees are small and random (optimizer_cases.py); test_roles.py reads the names of real models.
Differences are in units of the learning rate, which every update is about as large as; TOLERANCE is
that of float32 sums over six steps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import update_rules
from conftest import tiny, tiny_config
from optimizer_cases import (
    ENCODER,
    KERNELS,
    SHAPES,
    STEPS,
    TOLERANCE,
    assert_steps_are_those_of_the_definition,
    definition,
    draw,
    factor,
    flat,
    gradients_of,
    make_config,
    nested,
    ours,
)

from coca_jax.models import coca
from coca_jax.parallel import sharding
from coca_jax.training import optimizer
from coca_jax.training import train_step as train_steps
from coca_jax.training.state import TrainState


@pytest.mark.parametrize(
    "changes, tolerance",
    [
        (dict(name="adamw", weight_decay=0.3), TOLERANCE),
        (dict(name="adamw", weight_decay=0.3, clip_norm=0.0, schedule="constant"), TOLERANCE),
        # At step 3 the second moment's decay, 1 - 3^-0.8 = 0.585, meets its cap.
        (dict(name="adafactor", beta1=0.0, beta2=0.5, weight_decay=0.3), TOLERANCE),
        (dict(name="adafactor", beta1=0.0, beta2=0.999, clip_norm=0.0), TOLERANCE),
        # The first moment is kept in bfloat16, 8 bits, and this program rounds it once more.
        (dict(name="adafactor", beta1=0.9, beta2=0.6, schedule="cosine"), 0.02),
        (dict(name="muon", weight_decay=0.3), TOLERANCE),
    ],
)
def test_every_step_is_that_of_the_definition(changes, tolerance):
    gradients = [gradients_of(step) for step in range(STEPS)]
    assert_steps_are_those_of_the_definition(make_config(**changes), gradients, tolerance)


@pytest.mark.parametrize("skipped", [None, STEPS - 3, STEPS - 1])
def test_an_average_over_the_last_steps_is_their_mean(skipped):
    """Of all steps the last half; before them it is the newest parameters. Behind a step that is
    skipped stand those of before."""
    config = make_config(average_share=0.5)
    gradients = [gradients_of(step) for step in range(STEPS)]
    if skipped is not None:
        gradients[skipped]["log_scale/value"] = np.float32(np.nan)
    states, metrics = ours(config, gradients)
    assert metrics[-1]["skipped_steps"] == (skipped is not None)
    first = STEPS - round(STEPS / 2)
    jax.tree.map(np.testing.assert_array_equal, states[first].ema, states[first].params)
    last = [state.params for state in states[first + 1 :]]
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *last)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), states[-1].ema, mean)


def test_adafactor_keeps_what_the_paper_keeps():
    """Rows and columns of the second moment, nothing beside them; the first in half the bytes."""
    states, _ = ours(make_config(name="adafactor"), [gradients_of(0)])
    second, _, first, _ = states[-1].opt_state
    for name, values in flat(first.ema).items():
        assert values.dtype == jnp.bfloat16 and values.shape == SHAPES[name]
    sizes = {
        name: sum(tree[name].size for tree in map(flat, (second.v_row, second.v_col, second.v)))
        for name in SHAPES
    }
    assert sizes[ENCODER + "mlp/in/kernel"] == 3 * (40 + 34) + 1  # ... and a placeholder
    assert sizes["image_encoder/positions/value"] == 36 + 33 + 1
    assert sizes["text_decoder/token_embedding/value"] == 50 * 31 + 2  # a side below 32: whole
    assert sizes[ENCODER + "attention/query/kernel"] == 3 * 40 * 40 + 2


def test_adafactor_takes_the_layers_of_a_deep_stack_one_by_one():
    """40 layers are no axis to factor over, and one large gradient is clipped alone."""
    shapes = {
        "mlp_norm/scale": (40, 36),
        "mlp/in/kernel": (40, 36, 34),
        "attention/out/bias": (40,),
    }
    shapes = {ENCODER + name: shape for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    rule = optimizer.make_optimizer(make_config(name="adafactor", beta1=0.0).optimizer)
    wanted = update_rules.Adafactor(0.0, 0.99, shapes)
    params = nested({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    state, run = rule.init(params), jax.jit(rule.update)
    for step in range(3):
        found = {n: rng.normal(size=s) * 10 ** rng.uniform(-3, 3, s) for n, s in shapes.items()}
        for gradients in found.values():
            gradients[7] *= 1e3 if step == 2 else 1.0
        found = {name: x.astype(np.float32) for name, x in found.items()}
        updates, state = run(nested(found), state, params)
        exact = wanted({name: x.astype(np.float64) for name, x in found.items()})
        for name, update in flat(updates).items():
            np.testing.assert_allclose(update, exact[name], rtol=2e-4, atol=1e-7, err_msg=name)
    second = state[0]
    assert flat(second.v)[ENCODER + "mlp_norm/scale"].shape == (40, 36)  # whole
    assert flat(second.v_row)[ENCODER + "mlp/in/kernel"].shape == (40, 34)
    assert flat(second.v)[ENCODER + "mlp/in/kernel"].shape == (1,)


def test_decay_head_and_layers_each_have_their_own_rate():
    config = make_config(layer_decay=0.5, encoder_learning_rate=0.005, weight_decay=0.3)
    config = config.change({"head.kind": "classification"})
    gradients = [gradients_of(step) for step in range(3)]
    factors = functools.partial(factor, encoder=0.1, decay=0.5)
    assert_steps_are_those_of_the_definition(config, gradients, TOLERANCE, factors)
    config = config.change({"optimizer.encoder_learning_rate": -1.0})  # as learning_rate
    factors = functools.partial(factor, decay=0.5)
    assert_steps_are_those_of_the_definition(config, gradients[:2], TOLERANCE, factors)
    headless = {"head.kind": "", "optimizer.encoder_learning_rate": 0.005}
    config = config.change(headless)  # where that has no effect
    assert_steps_are_those_of_the_definition(config, gradients[:2], TOLERANCE, factors)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_projections_have_their_share_of_the_rate(name):
    """Decay's as well; as embeddings have unit length, an eighth of it is what projections that are
    drawn eight times as large have at the whole one."""
    config = make_config(name=name, weight_decay=0.3, projection_rate=0.125)
    gradients = [gradients_of(step) for step in range(3)]
    factors = functools.partial(factor, projections=0.125)
    states, _ = assert_steps_are_those_of_the_definition(config, gradients, TOLERANCE, factors)
    fixed, _ = ours(config.change({"optimizer.projection_rate": 0.0}), gradients)
    kernel = "image_to_joint/kernel"
    np.testing.assert_array_equal(flat(fixed[-1].params)[kernel], draw(0, 0.3)[kernel])
    undecayed = {"optimizer.weight_decay": 0.0, "optimizer.clip_norm": 0.0}
    slow, _ = ours(config.change(undecayed), gradients)
    start = draw(0, 0.3)
    large = start | {kernel: 8 * start[kernel]}
    whole, _ = ours(config.change(undecayed | {"optimizer.projection_rate": 1.0}), gradients, large)
    found, wanted = flat(whole[-1].params)[kernel] / 8, flat(slow[-1].params)[kernel]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert abs(wanted - start[kernel]).max() > 1e-3


def test_the_projections_of_a_model_are_the_two_into_the_joint_space():
    """The temperature beside them keeps the whole rate."""
    names = {"image_to_joint/kernel", "text_to_joint/kernel"}
    config = make_config(projection_rate=0.5)
    params = jax.eval_shape(lambda: coca.init(coca.build(config.model), jax.random.key(0)))
    rates = flat(optimizer.rate_factors(sharding.unbox(params), config.optimizer, False))
    assert {name for name, rate in rates.items() if rate != 1} == names


def test_frozen_parts_keep_every_bit_and_have_no_state():
    """The clipped norm is that of the head alone."""
    config = make_config(encoder_learning_rate=0.0, weight_decay=0.3, ema=0.5)
    config = config.change({"head.kind": "classification"})
    gradients = [gradients_of(step) for step in range(3)]
    head = [
        {n: g for n, g in found.items() if n.startswith("head/classifier")} for found in gradients
    ]
    states, metrics = ours(config, gradients)
    wanted = definition(config, head)
    for name, values in flat(states[-1].params).items():
        if name in head[0]:
            worst = np.abs(values - wanted[-1][name]).max()
            assert worst < TOLERANCE * config.optimizer.learning_rate, name
        else:
            np.testing.assert_array_equal(values, draw(0, 0.3)[name], err_msg=name)
    assert set(flat(states[-1].ema)) == set(head[0]) == set(flat(states[-1].opt_state[0].mu))
    norm = np.sqrt(sum((g**2).sum() for g in head[2].values()))
    np.testing.assert_allclose(metrics[2]["gradient_norm"], norm, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_what_no_loss_depends_on_keeps_every_bit(name):
    """Weight decay alone would move it: by 23% in these steps."""
    config = make_config(name=name, weight_decay=2.0, ema=0.5)
    for weight, idle in (
        ("captioning_weight", {"text_decoder/multimodal", "text_decoder/head"}),
        ("contrastive_weight", {"image_to_joint", "log_scale", "text_decoder/unimodal_norm"}),
    ):
        found = [gradients_of(step) for step in range(3)]
        for gradients in found:
            for path in gradients:
                if path.startswith(tuple(idle)):
                    gradients[path] *= 0
        last = flat(ours(config.change({f"loss.{weight}": 0.0}), found)[0][-1].params)
        for path, start in draw(0, 0.3).items():
            same = np.array_equal(last[path], start)
            assert same == path.startswith(tuple(idle)), path


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_steps_that_are_not_finite_count_for_the_schedule_alone(name):
    """Moments, averages and parameters are as if the step had not been; the rate goes on."""
    config = make_config(name=name, beta1=0.0, beta2=0.5, weight_decay=0.3, ema=0.75)
    gradients = [gradients_of(step) for step in range(STEPS)]
    gradients[1]["log_scale/value"] = np.float32(np.nan)
    gradients[3]["text_decoder/head/bias/value"][7] = -np.inf
    states, metrics = assert_steps_are_those_of_the_definition(config, gradients, TOLERANCE)
    for step in (1, 3):
        before, after = states[step], states[step + 1]
        for part in ("params", "opt_state", "ema"):
            jax.tree.map(np.testing.assert_array_equal, getattr(before, part), getattr(after, part))
    assert [int(state.step) for state in states] == list(range(STEPS + 1))
    assert [int(state.skipped) for state in states] == [0, 0, 1, 1, 2, 2, 2]
    assert [int(m["skipped_steps"]) for m in metrics] == [0, 1, 1, 2, 2, 2]


def test_averages_follow_the_parameters_of_each_step():
    """ema_t = d ema_(t-1) + (1 - d) params_t, d at most 0.3, and in the first steps (1 + t) /
    (10 + t): the first parameters are soon left, whatever the decay."""
    config = make_config(ema=0.3)
    states, _ = ours(config, [gradients_of(step) for step in range(STEPS)])
    wanted = {n: p.astype(np.float64) for n, p in draw(0, 0.3).items()}
    decays = [0.1, 2 / 11, 0.25, 0.3, 0.3, 0.3]
    for decay, state in zip(decays, states[1:], strict=True):
        new = {n: p.astype(np.float64) for n, p in flat(state.params).items()}
        wanted = {n: decay * w + (1 - decay) * new[n] for n, w in wanted.items()}
        for name, values in flat(state.ema).items():
            np.testing.assert_allclose(values, wanted[name], rtol=0, atol=2e-7, err_msg=name)
    assert ours(make_config(), [gradients_of(0)])[0][-1].ema is None
    # One that teaches hidden patches follows slowly from the first step on.
    end = ours(config.change({"loss.hidden_weight": 1.0}), [gradients_of(0)])[0][-1]
    for name, values in flat(end.ema).items():
        slow = 0.3 * draw(0, 0.3)[name].astype(np.float64) + 0.7 * flat(end.params)[name]
        np.testing.assert_allclose(values, slow, rtol=0, atol=2e-7, err_msg=name)


def test_the_temperature_falls_no_lower_than_asked_and_rises_again():
    """Three steps towards lower ones and three back: held at 0.5 = exp(-log_scale), and from there
    as if it had never been pushed on; nothing else moves otherwise."""
    config = make_config(schedule="constant", beta1=0.0, clip_norm=0.0, ema=0.5)
    gradients = [gradients_of(step) for step in range(STEPS)]
    for step, found in enumerate(gradients):
        found["log_scale/value"] = np.float32(-1 if step < 3 else 1)
    start = draw(0, 0.3) | {"log_scale/value": np.float32(np.log(2) - 0.06)}
    free, _ = ours(config, gradients, start)
    held, _ = ours(config.change({"loss.min_temperature": 0.5}), gradients, start)

    def at(states, part):
        return [float(getattr(state, part)["log_scale"]["value"]) for state in states]

    rates = 0.05 * np.array([0.5, 1, 1, -1, -1, -1])
    np.testing.assert_allclose(np.diff(at(free, "params")), rates, rtol=1e-4)
    bound = np.float32(np.log(2))
    assert at(held, "params")[2:4] == [bound, bound] and max(at(free, "params")) > bound + 0.06
    np.testing.assert_allclose(np.diff(at(held, "params"))[3:], rates[3:], rtol=1e-4)
    assert max(at(held, "ema")) <= bound
    for one, other in zip(free, held):
        for name, values in flat(one.params).items():
            if name != "log_scale/value":
                np.testing.assert_array_equal(values, flat(other.params)[name], err_msg=name)


def test_metrics_of_an_update():
    """The rate of this step, and the norm before it is clipped."""
    gradients = [gradients_of(step) for step in range(STEPS)]
    _, metrics = ours(make_config(), gradients)
    rates = [m["learning_rate"] for m in metrics]
    np.testing.assert_allclose(
        rates, 0.05 * np.array([1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4]), rtol=1e-6
    )
    for found, values in zip(gradients, metrics):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in found.values()))
        np.testing.assert_allclose(values["gradient_norm"], norm, rtol=1e-6)


@pytest.mark.parametrize(
    "size, limit, factor",
    [(0.5, 1.0, 1.0), (1.0, 1.0, 1.0), (4.0, 1.0, 0.25), (4.0, 2.5, 0.625), (4.0, 0.0, 1.0)],
)
def test_clipping_shortens_what_is_too_long_and_nothing_else(size, limit, factor):
    """Sizes that float32 holds exactly: what is not too long keeps every bit."""
    gradients = {"a": np.float32([[0.5, -0.5], [0.5, 0.0]]), "b": np.float32(0.5)}  # of norm 1
    gradients = jax.tree.map(lambda g: np.float32(size) * g, gradients)
    found = optimizer.clip_by_global_norm(gradients, jnp.float32(size), limit)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, factor * b), found, gradients)


def test_no_gradient_at_all_is_not_divided_by_its_norm():
    found = optimizer.clip_by_global_norm({"a": jnp.zeros(3)}, jnp.float32(0), 1.0)
    np.testing.assert_array_equal(found["a"], np.zeros(3))


def test_muon_updates_of_kernels_are_orthogonal_and_of_one_size():
    """After one step from zero, of gradients of any size."""
    gradients = gradients_of(0)
    start = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    config = make_config(name="muon", schedule="constant", warmup_steps=0)
    states, _ = ours(config, [gradients], start)
    louder, _ = ours(config, [{n: 1000 * g for n, g in gradients.items()}], start)
    moved = flat(states[-1].params)
    for name, (layers, rows, columns) in KERNELS.items():
        sides = [int(np.prod([SHAPES[name][i] for i in side])) for side in (rows, columns)]
        matrices = moved[name].transpose(layers + rows + columns).reshape(-1, *sides)
        for matrix in matrices / config.optimizer.learning_rate:
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(sides) ** 0.5)
            assert 0.6 < np.median(values) and values.max() < 1.3, (name, values)
        np.testing.assert_allclose(
            moved[name], flat(louder[-1].params)[name], atol=1e-4 * config.optimizer.learning_rate
        )


def test_every_step_and_every_seed_draw_anew(monkeypatch):
    """What drops out by chance in a step; the same where the step is done again."""
    model = coca.build(tiny_config().model)

    def drawn(seed, number):
        state = TrainState(jnp.int32(number), jnp.int32(0), {}, (), None)
        batch = dict(tokens=jnp.zeros((1, 8), jnp.int32), text_valid=jnp.ones((1, 8), bool))
        train_step = train_steps.make_train_step(model, tiny(seed=seed))
        return tuple(train_step(state, batch, None)[1]["drawn"].tolist())

    def gradients(params, model, config, batch, rng, lengths):
        return None, {"drawn": jax.random.key_data(rng)}

    monkeypatch.setattr(train_steps, "value_and_gradients", gradients)
    monkeypatch.setattr(train_steps, "make_update", lambda *_: lambda state, *_: (state, {}))
    found = {drawn(seed, number) for seed in (0, 1) for number in (0, 1, 2)}
    assert len(found) == 6 and drawn(1, 2) in found
