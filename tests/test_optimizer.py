"""The update rule against its definitions (update_rules.py), several steps long.

Trees are small and random, with names and shapes as a model has them; one test reads the names of
a real model. Differences are in units of the learning rate, which every update is about as large
as; TOLERANCE is that of float32 sums over six steps.
"""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import update_rules
from conftest import tiny, tiny_config

import coca_jax
from coca_jax import optimizer, partitioning, recipes
from coca_jax.config import Optimizer
from coca_jax.models import coca, roles
from coca_jax.training.state import TrainState, trainable
from coca_jax.training.step import make_update

TOLERANCE = 2e-5
KEY = jax.random.key(0)
STEPS = 6
ENCODER, DECODER = "image_encoder/blocks/layers/", "text_decoder/multimodal/layers/"

SHAPES = {
    "image_encoder/patch_embedding/kernel": (48, 40),
    "image_encoder/positions/value": (36, 33),
    ENCODER + "attention/query/kernel": (3, 40, 4, 10),
    ENCODER + "attention/query/bias": (3, 4, 10),
    ENCODER + "attention/out/kernel": (3, 4, 10, 40),
    ENCODER + "attention/out/bias": (3, 40),
    ENCODER + "mlp/in/kernel": (3, 40, 34),
    ENCODER + "mlp_norm/scale": (3, 40),
    "image_encoder/final_norm/scale": (40,),
    "image_to_joint/kernel": (33, 32),
    "text_decoder/token_embedding/value": (50, 31),
    "text_decoder/unimodal/layers/mlp/out/kernel": (2, 34, 32),
    DECODER + "mlp/out/kernel": (2, 34, 32),
    "text_decoder/unimodal_norm/scale": (32,),
    "text_decoder/multimodal_norm/scale": (32,),
    "text_decoder/head/kernel/value": (32, 50),
    "text_decoder/head/bias/value": (50,),
    "log_scale/value": (),
    "head/classifier/kernel": (40, 3),
    "head/classifier/bias": (3,),
}

# Weight decay: kernels and tables. Muon: kernels but for the softmax over the vocabulary, as
# (layers, axes that are summed over, axes of the outputs).
TABLES = {
    "image_encoder/positions/value",
    "text_decoder/token_embedding/value",
    "text_decoder/head/kernel/value",
}
KERNELS = {
    "image_encoder/patch_embedding/kernel": ((), (0,), (1,)),
    ENCODER + "attention/query/kernel": ((0,), (1,), (2, 3)),
    ENCODER + "attention/out/kernel": ((0,), (1, 2), (3,)),
    ENCODER + "mlp/in/kernel": ((0,), (1,), (2,)),
    "image_to_joint/kernel": ((), (0,), (1,)),
    "text_decoder/unimodal/layers/mlp/out/kernel": ((0,), (1,), (2,)),
    DECODER + "mlp/out/kernel": ((0,), (1,), (2,)),
    "head/classifier/kernel": ((), (0,), (1,)),
}
DECAYED = TABLES | set(KERNELS)

# layer_decay's power for each layer of three in the encoder, of two and two in the decoder.
DEPTHS = {
    "image_encoder/patch_embedding/": 4,
    "image_encoder/positions/": 4,
    ENCODER: (3, 2, 1),
    "text_decoder/token_embedding/": 5,
    "text_decoder/unimodal/": (4, 3),
    DECODER: (2, 1),
}


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in SHAPES.items()}


def gradients_of(step):
    """Of very different sizes: some steps below the norm of 1, some above, some near it."""
    scale = (1e-3, 0.5, 0.008, 3.0, 0.004, 0.02)[step]
    found = draw(100 + step, scale)
    found[ENCODER + "mlp/in/kernel"][0] *= 30.0  # so that clipping its RMS is seen
    return found


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    return tree


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in leaves}


def make_config(**changes):
    rule = dict(name="adamw", schedule="linear", beta1=0.9, beta2=0.99, clip_norm=1.0)
    rates = dict(learning_rate=0.05, warmup_steps=2, weight_decay=0.0, layer_decay=1.0)
    return tiny(optimizer=rule | rates | changes)


def ours(config, gradients, start=None):
    """States before and after each step, on the host, and the metrics of each step."""
    params = jax.tree.map(jnp.asarray, nested(start or draw(0, 0.3)))
    trained = trainable(params, config)
    rule = optimizer.make_optimizer(config.optimizer)
    ema = trained if optimizer.averages(config.optimizer) else None
    zero = jnp.zeros((), jnp.int32)
    states = [TrainState(zero, zero, params, rule.init(trained), ema)]
    update = jax.jit(make_update(config, STEPS))
    metrics = []
    for found in gradients:
        chosen = trainable(nested(found), config)
        state, values = update(states[-1], chosen)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(values))
    return states, metrics


def rule_of(options):
    betas = options.beta1, options.beta2
    if options.name == "muon":
        return update_rules.Muon(*betas, KERNELS)
    return dict(adamw=update_rules.AdamW, adafactor=update_rules.Adafactor)[options.name](*betas)


def factor(name, param, encoder=1.0, decay=1.0):
    """The rate of a parameter over that of the head."""
    if name.startswith("head/"):
        return 1.0
    depth = next((d for prefix, d in DEPTHS.items() if name.startswith(prefix)), 0)
    if isinstance(depth, int):
        return encoder * decay**depth
    return encoder * np.array([decay**d for d in depth]).reshape(-1, *[1] * (param.ndim - 1))


def definition(config, gradients, factors=factor):
    """Parameters after each step, float64."""
    options = config.optimizer
    rule = rule_of(options)
    params = [{n: p.astype(np.float64) for n, p in draw(0, 0.3).items()}]
    for step, found in enumerate(gradients):
        if not all(np.isfinite(g).all() for g in found.values()):
            params.append(params[-1])
            continue
        rate = update_rules.rate(
            options.schedule, options.learning_rate, options.warmup_steps, STEPS, step
        )
        params.append(
            update_rules.step(
                rule,
                params[-1],
                {n: g.astype(np.float64) for n, g in found.items()},
                rate=rate,
                decayed=DECAYED,
                factors=factors,
                weight_decay=options.weight_decay,
                clip_norm=options.clip_norm,
            )
        )
    return params


def assert_steps_are_those_of_the_definition(config, gradients, tolerance, factors=factor):
    states, metrics = ours(config, gradients)
    wanted = definition(config, gradients, factors)
    for number, (state, want) in enumerate(zip(states, wanted, strict=True)):
        for name, values in flat(state.params).items():
            worst = np.abs(values - want[name]).max() / config.optimizer.learning_rate
            assert worst < tolerance, (number, name, worst)
    return states, metrics


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


def test_an_average_over_the_last_steps_is_their_mean():
    """Of all steps the last half; before them it is the newest parameters."""
    config = make_config(average_share=0.5)
    states, _ = ours(config, [gradients_of(step) for step in range(STEPS)])
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
    """ema_t = 0.75 ema_(t-1) + 0.25 params_t, from the first parameters on."""
    config = make_config(ema=0.75)
    states, _ = ours(config, [gradients_of(step) for step in range(STEPS)])
    wanted = {n: p.astype(np.float64) for n, p in draw(0, 0.3).items()}
    for state in states[1:]:
        params = flat(state.params)
        wanted = {n: 0.75 * w + 0.25 * params[n].astype(np.float64) for n, w in wanted.items()}
        for name, values in flat(state.ema).items():
            np.testing.assert_allclose(values, wanted[name], rtol=0, atol=2e-7, err_msg=name)
    assert ours(make_config(), [gradients_of(0)])[0][-1].ema is None


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


def rates(kind, warmup, steps, count, peak=0.8):
    options = Optimizer(learning_rate=peak, warmup_steps=warmup, schedule=kind, decay_share=0.25)
    schedule = optimizer.make_schedule(options, steps)
    return np.array([schedule(jnp.int32(step)) for step in range(count)], np.float64)


def test_schedules_step_by_step():
    """By hand: it starts above zero, has the peak at the warm-up's last step and at the next,
    falls by equal parts and reaches zero where the run has ended."""
    linear = [0.2, 0.4, 0.6, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0]
    np.testing.assert_allclose(rates("linear", 4, 12, 14), linear, rtol=1e-6, atol=1e-7)
    cosine = [0.4, 0.8, 0.8, 0.4 * (1 + 0.5**0.5), 0.4, 0.4 * (1 - 0.5**0.5), 0.0, 0.0]
    np.testing.assert_allclose(rates("cosine", 2, 6, 8), cosine, rtol=1e-6, atol=1e-7)
    constant = [0.8 / 3, 1.6 / 3, 0.8, 0.8, 0.8, 0.8]
    np.testing.assert_allclose(rates("constant", 3, 4, 6), constant, rtol=1e-6)
    fall = [0.8 * (1 - share**0.5) for share in (0, 1 / 4, 2 / 4, 3 / 4, 1, 1)]
    wsd = [0.4, 0.8, *[0.8] * 10, *fall]
    np.testing.assert_allclose(rates("wsd", 2, 16, 18), wsd, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rates("linear", 0, 4, 5), [0.8, 0.6, 0.4, 0.2, 0], atol=1e-7)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup, steps", [(0, 1), (0, 13), (1, 2), (5, 13), (12, 13)])
def test_schedules_of_other_lengths(kind, warmup, steps):
    wanted = [update_rules.rate(kind, 0.8, warmup, steps, step) for step in range(steps + 2)]
    np.testing.assert_allclose(rates(kind, warmup, steps, steps + 2), wanted, rtol=2e-6, atol=1e-7)


def test_impossible_schedules_and_rules_are_named():
    for warmup, steps in ((4, 4), (9, 4)):
        with pytest.raises(ValueError, match=f"warmup_steps={warmup} is not below the run's 4"):
            rates("linear", warmup, steps, 0)
    rates("linear", 4, 0, 0)  # a run whose steps are not known yet
    with pytest.raises(ValueError, match="optimizer.schedule='step'; choose from"):
        rates("step", 0, 4, 0)
    with pytest.raises(ValueError, match="optimizer.name='sgd'"):
        optimizer.make_optimizer(dataclasses.replace(make_config().optimizer, name="sgd"))


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


@pytest.fixture(scope="module")
def model_params():
    """Shapes of a model with everything: a convolutional stem, a head, the sigmoid loss's bias."""
    config = tiny_config(patch_size=4)
    config.model.image.update(conv_widths=(8, 8), conv_depths=(1, 1))
    config.head.kind = "answer"
    model = coca.build(config.model, sigmoid=True, head=config.head, num_classes=3)
    return jax.eval_shape(lambda: partitioning.unbox(coca.init(model, jax.random.key(0))))


def test_weight_decay_by_names_of_a_real_model(model_params):
    """Kernels, tables and queries; neither biases, norms, gains, [CLS] nor scalars."""
    tables = {
        "contrastive_pooler/query/value",
        "generative_pooler/query/value",
        "head/pooler/query/value",
        "image_encoder/positions/value",
        "text_decoder/positions/value",
        "text_decoder/token_embedding/value",
        "text_decoder/head/kernel/value",
    }
    mask = {
        "/".join(k.key for k in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(optimizer.is_matrix(model_params))
    }
    assert tables < set(mask)
    kernels = {name for name in mask if name.endswith("/kernel")}
    assert len(kernels) > 40
    assert {name for name, value in mask.items() if value} == tables | kernels


def test_muon_takes_the_kernels_of_a_real_model(model_params):
    """(axes that are summed over, axes of the outputs); layers stay apart."""
    axes = jax.tree_util.tree_leaves_with_path(
        optimizer.kernel_axes(model_params),
        is_leaf=lambda x: x is None or isinstance(x, optimizer.MuonDimensionNumbers),
    )
    found = {"/".join(k.key for k in path): value for path, value in axes}
    assert {n for n, v in found.items() if v} == {n for n in found if n.endswith("/kernel")}
    for name, value in found.items():
        if value is None:
            continue
        first = int("/layers/" in name)  # of an array without its axis of layers
        if name.split("/")[-2] in ("query", "key", "value"):
            wanted = (0,), (1, 2)
        elif name.endswith("attention/out/kernel"):
            wanted = (0, 1), (2,)
        elif "/stem/" in name:
            wanted = (0, 1, 2), (3,)
        else:
            wanted = (0,), (1,)
        assert value == tuple(tuple(first + i for i in side) for side in wanted), name


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


def test_every_parameter_of_every_recipe_has_a_role():
    """A part or a kind of parameter that no module describes is refused by name."""
    for recipe in recipes.names():
        model = recipes.load(recipe).model
        module = coca.build(model, sigmoid=True)
        params = jax.eval_shape(lambda m=module: partitioning.unbox(coca.init(m, KEY)))
        found = jax.tree.leaves(roles.map_with_roles(lambda role, _: role.kind, params))
        assert set(found) - {"bias"} == {"kernel", "norm", "table"}
        assert ("bias" in found) == model.bias
    for names, remedy in {
        ("image_encoder", "memory", "value"): "add it to the PARTS",
        ("text_decoder", "unimodal", "layers", "mlp", "gate"): "add 'gate' to LEAVES",
    }.items():
        with pytest.raises(ValueError, match=f"{'/'.join(names)}.*{remedy}"):
            roles.role_of(names)


def test_no_parameter_is_named_outside_the_models():
    package = pathlib.Path(coca_jax.__file__).parent
    names = re.compile(r"""["'/](image_encoder|text_decoder|log_scale|unimodal_norm)["'/]""")
    for file in package.rglob("*.py"):
        if file.relative_to(package).parts[0] not in ("models", "interop"):
            assert not names.search(file.read_text()), file
