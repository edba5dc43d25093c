"""Starting a run from other weights: another run, an export, converted or open_clip weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from coca_jax.checkpoints import manager
from coca_jax.config import Config, Model
from coca_jax.config.base import flatten
from coca_jax.interop import export_format, open_clip_config
from coca_jax.models import network, param_groups
from coca_jax.parallel import sharding
from coca_jax.runtime import storage
from coca_jax.training.state import TrainState

CLS = "text_decoder/cls/value"  # of models whose last text position is [CLS]'s


def apply(
    state: TrainState,
    path: str,
    class_names: Sequence[str] = (),
    positions: str = "extend",
    parts: str = "all",
    grid: tuple[int, int] | None = None,
) -> TrainState:
    """`state` with its parameters (and their average) replaced by those at `path`.

    Positions of another image size are resized on their grid (paper Section 4.1: 288 px to 576);
    of texts, those beyond the weights' max_len start untrained, or with positions='interpolate'
    between those that are there, and those beyond the model's go.
    Optional parts (see models/layers.py) that the weights lack stay as they are, and those that the
    model lacks, as of a loss that this run does not have, are left out. A task head of the
    weights is used where it has the classes `class_names` of this run's head, in their order, and
    left out else. parts='image': the image encoder alone is taken, of weights of any family.
    grid: rows and columns of the model's patches; None: as many of both.
    Raises ValueError naming the first parameter that does not fit, FileNotFoundError without any.
    """
    target = export_format.flatten(state.params)
    weights, classes, old_grid = read(path)
    if parts == "image":
        weights = param_groups.select(weights, lambda part: part.serves == "image")
    if param_groups.has_task_head(weights) and (not class_names or classes != list(class_names)):
        logging.warning("init_from: the head of %s has other classes and is left out", path)
        weights = param_groups.without_task_head(weights)
    given = _known(export_format.flatten(weights), target, path)
    params: dict[str, Any] = {}
    for name, leaf in target.items():
        part = param_groups.part_of(name.split("/"))
        if name not in given:
            if not part.optional and (parts == "all" or part.serves == "image"):
                raise ValueError(f"init_from={path} lacks {name} of this config's model")
            params[name] = leaf
            continue
        array = np.asarray(given[name], np.float32)
        if part.positions == "grid":
            array = _of_grid(array, leaf.shape, old_grid, grid)
        if part.positions == "text":
            array = _of_texts(array, leaf.shape[0], positions, CLS in target)
        if array.shape != leaf.shape:
            raise ValueError(
                f"init_from={path}: {name} has shape {array.shape}, the model {leaf.shape}"
            )
        params[name] = export_format.place(array, leaf.sharding)
    untrained = target.keys() - given.keys() if parts == "all" else ()
    for missing in sorted({name.split("/")[0] for name in untrained}):
        logging.warning("init_from: %s starts untrained", missing)
    tree = export_format.unflatten(params)
    return state.replace(params=tree, ema=_averages(state.ema, tree))


def _of_grid(
    array: np.ndarray, shape: tuple[int, ...], old: tuple[int, int], new: tuple[int, int] | None
) -> np.ndarray:
    """Positions of patches on this model's grid; says so where they are resized."""
    if array.shape == shape and old == (new or old):
        return array
    now = f"{new[0]} x {new[1]}" if new else "those of this image size"
    logging.warning("init_from: positions of %d x %d patches are resized to %s", *old, now)
    return resize_positions(array, shape[0], old, new)


def _of_texts(array: np.ndarray, length: int, how: str, with_cls: bool) -> np.ndarray:
    """Positions of `length` tokens, [CLS] included; says so where the weights have more or less."""
    if len(array) != length:
        beyond = "the others start untrained" if len(array) < length else "those beyond go"
        action = "they are spread" if how == "interpolate" and len(array) < length else beyond
        template = "init_from: the weights have %d positions of texts, this model %d: %s"
        logging.warning(template, len(array), length, action)
    if how == "interpolate" and len(array) < length:
        array = spread_text_positions(array, length, with_cls)
    return fit_text_positions(array, length, with_cls)


def _known(given: dict[str, Any], target: dict[str, Any], path: str) -> dict[str, Any]:
    """What the model has of the weights. Optional parts that it lacks are named and left out;
    raises ValueError for others."""
    unknown = sorted(set(given) - set(target))
    for name in unknown:
        if not param_groups.is_optional(name.split("/")):
            raise ValueError(f"init_from={path} has {name}, which this config's model lacks")
    for lost in sorted({name.rpartition("/")[0] for name in unknown}):
        logging.warning("init_from: %s of %s is left out, the model has none", lost, path)
    return {name: array for name, array in given.items() if name in target}


def _averages(ema: Any, params: Any) -> Any:
    """Copies (donation needs arrays of its own) of the parameters that have an average."""
    if isinstance(ema, dict):
        return {key: _averages(value, params[key]) for key, value in ema.items()}
    return None if ema is None else params + 0


def check_place(path: str) -> None:
    """Raises ValueError where the weights have to be converted first, a file or open_clip's folder,
    FileNotFoundError for weights by a name, which `convert` takes as well."""
    place, what = storage.place(path), ""
    if not place.exists():
        if ":" in path and not storage.is_remote(path):
            raise FileNotFoundError(
                f"init_from={path} is no folder; weights by a name become one with "
                f"coca-jax convert --input={path} --out=DIR"
            )
    elif not place.is_dir():
        what = "a file"
    elif (place / open_clip_config.CONFIG_FILE).exists() and not export_format.is_export(path):
        what = "open_clip's"
    if what:
        raise ValueError(
            f"init_from={path} is {what}: convert it first with coca-jax convert "
            f"--input={path} --out=DIR"
        )


def check_weights(path: str) -> None:
    """Raises FileNotFoundError where `path`, a folder here or in a bucket, has no weights to start
    from, ValueError for a bucket that cannot be asked, and what `check_place` raises."""
    storage.reach(storage.place(path))
    check_place(path)
    if not export_format.is_export(path):
        manager.find_steps(path)


# Keys of config.model that weights of any value fit.
_FIT = (
    *("image_size", "text.max_len", "dtype", "implementation", "pad_id", "clean", "mend_texts"),
    *("image_mean", "image_std"),
)
_NOT_OF_IMAGES = ("text.", "pooler.", "embed_dim")  # keys that the image encoder does not have


def check_model(config: Config) -> None:
    """Raises ValueError where parameters at config.init_from have other shapes than this model's,
    with the keys of the model that are others there: before any data are read."""
    path, parts = config.init_from, config.init_parts
    there = _model_of(path)
    if parts == "all" and there.family != config.model.family:
        raise ValueError(
            f"init_from={path}: its weights are of model.family={there.family!r}, this config's "
            f"{config.model.family!r}. Use --config=finetune_towers:{path} for dual encoders, or "
            "init_parts='image' to take their image encoder alone."
        )
    old, new = (flatten(model.to_dict()) for model in (there, config.model))
    keys = [
        key
        for key in new
        if old.get(key) != new[key] and key not in _FIT and not isinstance(new[key], float)
        if parts == "all" or not key.startswith(_NOT_OF_IMAGES)
    ]
    if not keys or not _differ(_shapes(there), _shapes(config.model), parts):
        return
    differences = (f"model.{key} is {old.get(key)} there, {new[key]} here" for key in keys)
    raise ValueError(f"init_from={path}: {'; '.join(differences)}; set what the weights have")


# Keys of config.model by which the same parameters are another model; those of blocks besides.
_MEANINGS = (
    *("activation", "norm", "norm_eps", "positions", "image_mean", "image_std", "pooler.kind"),
    *(
        "image.rope_theta",
        "image.rope_start",
        "image.rope_span",
        "text.rope_theta",
        "text.cls_mask",
    ),
)


def remark(config: Config) -> str:
    """A warning where config.model computes otherwise with parameters at config.init_from than
    they were trained, which no shape tells, else ''."""
    there, parts = _model_of(config.init_from), config.init_parts
    old, new = (flatten(model.to_dict()) for model in (there, config.model))
    notes = [
        f"model.{key} is {old.get(key, 'not set')} there, {new.get(key, 'not set')} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and (key in _MEANINGS or "block." in key)
        if parts == "all" or not key.startswith(_NOT_OF_IMAGES)
        if "rope" not in key or config.model.positions != "learned"
    ]
    if not notes:
        return ""
    return (
        f"warning: init_from={config.init_from}: {'; '.join(notes)}: the same weights are another "
        "model then; set what they have, unless it is meant"
    )


def _model_of(path: str) -> Model:
    """config.model of the weights at `path`."""
    export = export_format.is_export(path)
    return (export_format.read_config if export else manager.load_config)(path).model


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a model, () of positions, which are resized."""
    module = network.build(model)
    tree = sharding.unbox(jax.eval_shape(lambda: network.init(module, jax.random.key(0))))
    return {
        name: () if param_groups.part_of(name.split("/")).positions else leaf.shape
        for name, leaf in export_format.flatten(tree).items()
    }


def _differ(old: dict[str, Any], new: dict[str, Any], parts: str) -> bool:
    """Whether a parameter that a run takes from weights has another shape, or only one has it."""
    return any(
        old.get(name) != new.get(name)
        for name in old | new
        if not param_groups.is_optional(name.split("/"))
        if parts == "all" or param_groups.part_of(name.split("/")).serves == "image"
    )


def read(path: str) -> tuple[dict[str, Any], list[str], tuple[int, int]]:
    """The parameters at `path`, a nested dict of arrays on the host or the first device, the
    classes of its task head, and the rows and columns of patches that its positions are of."""
    place = storage.place(path)
    if place.is_dir() and export_format.is_export(path):
        params, config = export_format.read_export(path)
        return params, list(config.class_names), config.model.table_grid
    check_place(path)
    params, config = manager.load_params(path)
    return params, list(config.class_names), config.model.table_grid


def fit_text_positions(positions: np.ndarray, length: int, with_cls: bool = True) -> np.ndarray:
    """[M, D] -> [length, D] for texts of another length, row by row; with_cls: the last row is
    [CLS]'s.

    Rows that are missing are drawn as a new model's, the same ones on every process.
    """
    places, last = _without_cls(positions, with_cls)
    count = min(len(places), length - len(last))
    missing = length - len(last) - count
    fresh = np.random.default_rng(0).normal(0, 0.02, (missing, positions.shape[1]))
    return np.concatenate([places[:count], fresh.astype(positions.dtype), last])


def _without_cls(positions: np.ndarray, with_cls: bool) -> tuple[np.ndarray, np.ndarray]:
    """(rows of tokens, the row of [CLS] or none)."""
    count = len(positions) - int(with_cls)
    return positions[:count], positions[count:]


WELL_TRAINED = 20  # first places, in nearly every caption


def spread_text_positions(positions: np.ndarray, length: int, with_cls: bool = True) -> np.ndarray:
    """[M, D] -> [length, D], longer: the first 20 rows stay, those behind are drawn out linearly
    (Long-CLIP, Zhang et al. 2024); with_cls: the last row is [CLS]'s."""
    places, cls = _without_cls(positions, with_cls)
    count = min(WELL_TRAINED, len(places) - 1)
    tail = places[count:]
    at = np.linspace(0, len(tail) - 1, length - len(cls) - count)
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, len(tail) - 1), (at - low)[:, None].astype(positions.dtype)
    return np.concatenate([places[:count], (1 - share) * tail[low] + share * tail[high], cls])


def resize_positions(
    positions: np.ndarray,
    length: int,
    old: tuple[int, int] | None = None,
    new: tuple[int, int] | None = None,
) -> np.ndarray:
    """[N, D] -> [length, D]: positions of a grid, resized with a cubic filter.

    old, new: rows and columns of both grids; None: they are squares. A first row that belongs to a
    class token is kept apart, when both lengths have one.
    Raises ValueError when the lengths are not those of the grids.
    """
    for extra in (0, 1):
        before = old or (round((len(positions) - extra) ** 0.5),) * 2
        after = new or (round((length - extra) ** 0.5),) * 2
        if [len(positions), length] == [math.prod(grid) + extra for grid in (before, after)]:
            places = positions[extra:].reshape(*before, -1)
            resized = jax.image.resize(places, (*after, places.shape[-1]), "cubic")
            return np.concatenate(
                [positions[:extra], np.asarray(resized).reshape(length - extra, -1)]
            )
    grids = f"grids of {old} and {new} patches" if old or new else "both square grids"
    raise ValueError(f"positions of {len(positions)} and {length} tokens are not {grids}")
