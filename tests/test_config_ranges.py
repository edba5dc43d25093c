"""Every value of a configuration has a range, and what is absurd is refused before any work."""

import importlib
import pkgutil

import pytest

from coca_jax import configs
from coca_jax.config import Config, keys, read
from coca_jax.configs import base

ABSURD = {
    "batch_size": (0, -1, 2.5, True),
    "steps": (-1, 1e3),
    "epochs": (-1.0, float("nan"), float("inf")),
    "image_sizes": (((0.5, -32),), ((2.0, 32),), ((0.6, 32), (0.6, 64)), (32,), "x", 5),
    "text_lengths": ((0,), ("a",)),
    "model.image_size": (0, -224, 10**9),
    "model.temperature": (0.0, -1.0, float("nan")),
    "model.image_std": ((0.5, 0.0, 0.5), (0.5, 0.5)),
    "model.image.depth": (0, -1, 10**6),
    "model.image.patch_dropout": (1.0, -0.1),
    "model.text.vocab_size": (0, -5),
    "model.pooler.num_heads": (0,),
    "head.label_smoothing": (1.0,),
    "loss.label_smoothing": (1.0, -0.1, float("nan")),
    "loss.captioning_weight": (-1.0, float("inf")),
    "loss.caption_chunk": (-1,),
    "optimizer.learning_rate": (1e6, float("nan"), float("inf"), -1e-3, "fast"),
    "optimizer.layer_decay": (0.0, 1.5),
    "optimizer.warmup_steps": (-1,),
    "optimizer.weight_decay": (-0.1, float("nan")),
    "optimizer.beta2": (1.0, -0.1),
    "optimizer.clip_norm": (-1.0, float("nan")),
    "optimizer.ema": (1.0, 2.0, -0.5),
    "mesh.fsdp": (0, -2),
    "data.sources": (({"weight": -1.0},), ({"weight": float("nan")},), ({"limit": -3},)),
    "data.randaugment": ((0, 10), (2, 99), 5),
    "data.num_threads": (-1,),
    "data.max_bad_fraction": (1.5, -0.1),
    "checkpoint.keep": (0,),
    "log.profile_steps": ((5,), (-1, 3)),
}


def _values(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_every_key_has_a_range_and_every_recipe_is_in_it():
    rules = {key: field.metadata["rule"] for key, field in keys(Config)}
    assert not [key for key in _values(base.get_config()) if key not in rules]
    for module in pkgutil.iter_modules(configs.__path__):
        if module.name != "__init__":
            recipe = importlib.import_module(f"coca_jax.configs.{module.name}")
            read(Config, recipe.get_config())


@pytest.mark.parametrize("key", ABSURD)
def test_absurd_values_are_refused_by_name(key):
    for value in ABSURD[key]:
        config = base.get_config().to_dict()
        section = config
        *parents, last = key.split(".")
        for parent in parents:
            section = section[parent]
        section[last] = value
        with pytest.raises(ValueError, match=rf"^config\.{key}=.*: give "):
            read(Config, config)
