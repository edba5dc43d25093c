"""Fine-tuning that keeps what was there: LoRA, the pull to the start, the guard, mixing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import flags_of, scenes_words
from one_device import models_on_one, train_alone  # noqa: F401
from quick_start import drawn_by_numpy  # noqa: F401
from test_inference import random_params, tiny_model, tiny_parts, words  # noqa: F401
from test_train import tiny_run

from coca_jax.checkpoints import config_file, manager
from coca_jax.cli import blend, report
from coca_jax.config import Optimizer
from coca_jax.data import vocabulary
from coca_jax.evaluation import history, report_charts, runner
from coca_jax.inference import export_folder
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


def test_what_changed_is_kept_apart_and_put_back():
    base = jax.tree.map(np.asarray, kernels())
    changed = jax.tree.map(np.copy, base)
    attention = changed["image_encoder"]["blocks"]["layers"]["attention"]
    rng = np.random.default_rng(1)
    change = rng.normal(size=(2, 6, 2)) @ rng.normal(size=(2, 2, 6))
    attention["query"]["kernel"] += change.reshape(2, 6, 2, 3).astype(np.float32)
    factors = lora.extract(changed, base, 2)
    assert [x.shape for x in factors.values()] == [(2, 6, 2), (2, 2, 6)]
    again = lora.apply(base, factors)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), again, changed)
    half = lora.apply(base, factors, 0.5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
        half,
        blend.mix(base, changed, 0.5),
    )
    with pytest.raises(ValueError, match="which the model lacks"):
        lora.apply(dict(image_encoder=dict(final_norm=dict(scale=np.ones(3)))), factors)
    norm = dict(image_encoder=dict(final_norm=dict(scale=np.ones(3))))
    with pytest.raises(ValueError, match="no kernel"):
        lora.extract(jax.tree.map(lambda x: x + 1, norm), norm, 1)


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
    factors = lora.extract(export_format.unflatten(tuned), export_format.unflatten(first), 2)
    again = export_format.flatten(lora.apply(export_format.unflatten(first), factors))
    for name in moved:
        np.testing.assert_allclose(again[name], tuned[name], atol=1e-5)


@pytest.mark.long
def test_guard_stops_a_run_that_ruins_its_probe(tmp_path, monkeypatch, capfd):
    """The scores of a tiny model say little: the probe's are given here, the run is a real one."""
    from coca_jax.evaluation import runner

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
    with pytest.raises(ValueError, match="optimizer.lora_rank=2 needs"):
        config_file.check(run_config_of(config))
    config.optimizer.l2_to_start = 0.0
    with pytest.raises(ValueError, match="lora_rank=2 adapts kernels that weights have and needs"):
        setup.check_config(run_config_of(config))
    config.init_from = "runs/first"
    setup.check_config(run_config_of(config))


def run_config_of(config):
    from coca_jax.config import typed

    return typed(config)


def test_mixing_goes_from_one_to_the_other_and_has_a_chart():
    base, tuned = dict(a=dict(b=np.zeros(3))), dict(a=dict(b=np.ones(3)))
    assert blend.mix(base, tuned, 0.25)["a"]["b"].tolist() == [0.25] * 3
    with pytest.raises(ValueError, match=r"a/b is \(3,\) in --base and \(2,\)"):
        blend.mix(base, dict(a=dict(b=np.ones(2))), 0.5)
    with pytest.raises(ValueError, match="--shares=1.5"):
        blend.shares_of(["0", "1.5"])
    rows = [
        dict(share=share, scores={"retrieval/x/mean_recall": 0.5 + share / 4}) for share in (0, 1)
    ]
    (figure,) = report_charts.blended(rows)
    assert "share of the way" in figure and "Retrieval between both models" in figure
    assert report_charts.blended([dict(share=1)]) == report_charts.blended("rubbish") == []
    rows += [dict(share=0.5, scores={"retrieval/x/mean_recall": None}), dict(share=None, scores={})]
    rows += [dict(share=None, scores={"retrieval/x/mean_recall": 0.5})]
    (figure,) = report_charts.blended(rows)  # without what is no number
    assert 'data-points="[[[0.0,50.0],[1.0,75.0]]]"' in figure


def test_the_command_mixes_scores_and_writes(words, tmp_path, monkeypatch, capsys):  # noqa: F811
    """In this process, with two models of which one has a change of rank 2 in a kernel."""
    base, tuned = (tiny_model(words, devices=jax.devices()[:1]) for _ in range(2))
    first = blend.to_host(base.params)
    rng = np.random.default_rng(0)
    kernel = first["text_to_joint"]["kernel"]
    change = rng.normal(size=(len(kernel), 2)) @ rng.normal(size=(2, kernel.shape[1]))
    moved = first | {"text_to_joint": {"kernel": (kernel + change).astype(np.float32)}}
    tuned.set_params(moved)
    models, asked_of = dict(base=base, tuned=tuned), []
    monkeypatch.setattr(
        blend.coca_jax, "load", lambda place, **how: asked_of.append(how) or models[place]
    )
    written = []
    monkeypatch.setattr(export_folder, "write", lambda model, out, **_: written.append(out))
    flags_of("blend", monkeypatch)

    def call(*given):
        base.set_params(first)
        blend.flags.FLAGS.unparse_flags()
        for name in ("shares", "checkpoint", "adapter", "data", "rank", "tasks", "batch_size"):
            blend.flags.FLAGS[name].unparse()
        blend.flags.FLAGS(["blend", "--base=base", *given])
        return blend.main(["blend"])

    def kernel_now():
        return np.asarray(base.params["text_to_joint"]["kernel"])

    out = str(tmp_path / "half")
    assert call("--checkpoint=tuned", "--shares=0.5", f"--out={out}") == dict(out=out, share=0.5)
    np.testing.assert_allclose(kernel_now(), kernel + change / 2, atol=1e-5)
    assert written == [out]
    adapter = str(tmp_path / "adapter")
    told = call("--checkpoint=tuned", "--rank=2", f"--out={adapter}")
    assert (told["kernels"], told["numbers"]) == (1, 2 * sum(kernel.shape)) and told["kept"] > 0.999
    assert call(f"--adapter={adapter}", f"--out={out}2")["share"] == 1.0
    with pytest.raises(ValueError, match="adapter is the change of another model than --base"):
        blend.read_adapter(adapter, tuned.checksum())
    np.testing.assert_allclose(kernel_now(), moved["text_to_joint"]["kernel"], atol=1e-4)

    def run_tasks(model, asked, folder):
        blend.evaluators.tell("retrieval/x: 1 examples have no text and are left out")
        score = float(np.abs(kernel_now() - kernel).mean() / np.abs(change).mean())
        return {"retrieval/x/image_to_text_r1": score, "retrieval/x/odd": 1.0}

    monkeypatch.setattr(runner, "run_tasks", run_tasks)
    monkeypatch.setattr(blend.evaluate, "tasks_of_flags", lambda: ["a task"])
    (tmp_path / "curve").mkdir()
    (tmp_path / "curve/metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    report.write_report(tmp_path / "curve")  # the tuned run itself, as in the example
    shown = "share of the way from the start"
    assert shown not in (tmp_path / "curve/report.html").read_text()
    given = ("--checkpoint=tuned", "--data=x", "--shares=0,0.25,1", f"--out={tmp_path}/curve")
    curve = call(*given)["curve"]
    assert [row["share"] for row in curve] == [0.0, 0.25, 1.0]
    assert shown in (tmp_path / "curve/report.html").read_text()
    said = capsys.readouterr().err
    assert "held another" not in said and said.count("1 examples have no text") == 1  # of 3 shares
    call(*given, "--batch_size=8")
    assert asked_of[-2]["batch_size"] == 8 and "batch_size" not in asked_of[0]  # of the base
    assert "held another" not in capsys.readouterr().err  # the same
    call(*given, "--shares=0,0.25")
    assert "/curve held another curve, which this one replaces" in capsys.readouterr().err
    call(*given)
    scores = [row["scores"]["retrieval/x/image_to_text_r1"] for row in curve]
    np.testing.assert_allclose(scores, [0, 0.25, 1], atol=1e-4)
    assert json.loads((tmp_path / "curve/blend.json").read_text())["curve"] == curve
    assert "share  retrieval/x/image_to_text_r1" in capsys.readouterr().out
    for given, says in (
        (("--checkpoint=tuned", "--adapter=a", "--out=o"), "give --base=DIR, --checkpoint"),
        (("--checkpoint=tuned", "--shares=0,1", "--out=o"), "one to write, or give --data"),
        (("--checkpoint=tuned", "--tasks=knn", "--out=o"), "knn: without --data nothing is scored"),
        (("--checkpoint=tuned", "--batch_size=8", "--out=o"), "--batch_size=8: without --data"),
        (("--checkpoint=tuned", f"--out={tmp_path}/curve"), "is the folder of a run"),
        (("--checkpoint=tuned", "--rank=-1", "--out=o"), "--rank=-1: a whole number"),
        (("--checkpoint=tuned", "--rank=2", "--data=x", "--out=o"), "--rank=2 writes the whole"),
        (("--checkpoint=tuned", "--rank=2", "--shares=1", "--out=o"), "leave out --data and --sh"),
        (("--checkpoint=base", "--rank=2", f"--out={tmp_path}/o"), "both models are the same"),
    ):
        with pytest.raises(ValueError, match=says):
            call(*given)
    with pytest.raises(FileNotFoundError, match="no adapter.safetensors; write one with --rank"):
        call(f"--adapter={tmp_path}", f"--out={tmp_path}/o")


def test_a_mixed_model_computes_in_the_base_s_dtype(words, tmp_path, monkeypatch):  # noqa: F811
    """And its weights are those of float32: nothing is rounded on the way."""
    config, params = tiny_parts()
    config.model.dtype = "bfloat16"
    start = np.float32(params["text_to_joint"]["kernel"])
    for name, factor in (("base", 1.0), ("tuned", 3.0)):
        scaled = params | {"text_to_joint": {"kernel": factor * start}}
        export_folder.write(CoCaModel(config, scaled, words), str(tmp_path / name))
    flags_of("blend", monkeypatch)
    given = [f"--{name}={tmp_path / name}" for name in ("base", "out")]
    blend.flags.FLAGS(["blend", *given, f"--checkpoint={tmp_path}/tuned", "--shares=0.5"])
    blend.main(["blend"])
    found, told = export_format.read_export(tmp_path / "out")
    assert told.model.dtype == "bfloat16"
    np.testing.assert_allclose(found["text_to_joint"]["kernel"], 2 * start, rtol=1e-6)
    blend.main(["blend"])  # the same once more
    blend.flags.FLAGS["shares"].unparse()
    blend.flags.FLAGS(["blend", *given, f"--checkpoint={tmp_path}/tuned", "--shares=1"])
    with pytest.raises(FileExistsError, match="out holds a model with other weights .params.safe"):
        blend.main(["blend"])
    kept = export_format.read_export(tmp_path / "out")[0]
    np.testing.assert_array_equal(kept["text_to_joint"]["kernel"], found["text_to_joint"]["kernel"])


def test_models_of_other_configurations_are_not_mixed(words):  # noqa: F811
    """The shapes of their weights are the same."""
    config, params = tiny_parts()
    base = CoCaModel(config, params, words)
    blend.check_alike(base, CoCaModel(run_config_of(config), params, words))
    for key, value, says in (
        ("model.activation", "relu", "activation is as by default in --base and 'relu' in the"),
        ("model.image_mean", (0.1, 0.2, 0.3), "image_mean is as by default .* and .0.1, 0.2, 0.3."),
        (
            "model.image.block",
            {"norm_eps": 1e-3},
            "image.block is {} in --base and {'norm_eps': 0.001} in",
        ),
        ("data.resize", "crop", "resize is .* and 'crop' in the tuned model; give the base"),
    ):
        other = CoCaModel(run_config_of(config).change({key: value}), params, words)
        with pytest.raises(ValueError, match=says):
            blend.check_alike(base, other)
    other = CoCaModel(config, params, vocabulary.load(scenes_words()))
    with pytest.raises(ValueError, match="vocabulary is '"):
        blend.check_alike(base, other)
    other = CoCaModel(config, params, words)
    base.class_names, other.class_names = ["cat", "dog"], ["dog", "cat"]
    with pytest.raises(ValueError, match=r"class_names is \['cat', 'dog'\] in --base and \['dog'"):
        blend.check_alike(base, other)
    base.class_names = []  # as of a base on which a head was trained: no other is the right one
    with pytest.raises(ValueError, match="a task head, of 2 classes, and --base has none to mix"):
        blend.check_alike(base, other)
