"""Runs with a task head: what they leave, exact resume, classes bound to the run."""

import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_device import train_alone
from ops_cases import drawn
from PIL import Image
from test_inference import random_params, tiny_parts
from test_train import tiny_run

import coca_jax
from coca_jax.checkpoints import manager
from coca_jax.config import heads
from coca_jax.data import vocabulary
from coca_jax.inference import export_folder
from coca_jax.inference.model import CoCaModel
from coca_jax.interop import export_format
from coca_jax.models import coca
from coca_jax.models.image_encoder import normalise_pixels
from coca_jax.runtime import signals
from coca_jax.runtime.metric_log import read_metrics
from coca_jax.runtime.signals import Preempted
from coca_jax.training.trainer import train

pytestmark = pytest.mark.usefixtures("compile_once")


def scenes_run(steps=4, **head):
    config = tiny_run(steps)
    config.data.sources = (dict(builtin="scenes", split="train", kind="label"),)
    config.loss.update(contrastive_weight=0.0, captioning_weight=0.0)
    # Some labels name only the shape, which is no class of the head.
    config.head.update(kind="classification", label_smoothing=0.1, unknown="skip", **head)
    config.optimizer.encoder_learning_rate = 1e-4
    test = dict(builtin="scenes", split="heldout", kind="label")
    config.eval.tasks = (dict(kind="classification", name="scenes", data=test, limit=40),)
    return config


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """An export with fresh weights."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = tiny_run()
    vocabulary.train(["a red circle", "two blue squares"] * 9, 310, str(folder / "words"))
    model = coca.build(config.model)
    params = drawn(jax.eval_shape(lambda: coca.init(model, jax.random.key(7))), 0.1)
    given = dict(model=config.model.to_dict(), preprocess=dict(resize="squash"))
    export_format.write_export(folder / "export", params, given, folder / "words")
    return str(folder / "export")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    from coca_jax.data import scenes

    path = tmp_path_factory.mktemp("classes") / "classes.txt"
    path.write_text("\n".join(reversed(scenes.class_names())) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def tuned(pretrained, classes, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("tuned"))
    config = scenes_run(classes=classes)
    config.init_from = pretrained
    return workdir, config, train_alone(config, workdir)


@pytest.mark.long
def test_a_run_with_a_head_leaves_what_it_promises(tuned, pretrained, classes):
    workdir, _, summary = tuned
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    np.testing.assert_allclose(rows[0]["head_loss"], np.log(len(open(classes).readlines())), 1e-4)
    assert 0 <= rows[-1]["head_accuracy"] <= 1
    stored = json.load(open(f"{workdir}/config.json"))
    assert stored["class_names"] == open(classes).read().split("\n")[:-1]
    assert 0 <= summary["classification/scenes/top1"] <= summary["classification/scenes/top5"] <= 1
    assert "Classification by the task head: scenes" in open(f"{workdir}/report.html").read()
    # The checkpoint's own vocabulary, not one trained anew.
    files = [f"{workdir}/vocabulary.model", export_format.vocabulary_path(pretrained)]
    assert open(files[0], "rb").read() == open(files[1], "rb").read()


@pytest.mark.long
def test_a_loaded_run_classifies(tuned, tmp_path):
    workdir, config, summary = tuned
    alone = dict(devices=jax.devices()[:1])
    model = coca_jax.load(workdir, **alone)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    found = model.classify(images)
    assert found.shape == (5, len(model.class_names)) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    params, _ = manager.load_params(workdir)
    pixels = normalise_pixels(jnp.asarray(images), config.model)
    module = coca.build(config.model, head=config.head, num_classes=len(model.class_names))
    classify = jax.jit(lambda p, x: module.apply({"params": p}, x, method="classify"))
    want = jax.nn.softmax(classify(params, pixels))
    np.testing.assert_allclose(found, want, atol=1e-6)
    # An export says as much: the head's weights and its classes travel.
    config = dict(model=config.model.to_dict(), preprocess=dict(resize="squash"))
    config |= dict(head=model.config.head.to_dict(), class_names=model.class_names)
    words = f"{workdir}/vocabulary.model"
    export_format.write_export(tmp_path / "export", model.params, config, words)
    np.testing.assert_allclose(
        coca_jax.load(tmp_path / "export", **alone).classify(images), found, atol=1e-6
    )
    # The average of what was trained, the weights of what was not.
    _, step = manager.find_step(workdir)
    assert os.path.isdir(f"{workdir}/checkpoints/{step}/ema") and "text_decoder" in params


@pytest.mark.long
def test_a_resumed_head_run_equals_an_uninterrupted_one(tuned, tmp_path, monkeypatch):
    workdir, config, _ = tuned
    reached = signals.Stop.reached
    monkeypatch.setattr(signals.Stop, "reached", lambda self, step: step == 3)
    with pytest.raises(Preempted, match="step 3 is saved"):
        train_alone(config, tmp_path)
    monkeypatch.setattr(signals.Stop, "reached", reached)
    train_alone(config, tmp_path)
    for a, b in zip(read_metrics(workdir), read_metrics(tmp_path), strict=True):
        for name in ("loss", "head_loss", "head_accuracy", "gradient_norm"):
            assert a[name] == b[name]
    got, want = (manager.load_params(str(place))[0] for place in (tmp_path, workdir))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.long
def test_classes_are_bound_to_the_run(tuned, classes, tmp_path):
    workdir, config, _ = tuned
    names = open(classes).read().split("\n")[:-1]
    config = config.copy_and_resolve_references()
    with open(classes, "w") as file:
        file.write("\n".join(names[::-1]))
    try:
        with pytest.raises(ValueError, match="holds a head over"):
            train_alone(config, workdir)
    finally:
        with open(classes, "w") as file:
            file.write("\n".join(names) + "\n")
    missing = tmp_path / "few.txt"
    missing.write_text("\n".join(names[:3]))
    config.head.update(classes=str(missing), unknown="refuse")
    with pytest.raises(ValueError, match="not among the 3 classes of the head"):
        train_alone(config, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.long
def test_a_head_goes_on_only_with_its_own_classes(tuned, tmp_path):
    workdir, config, _ = tuned
    config = config.copy_and_resolve_references()
    config.init_from = workdir
    config.optimizer.learning_rate = 1e-9
    config.eval.tasks = ()
    train_alone(config, tmp_path / "same")
    heads = [manager.load_params(p)[0]["head"] for p in (workdir, str(tmp_path / "same"))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *heads)
    config.head.classes = ""
    train_alone(config, tmp_path / "other")
    fresh = manager.load_params(str(tmp_path / "other"))[0]["head"]
    assert np.abs(fresh["classifier"]["kernel"]).max() < 1e-6


@pytest.mark.parametrize(
    "section, changes, message",
    [
        ("head", dict(kind="detection"), "head.kind='detection': give one of '', 'classification'"),
        ("head", dict(unknown="maybe"), "head.unknown='maybe'"),
        ("head", dict(num_queries=0), "head.num_queries=0"),
        ("head", dict(width=30, num_heads=4), "head.num_heads=4 does not divide head.width=30"),
        ("head", dict(label_smoothing=1.0), "head.label_smoothing=1.0"),
        ("head", dict(kind=""), "needs a task head"),
        ("optimizer", dict(layer_decay=1.5), "optimizer.layer_decay=1.5"),
        ("loss", dict(captioning_weight=1.0), "head.kind='pair' has no caption"),
    ],
)
def test_bad_heads_are_refused(tmp_path, section, changes, message):
    config = scenes_run()
    if section == "loss":
        config.head.kind = "pair"
    config[section].update(changes)
    if changes.get("kind") == "":
        config.loss.captioning_weight = 1.0
    with pytest.raises(ValueError, match=message):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_tasks_for_a_head_are_refused_before_a_run_without_one_trains(tmp_path):
    config = tiny_run()
    config.eval.tasks = scenes_run().eval.tasks
    with pytest.raises(ValueError, match="'classification': this model has no task head"):
        train(config, str(tmp_path))
    assert not list(tmp_path.glob("checkpoints/*")) and not list(tmp_path.glob("metrics*"))


def card_of(kind, folder):
    """(a model with a head of 23 classes and random weights, its card, the line that asks it)."""
    config, _ = tiny_parts()
    config.head.kind = kind
    names = ["a cat|dog", *(f"thing {number}" for number in range(1, 23))]
    module = coca.build(config.model, head=config.head, num_classes=len(names))
    vocabulary.train(["a red circle", "two blue squares"] * 9, 310, str(folder / "words"))
    words = vocabulary.load(str(folder / "words"))
    model = CoCaModel(config, random_params(module), words, class_names=names)
    card = export_folder.card(model, "me/things", {})
    (line,) = re.findall(r"\nprint\((model\.classify\(.*\))\)\n", card)
    return model, card, line


def test_a_card_says_how_to_ask_the_task_head(tmp_path):
    model, card, line = card_of("answer", tmp_path)
    shown = ", ".join([r"a cat\|dog", *model.class_names[1:20]])
    assert f"\n| task head | of kind 'answer', 23 classes: {shown} and 3 more |\n" in card
    assert line == heads.Answer.example and "?" in line


@pytest.mark.long
@pytest.mark.parametrize("kind", heads.HEADS)
def test_a_cards_line_for_the_task_head_runs(kind, tmp_path, monkeypatch):
    model, _, line = card_of(kind, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"\w+\.jpg", line):
        Image.new("RGB", (20, 20)).save(name)
    found = eval(line, {"model": model})
    assert found.shape == (1, 23) and abs(found.sum() - 1) < 1e-5
