"""Checks of a run's configuration, before any long work; config.json and what may change in it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from coca_jax.models import coca
from coca_jax.optimizer import make_optimizer, make_schedule

# What may differ when a run is resumed: it changes where and how often, not what is computed.
FREE = ("mesh", "checkpoint", "eval", "log", "remat", "accumulate_steps", "data.num_threads")


def check(config: ConfigDict) -> None:
    """Raises ValueError for the first impossible value: its name, the value, the remedy."""
    coca.validate(config.model)
    make_optimizer(config.optimizer)
    if bool(config.steps) == bool(config.epochs):
        raise ValueError(
            f"config.steps={config.steps} and config.epochs={config.epochs}; set exactly one"
        )
    make_schedule(config.optimizer, config.steps)
    if config.remat not in ("none", "dots", "named", "full"):
        raise ValueError(f"config.remat={config.remat!r}; choose 'none', 'dots', 'named' or 'full'")
    patch = config.model.patch_size
    if any(size % patch or size < patch for _, size in config.image_sizes):
        raise ValueError(
            f"config.image_sizes={config.image_sizes} must be multiples of model.patch_size={patch}"
        )
    if any(not 3 <= length <= config.model.text.max_len for length in config.text_lengths):
        raise ValueError(
            f"config.text_lengths={config.text_lengths} must be from 3 to model.text.max_len="
            f"{config.model.text.max_len}"
        )
    if config.text_parts > 1 and not config.text_lengths:
        raise ValueError(
            f"config.text_parts={config.text_parts} needs config.text_lengths, such as (16, 32)"
        )
    if not config.data.sources:
        raise ValueError("config.data.sources is empty; name at least one source of data")
    if config.loss.contrastive_weight == 0 == config.loss.captioning_weight:
        raise ValueError("loss.contrastive_weight and loss.captioning_weight are both 0")
    whole = ("batch_size", "accumulate_steps", "text_parts")
    for name in (*whole, "log.every_steps", "checkpoint.every_steps"):
        value = config
        for part in name.split("."):
            value = value[part]
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"config.{name}={value!r}; it must be a whole number above 0")


def check_batch(config: ConfigDict, parts: int, processes: int) -> None:
    """Raises ValueError when the batch does not split over devices, processes and micro-batches."""
    size, micro = config.batch_size, config.accumulate_steps
    if size % (parts * micro):
        raise ValueError(
            f"config.batch_size={size} is not a multiple of {parts} batch shards (mesh.data x "
            f"mesh.fsdp) x accumulate_steps={micro}; choose a multiple of {parts * micro}"
        )
    if size % (parts * micro * config.text_parts):
        raise ValueError(
            f"config.batch_size={size} is not a multiple of {parts * micro} batch shards and "
            f"micro-batches x text_parts={config.text_parts}; choose a multiple of "
            f"{parts * micro * config.text_parts}"
        )
    if size % processes:
        raise ValueError(f"config.batch_size={size} is not a multiple of {processes} processes")


def check_vocabulary(config: ConfigDict, vocabulary: Any) -> None:
    """Raises ValueError when the tokenizer has ids that the model has no row for."""
    rows = config.model.text.vocab_size
    if vocabulary.size > rows:
        raise ValueError(
            f"the vocabulary has {vocabulary.size} tokens but model.text.vocab_size={rows}; "
            "raise it or use the vocabulary that belongs to this model"
        )


def num_steps(config: ConfigDict, num_examples: int) -> int:
    """Optimizer steps of the run: config.steps, or config.epochs passes over the data.

    Raises ValueError when the epochs amount to no step or the warm-up outlasts them.
    """
    steps = config.steps or round(config.epochs * num_examples / config.batch_size)
    if steps < 1:
        raise ValueError(
            f"config.epochs={config.epochs} of {num_examples} examples is no step of "
            f"batch_size={config.batch_size}; raise the one or lower the other"
        )
    make_schedule(config.optimizer, steps)
    return steps


def write(config: ConfigDict, workdir: str, vocabulary: Any) -> None:
    """Writes workdir/config.json with the vocabulary's checksum bound to it."""
    data = config.to_dict() | {"vocabulary_checksum": vocabulary.checksum}
    path = pathlib.Path(workdir) / "config.json"
    new = path.with_suffix(".new")
    new.write_text(json.dumps(data, indent=1, default=list) + "\n")
    new.replace(path)


def check_resumable(config: ConfigDict, workdir: str) -> None:
    """Raises ValueError naming what differs from the run that `workdir` already holds."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        return
    old = _flatten(json.loads(path.read_text()))
    new = _flatten(json.loads(json.dumps(config.to_dict(), default=list)))
    changed = [
        f"{key}: {old.get(key)} there, {new.get(key)} here"
        for key in sorted(old.keys() | new.keys())
        if key != "vocabulary_checksum"
        and old.get(key) != new.get(key)
        and not any(key == free or key.startswith(free + ".") for free in FREE)
    ]
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:4])}); "
            "use a new --workdir or the same config"
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
