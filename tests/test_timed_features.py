"""Steps and input that are timed where a run keeps the tokens of a locked image encoder."""

import functools

import jax
import numpy as np
import pytest
from conftest import scenes_words
from one_device import smallest_run

from coca_jax.apps import benchmark, fit
from coca_jax.config import typed
from coca_jax.training import auto_mesh


@pytest.fixture
def alone(monkeypatch):
    """Fits on one device, by stand-ins for the model's state and its steps. Gives what they see:
    batches, and models."""
    mesh = functools.partial(auto_mesh.make, devices=jax.devices()[:1])
    monkeypatch.setattr(auto_mesh, "make", mesh)
    monkeypatch.setattr(fit, "init_state", lambda *_: None)
    seen, models = [], []

    def step(number, state, batch):
        seen.append(batch[0])
        return state, {"loss": np.float32(0)}

    monkeypatch.setattr(fit, "Programs", lambda config, model, *of: models.append(model) or step)
    return seen, models


def config_of(**changes):
    given = {"data.vocabulary": scenes_words(), "optimizer.image_learning_rate": 0.0}
    return typed(smallest_run()).change(given | changes)


@pytest.mark.parametrize("features", ["", "kept"])
def test_steps_on_kept_tokens_are_timed_before_any_are_kept(features, alone):
    """Of a locked encoder."""
    seen, _ = alone
    config = config_of(**{"data.features": features})
    assert fit.measure(config, least_seconds=0.0).step > 0 and len(seen) == 4
    name, shape = ("encoded", (4, 1, 4)) if features else ("image", (4, 8, 8, 3))
    assert all(batch[name].shape == shape for batch in seen)
    assert all(np.asarray(batch[name]).any() == (not features) for batch in seen)


def test_steps_of_a_task_head_are_timed_with_the_classes_of_the_data(alone):
    """They were timed without any, and refused."""
    seen, models = alone
    label = dict(builtin="scenes", split="train", kind="label")
    head = {"head.kind": "classification", "head.unknown": "skip", "data.sources": (label,)}
    config = config_of(**head, **{"optimizer.image_learning_rate": -1.0})
    assert fit.measure(config, least_seconds=0.0).step > 0
    assert models[0].task_head.num_classes == 64
    assert max(int(batch["class_id"].max()) for batch in seen) >= 0


def test_the_benchmark_of_input_refuses_what_reads_no_pictures():
    """It ended in an IndexError of a thread, behind the vocabulary."""
    config = typed(smallest_run()).change(
        {"data.features": "kept", "optimizer.image_learning_rate": 0.0}
    )
    with pytest.raises(ValueError, match="data.features=kept: this times the reading of pictures"):
        benchmark.read_input(config, 1.0, 0.0, 1)
