"""coca_jax: contrastive captioners (CoCa, Yu et al. 2022) in JAX and Flax.

Importing this package costs almost nothing; `load` pulls in JAX when it is called.
"""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    from coca_jax.inference import CoCaModel

__version__ = "0.2.0"


def load(path: str, **options: typing.Any) -> CoCaModel:
    """Loads a run, a checkpoint, an export, converted weights or a name of the hub: see
    `inference.load`."""
    from coca_jax import inference

    return inference.load(path, **options)


def list_pretrained() -> list[tuple[str, str]]:
    """(model, tag) of the public weights that `load(model, pretrained=tag)` knows."""
    from coca_jax.interop import hub

    return sorted(hub.PRETRAINED)


def push_to_hub(model: CoCaModel, name: str, **options: typing.Any) -> str:
    """Uploads a model as 'org/name' in the layout of the hub, with a card, and returns its URL; see
    `inference.export_folder.push_to_hub`."""
    from coca_jax.inference import export_folder

    return export_folder.push_to_hub(model, name, **options)
