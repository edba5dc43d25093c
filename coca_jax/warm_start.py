"""Starting a run from other weights: another run, an export, converted or open_clip weights."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
from absl import logging

from coca_jax import checkpointing, export_format
from coca_jax.train_step import TrainState

FRESH = ("head", "logit_bias")  # top-level parts that may be missing: they start untrained


def apply(state: TrainState, path: str) -> TrainState:
    """`state` with its parameters (and their average) replaced by those at `path`.

    Positions of another image size are resized on their grid (paper Section 4.1: 288 px to 576).
    Parts named in FRESH that the weights lack stay as they are.
    Raises ValueError naming the first parameter that does not fit, FileNotFoundError without any.
    """
    target = export_format.flatten(state.params)
    given = export_format.flatten(read(path))
    unknown = sorted(set(given) - set(target))
    if unknown:
        raise ValueError(f"init_from={path} has {unknown[0]}, which this config's model lacks")
    params: dict[str, Any] = {}
    for name, leaf in target.items():
        if name not in given:
            if name.split("/")[0] not in FRESH:
                raise ValueError(f"init_from={path} lacks {name} of this config's model")
            logging.warning("init_from: %s starts untrained", name)
            params[name] = leaf
            continue
        array = np.asarray(given[name], np.float32)
        if name == "image_encoder/positions/value" and array.shape != leaf.shape:
            array = resize_positions(array, leaf.shape[0])
        if array.shape != leaf.shape:
            raise ValueError(
                f"init_from={path}: {name} has shape {array.shape}, the model {leaf.shape}"
            )
        params[name] = export_format.place(array, leaf.sharding)
    tree = export_format.unflatten(params)
    return state.replace(params=tree, ema=None if state.ema is None else jax.tree.map(_copy, tree))


def _copy(x: jax.Array) -> jax.Array:
    return x + 0  # donation needs arrays of its own


def read(path: str) -> dict[str, Any]:
    """The parameters at `path` as a nested dict of arrays on the host or the first device."""
    if os.path.isdir(path) and export_format.is_export(path):
        return export_format.read_export(path)[0]
    if os.path.isfile(path):
        raise ValueError(
            f"init_from={path} is a file: convert it first with python -m coca_jax.convert "
            f"--input={path} --out=DIR"
        )
    return checkpointing.load_params(path)[0]


def resize_positions(positions: np.ndarray, length: int) -> np.ndarray:
    """[N, D] -> [length, D]: positions of a square grid, resized with a cubic filter.

    A first row that belongs to a class token is kept apart, when both lengths have one.
    Raises ValueError when the lengths are no squares.
    """
    for extra in (0, 1):
        old, new = (round((n - extra) ** 0.5) for n in (len(positions), length))
        if old * old + extra == len(positions) and new * new + extra == length:
            grid = positions[extra:].reshape(old, old, -1)
            resized = jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic")
            return np.concatenate([positions[:extra], np.asarray(resized).reshape(new * new, -1)])
    raise ValueError(f"positions of {len(positions)} and {length} tokens are not both square grids")
