"""Values that a recipe leaves to the weights it starts from.

A recipe is evaluated without reading them: `leave` marks keys, which are None until `fill` puts in
what the run or export at `init_from` has. Whatever the recipe sets behind `leave` is its own. A run
that goes on does not need the weights any more: it has their values in its config.json.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from coca_jax.runtime import storage

if TYPE_CHECKING:
    from coca_jax.config import Data, Model, Section


# How many patches an image has belongs to resize='native', whoever leaves that.
_WITH = {"data.resize": ("data.max_patches",)}


def leave(config: ConfigDict, *keys: str) -> None:
    """Marks keys, or all of a section ('model'), as those of the weights at `init_from`; with
    data.resize also data.max_patches."""
    for key in keys:
        leave(config, *_WITH.get(key, ()))
        group, last = _place(config, key)
        if isinstance(group[last], ConfigDict) and len(group[last]):  # else a mapping, as a value
            leave(config, *(f"{key}.{name}" for name in group[last]))
        else:
            group[last] = None


def fill(config: ConfigDict, workdir: str = "") -> ConfigDict:
    """The config, with the values of the weights in the keys that are left to them. Where these are
    gone, they are those of the run in `workdir` that began from them and has saved a step.

    Raises:
        FileNotFoundError: no run and no export at `init_from`.
        ValueError: it is damaged, not named, or has to be converted first.
    """
    left = list(_left(config, ""))
    if not left:
        return config
    if not config.get("init_from"):
        raise ValueError(f"config.{left[0]} is left to the weights, but init_from names none")
    found = _found(str(config.init_from), workdir)
    for key in left:
        if key not in found:
            raise ValueError(f"config.{key} is None: give a value; weights have none for it")
        group, last = _place(config, key)
        group[last] = found[key]
    return config


def _left(group: ConfigDict, prefix: str) -> Iterator[str]:
    for name, value in group.items():
        if isinstance(value, ConfigDict):
            yield from _left(value, f"{prefix}{name}.")
        elif value is None:
            yield prefix + name


def _place(config: ConfigDict | Section, key: str) -> tuple[Any, str]:
    """(the section that a key is in, its last name)."""
    *groups, last = key.split(".")
    return functools.reduce(getattr, groups, config), last


def _found(path: str, workdir: str) -> dict[str, Any]:
    """{key: value} of the weights at `path`, or of the run in `workdir` that began from them."""
    # JAX and Orbax take seconds to import.
    from coca_jax.checkpoints import manager
    from coca_jax.interop import export_format
    from coca_jax.training import warm_start

    try:
        warm_start.check_place(path)
        if export_format.is_export(path):
            words, loss = export_format.vocabulary_path(path), export_format.contrastive_loss(path)
            run = export_format.read_config(path)
            return _values(run.model, run.data, words, loss)
        run = manager.load_config(path)
        return _values(run.model, run.data, "", run.loss.contrastive)  # its vocabulary is found
    except FileNotFoundError:
        if workdir:
            with contextlib.suppress(FileNotFoundError):
                begun = manager.load_config(workdir)
                if _whole(begun.init_from) == _whole(path):
                    loss = begun.loss.contrastive
                    return _values(begun.model, begun.data, begun.data.vocabulary, loss)
        raise


def _whole(path: str) -> str:
    return storage.whole_path(path).rstrip("/")


def _values(model: Model, data: Data, words: str, loss: str) -> dict[str, Any]:
    """{key: value} of a model and of how its texts and images are read. words: the file of the
    vocabulary. loss: the form of the contrastive loss that the weights were trained with."""
    from coca_jax.config import Model as ModelSection
    from coca_jax.config import keys

    found: dict[str, Any] = {
        "data.resize": data.resize,
        "data.max_patches": data.max_patches,
        "data.label_token": data.label_token,
        "data.vocabulary": words,
        "loss.contrastive": loss,
    }
    for key, _ in keys(ModelSection):
        group, last = _place(model, key)
        found[f"model.{key}"] = getattr(group, last)
    return found
