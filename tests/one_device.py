"""Runs on one device of the eight, which compile faster."""

import functools

import jax
import pytest
from conftest import tiny_config

from coca_jax.training import auto_mesh
from coca_jax.training.trainer import Trainer


@pytest.fixture(scope="module", autouse=True)
def models_on_one():
    """In a module that imports this, models are on one device where none is given: their programs
    compile in half of the time. test_evaluate.py has them on eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        yield


def smallest_run(bias=False):
    """Four steps of captions by the smallest model that there can be; its words are not set."""
    config = tiny_config(image_size=8, patch_size=8, embed_dim=4, bias=bias)
    config.model.image.update(width=4, depth=1, mlp_dim=4, num_heads=1)
    half = dict(unimodal_depth=1, multimodal_depth=1, vocab_size=320, max_len=8)
    config.model.text.update(width=4, mlp_dim=4, num_heads=1, **half)
    config.model.pooler.update(num_queries=1, num_heads=1)
    config.batch_size, config.steps, config.optimizer.ema = 4, 4, 0.9
    config.data.sources = (dict(builtin="scenes", split="train", kind="caption"),)
    config.log.every_steps, config.checkpoint.every_steps = 1, 2
    return config


def train_alone(config, workdir):
    """`train` on one device, which compiles faster."""
    one = functools.partial(auto_mesh.make, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto_mesh, "make", one)
        return Trainer(config, str(workdir)).fit()
