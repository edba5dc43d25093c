"""Steps and input that are timed where a run keeps the tokens of a locked image encoder."""

import functools

import jax
import numpy as np
import pytest
from conftest import scenes_words
from one_device import smallest_run

from coca_jax import benchmark_input, partitioning
from coca_jax.config import typed
from coca_jax.fitting import measure


@pytest.mark.parametrize("features", ["", "kept"])
def test_steps_on_kept_tokens_are_timed_before_any_are_kept(features, monkeypatch):
    """Of a locked encoder, by stand-ins for the model and its steps."""
    mesh = functools.partial(partitioning.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(partitioning, "make_mesh", mesh)
    monkeypatch.setattr(measure, "init_state", lambda *_: None)
    seen = []

    def step(number, state, batch):
        seen.append({name: (x.shape, np.asarray(x).any()) for name, x in batch[0].items()})
        return state, {"loss": np.float32(0)}

    monkeypatch.setattr(measure, "Programs", lambda run: step)
    config = typed(smallest_run()).change(
        {
            "data.vocabulary": scenes_words(),
            "data.features": features,
            "optimizer.image_learning_rate": 0.0,
        }
    )
    speed = measure.measure(config, least_seconds=0.0)
    assert speed.step > 0 and len(seen) == 4
    tokens = ("encoded", ((4, 1, 4), False)) if features else ("image", ((4, 8, 8, 3), True))
    assert all(one[tokens[0]] == tokens[1] for one in seen)


def test_the_benchmark_of_input_refuses_what_reads_no_pictures():
    """It ended in an IndexError of a thread, behind the vocabulary."""
    config = typed(smallest_run()).change(
        {"data.features": "kept", "optimizer.image_learning_rate": 0.0}
    )
    with pytest.raises(ValueError, match="data.features=kept: this times the reading of pictures"):
        benchmark_input.read_input(config, 1.0, 0.0, 1)
