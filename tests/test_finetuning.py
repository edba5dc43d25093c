"""Fine-tuning that keeps what was there: LoRA, the pull to the start, the guard, mixing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from conftest import flags_of, scenes_words
from one_device import models_on_one, train_alone  # noqa: F401
from quick_start import drawn_by_numpy  # noqa: F401
from test_inference import random_params, tiny_model, tiny_parts, words  # noqa: F401
from test_train import tiny_run

from coca_jax.checkpoints import manager
from coca_jax.cli import export
from coca_jax.config import Optimizer
from coca_jax.data import vocabulary
from coca_jax.evaluation import history, runner
from coca_jax.inference import export_folder, interpolation
from coca_jax.inference.model import CoCaModel
from coca_jax.interop import export_format
from coca_jax.models import coca, lora, param_groups
from coca_jax.training import guard, setup, warm_start
from coca_jax.training.optimizer import pull_to_start

pytestmark = pytest.mark.usefixtures("compile_once")


def kernels():
    """Parameters of two blocks' attention: stacked, by head on one side or on the other."""
    rng = np.random.default_rng(0)
    shapes = dict(query=(2, 6, 2, 3), value=(2, 6, 2, 3), out=(2, 2, 3, 6))
    attention = {
        k: dict(kernel=jnp.asarray(rng.normal(size=s), jnp.float32)) for k, s in shapes.items()
    }
    return dict(image_encoder=dict(blocks=dict(layers=dict(attention=attention))))


def test_lora_is_adam_on_two_factors():
    """Against factors in the model, differentiated by JAX and moved by optax's Adam."""
    optimizer = Optimizer(name="adamw", lora_rank=2, lora_alpha=3.0, beta1=0.8, beta2=0.9)
    params = kernels()
    goal = jax.tree.map(lambda x: x + 1.0, params)
    state = lora.init(params, optimizer, jax.random.key(0))
    start, first = params, [(f.a, f.b) for f in state.factors]
    assert all(not f.b.any() for f in state.factors) and len(first) == 3

    def with_factors(factors):
        leaves = jax.tree.leaves(start)
        moved = [
            w + 1.5 * (a @ b).reshape(w.shape) for w, (a, b) in zip(leaves, factors, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(start), moved)

    def loss(params):
        return sum(jnp.sum((x - g) ** 4) for x, g in zip(*map(jax.tree.leaves, (params, goal))))

    adam = optax.adam(0.01, 0.8, 0.9)

    @jax.jit
    def ours(params, state):
        return lora.step(params, jax.grad(loss)(params), state, optimizer, 0.01)

    @jax.jit
    def theirs(factors, moments):
        gradients = jax.grad(lambda f: loss(with_factors(f)))(factors)
        updates, moments = adam.update(gradients, moments, factors)
        return optax.apply_updates(factors, updates), moments

    factors, moments = first, adam.init(first)
    for _ in range(5):
        params, state = ours(params, state)
        factors, moments = theirs(factors, moments)
    wanted = with_factors(factors)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), params, wanted)
    moved = jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(x - y).max()), params, start))
    assert min(moved) > 1e-3


def test_pull_to_start_is_decay_towards_the_first_value():
    rule = pull_to_start(0.5)
    params = dict(log_scale=dict(value=jnp.asarray(2.0)))
    state = rule.init(params)
    updates, state = rule.update(dict(log_scale=dict(value=jnp.asarray(0.1))), state, params)
    assert updates["log_scale"]["value"] == pytest.approx(0.1)  # the first step is at the start
    moved = dict(log_scale=dict(value=jnp.asarray(5.0)))
    updates, state = rule.update(dict(log_scale=dict(value=jnp.asarray(0.1))), state, moved)
    assert updates["log_scale"]["value"] == pytest.approx(0.1 + 0.5 * 3)


def test_positions_are_spread_and_the_first_ones_stay():
    positions = np.cumsum(np.ones((77, 3), np.float32), 0)  # rows 1 to 77, the last [CLS]'s
    spread = warm_start.spread_text_positions(positions, 257)
    assert spread.shape == (257, 3)
    np.testing.assert_array_equal(spread[:20], positions[:20])
    np.testing.assert_array_equal(spread[-1], positions[-1])
    rows = spread[20:-1, 0]
    assert rows[0] == 21 and rows[-1] == 76
    np.testing.assert_allclose(np.diff(rows), 55 / 235, atol=1e-4)


def guarded_run(**changes):
    config = tiny_run(4, **changes)
    config.data.vocabulary = scenes_words()
    config.optimizer.ema = 0.0
    data = dict(builtin="scenes", split="test", kind="caption", objects=(1,))
    config.eval.tasks = (dict(kind="retrieval", name="probe", data=data, limit=24),)
    config.eval.update(guard="stop", every_steps=2, most_lost=0.5)
    return config


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run that trains LoRA's factors alone, from given weights."""
    folder = tmp_path_factory.mktemp("adapted")
    config = guarded_run(init_from=str(folder / "first"))
    params, told = random_params(coca.build(config.model)), {"model": config.model.to_dict()}
    export_format.write_export(folder / "first", params, told, scenes_words())
    config.steps = 3
    config.optimizer.update(lora_rank=2, lora="all", learning_rate=1e-2)
    config.eval.update(guard="warn", every_steps=0)
    return folder, train_alone(config, folder / "tuned")


@pytest.mark.long
def test_lora_moves_kernels_alone_and_the_guard_scores_before_the_first_step(adapted):
    folder, _ = adapted
    first, tuned = (
        export_format.flatten(jax.tree.map(np.asarray, params))
        for params in (
            warm_start.read(str(folder / "first"))[0],
            manager.load_params(str(folder / "tuned"))[0],
        )
    )
    moved = {name for name in first if not np.array_equal(first[name], tuned[name])}
    kernels = export_format.flatten(param_groups.adapted(export_format.unflatten(tuned), "all"))
    assert moved == kernels.keys() and len(moved) == 30  # 6 + 6 + 10 in stacks, 8 of the poolers
    assert [row["step"] for row in history.read(folder / "tuned")] == [0, 3]
    query = "image_encoder/blocks/layers/attention/query/kernel"
    change = tuned[query][0] - first[query][0]
    change = change.reshape(len(change), -1)
    assert np.linalg.matrix_rank(change, tol=1e-4 * np.abs(change).max()) == 2


@pytest.mark.long
def test_guard_stops_a_run_that_ruins_its_probe(tmp_path, monkeypatch, capfd):
    """The scores of a tiny model say little: the probe's are given here, the run is a real one."""

    given = {0: 0.8, 2: 0.3}

    def scored(model, wanted, workdir, step=None):
        scores = {"retrieval/probe/mean_recall": given[step]}
        history.add(workdir, step, scores)
        return scores

    def plain():
        config = guarded_run()
        config.loss.captioning_weight = 0.0  # half as much to compile
        return config

    monkeypatch.setattr(runner, "run_tasks", scored)
    with pytest.raises(
        guard.LostTooMuch,
        match="0.3000 and was 0.8000, 62% lost; the run in .* --config.eval.guard=warn goes on",
    ):
        train_alone(plain(), tmp_path)
    with pytest.raises(guard.LostTooMuch):  # not by starting it again
        train_alone(plain(), tmp_path)
    assert (tmp_path / "report.html").exists()
    given[4] = 0.2  # lost at the end alone, where a run without every_steps looks too
    config = plain()
    config.eval.every_steps = 0
    for _ in range(2):
        with pytest.raises(guard.LostTooMuch, match="step 4 lost more .* 0.2000 and was 0.8000"):
            train_alone(config, tmp_path / "end")
    assert manager.find_step(str(tmp_path / "end"))[1] == 4
    assert (tmp_path / "end" / "report.html").exists()
    (tmp_path / history.FILE).unlink()  # of a run that began without a guard, say
    train_alone(plain(), tmp_path)
    assert "eval.guard is silent" in capfd.readouterr().err


def test_guard_and_lora_say_what_they_need():
    config = guarded_run()
    config.eval.tasks = ()
    with pytest.raises(ValueError, match="eval.guard='stop' needs a task of kind retrieval"):
        guard.check(run_config_of(config).eval)
    config = guarded_run()
    config.optimizer.update(lora_rank=2, l2_to_start=0.1)
    with pytest.raises(ValueError, match="l2_to_start=0.1 .*lora_rank=2"):
        run_config_of(config).check()
    config.optimizer.l2_to_start = 0.0
    with pytest.raises(ValueError, match="lora_rank=2 adapts kernels that weights have and needs"):
        setup.check_config(run_config_of(config))
    config.init_from = "runs/first"
    setup.check_config(run_config_of(config))


def run_config_of(config):
    from coca_jax.config import typed

    return typed(config)


def test_export_interpolates_between_the_base_and_the_tuned_model(words, tmp_path, monkeypatch):  # noqa: F811
    config, params = tiny_parts()
    config.model.dtype = "bfloat16"  # the weights are interpolated in float32
    start = np.float32(params["text_to_joint"]["kernel"])
    for name, factor in (("base", 1.0), ("tuned", 3.0)):
        scaled = params | {"text_to_joint": {"kernel": factor * start}}
        export_folder.write(CoCaModel(config, scaled, words), str(tmp_path / name))
    flags_of("export", monkeypatch)

    def call(*given):
        for name in ("base", "share", "format", "out"):
            export.flags.FLAGS[name].unparse()
        given = (f"--checkpoint={tmp_path}/tuned", "--format=hub", f"--out={tmp_path}/out", *given)
        export.flags.FLAGS(["export", *given])
        return export.main(["export"])

    call(f"--base={tmp_path}/base", "--share=0.25")
    found = export_format.read_export(tmp_path / "out")[0]["text_to_joint"]["kernel"]
    np.testing.assert_allclose(found, 1.5 * start, rtol=1e-2)
    with pytest.raises(ValueError, match="--share=0.5: only with --base"):
        call("--share=0.5")
    with pytest.raises(flags.IllegalFlagValueError, match="--share=1.5"):
        call(f"--base={tmp_path}/base", "--share=1.5")
    with pytest.raises(FileExistsError, match="holds a model with other weights"):
        call(f"--base={tmp_path}/base", "--share=1")


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.activation", "relu"),
        ("model.image_mean", (0.1, 0.2, 0.3)),
        ("model.image.block", {"norm_eps": 1e-3}),
        ("data.resize", "crop"),
    ],
)
def test_models_that_differ_in_more_than_weights_are_not_interpolated(key, value, words):  # noqa: F811
    config, params = tiny_parts()
    base = CoCaModel(config, params, words)
    other = CoCaModel(run_config_of(config).change({key: value}), params, words)
    with pytest.raises(ValueError, match=f"{key.partition('.')[2]} is .* in --base and"):
        interpolation.interpolate(base, other, 0.5)


def test_models_of_other_words_or_classes_are_not_interpolated(words):  # noqa: F811
    config, params = tiny_parts()
    base = CoCaModel(config, params, words)
    other = CoCaModel(config, params, vocabulary.load(scenes_words()))
    with pytest.raises(ValueError, match="vocabulary is '"):
        interpolation.interpolate(base, other, 0.5)
    other = CoCaModel(config, params, words)
    other.class_names = ["dog", "cat"]
    with pytest.raises(ValueError, match=r"class_names is .* in --base and \['dog', 'cat'\]"):
        interpolation.interpolate(base, other, 0.5)
