"""A run's configuration with types. Recipes, flags and files are ml_collections and JSON outside;
`read` makes a Config of them at the edge, and everything inside takes that or a section of it."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from coca_jax.config.data import Data, Entry
from coca_jax.config.fields import Section, keys, plain, read
from coca_jax.config.model import BLOCK, Head, ImageModel, Model, Pooler, TextModel
from coca_jax.config.run import (
    Checkpoint,
    Config,
    Eval,
    Faults,
    Log,
    Loss,
    Mesh,
    Optimizer,
    StoredConfig,
)

__all__ = [
    "BLOCK", "Checkpoint", "Config", "Data", "Entry", "Eval", "Faults", "Head", "ImageModel", "Log",
    "Loss", "Mesh", "Model", "Optimizer", "Pooler", "Recipe", "Section", "StoredConfig",
    "TextModel", "keys", "plain", "read", "typed",
]  # fmt: skip


# What get_config() gives: a ConfigDict, which mypy knows nothing of.
Recipe: TypeAlias = Config | Mapping[str, Any]


def typed(config: Recipe) -> Config:
    """What a recipe gave, or a command line made of it, as a Config.

    Raises ValueError for a key that there is not, with the nearest one, and for a value that
    cannot be, with what can.
    """
    return config if isinstance(config, Config) else read(Config, config)
