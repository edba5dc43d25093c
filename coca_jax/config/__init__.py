"""The typed, frozen config of a run. One file per section; `run.Config` holds them all.

Recipes, flags and files are ml_collections and JSON. `read` turns them into a Config where they
enter the program; everything inside takes a Config or a section of it.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from coca_jax.config.base import Section, keys, plain, read
from coca_jax.config.checkpoint import Checkpoint, Faults
from coca_jax.config.data import Data, Entry
from coca_jax.config.evaluation import Eval
from coca_jax.config.heads import Head
from coca_jax.config.log import Log
from coca_jax.config.loss import Loss
from coca_jax.config.mesh import Mesh
from coca_jax.config.model import BLOCK, BlockOptions, ImageModel, Model, Pooler, TextModel
from coca_jax.config.optimizer import Optimizer
from coca_jax.config.run import Config, StoredConfig

__all__ = [
    "BLOCK", "BlockOptions", "Checkpoint", "Config", "Data", "Entry", "Eval", "Faults", "Head",
    "ImageModel", "Log", "Loss", "Mesh", "Model", "Optimizer", "Pooler", "Recipe", "Section",
    "StoredConfig", "TextModel", "keys", "plain", "read", "typed",
]  # fmt: skip


# What get_config() returns: a ConfigDict, which mypy does not know.
Recipe: TypeAlias = Config | Mapping[str, Any]


def typed(config: Recipe) -> Config:
    """A recipe's config, after the command line's overrides, as a Config.

    Raises ValueError for an unknown key, naming the nearest one, and for a value that is not
    allowed.
    """
    return config if isinstance(config, Config) else read(Config, config)
