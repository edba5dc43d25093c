"""Checkpoints of a run: asynchronous saves, restore on any mesh, parameters alone."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from coca_jax.train_step import TrainState, merge


class Checkpoints:
    """Steps under `workdir/checkpoints`, each with params, ema, optimizer state and counters apart.

    keep: how many steps stay. Saves are asynchronous; a step appears only when it is whole.
    """

    def __init__(self, workdir: str, *, keep: int = 3) -> None:
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """The newest whole step, None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing `state` as `step`; returns when the device arrays may change again."""
        if step in self._manager.all_steps():
            return
        items = {
            "params": ocp.args.StandardSave(state.params),
            "opt_state": ocp.args.StandardSave(state.opt_state),
            "counters": ocp.args.StandardSave({"step": state.step, "skipped": state.skipped}),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, abstract: TrainState, shardings: TrainState) -> TrainState:
        """Reads `step` straight into the given shardings, whatever mesh wrote it.

        Raises ValueError when the checkpoint's arrays do not match the model.
        """
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        )
        items = {
            "params": ocp.args.StandardRestore(target.params),
            "opt_state": ocp.args.StandardRestore(target.opt_state),
            "counters": ocp.args.StandardRestore({"step": target.step, "skipped": target.skipped}),
        }
        if target.ema is not None:
            items["ema"] = ocp.args.StandardRestore(target.ema)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"checkpoint {self.directory}/{step} does not fit the model of this config "
                f"({str(error).splitlines()[0]}); use the config that made it, or a new workdir"
            ) from error
        return TrainState(
            step=restored["counters"]["step"],
            skipped=restored["counters"]["skipped"],
            params=restored["params"],
            opt_state=restored["opt_state"],
            ema=restored["ema"] if target.ema is not None else None,
        )

    def close(self) -> None:
        """Waits for writes under way on every process."""
        self._manager.wait_until_finished()
        self._manager.close()


def find_step(path: str) -> tuple[pathlib.Path, int]:
    """(checkpoints directory, step) of a workdir, a checkpoints directory or one step in it.

    Raises FileNotFoundError when there is no whole checkpoint.
    """
    place = pathlib.Path(path).absolute()
    if place.name.isdigit() and (place / "params").is_dir():
        return place.parent, int(place.name)
    for directory in (place / "checkpoints", place):
        if directory.is_dir():
            steps = [int(p.name) for p in directory.iterdir() if p.name.isdigit()]
            if steps:
                return directory, max(steps)
    raise FileNotFoundError(f"no checkpoint under {path}; give a run's workdir or one of its steps")


def load_config(path: str) -> ConfigDict:
    """The configuration of the run that holds the checkpoint `path`."""
    directory, _ = find_step(path)
    return read_config(str(directory.parent))


def read_config(workdir: str) -> ConfigDict:
    """`workdir/config.json`. Raises FileNotFoundError when it is not there."""
    file = pathlib.Path(workdir) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; a checkpoint is read with its run's config")
    return ConfigDict(json.loads(file.read_text()), convert_dict=True)


def load_params(path: str, shardings: Any = None) -> tuple[Any, ConfigDict]:
    """Parameters alone (their average when the run keeps one) and the run's config.

    shardings: a tree of shardings like the parameters, to read each array straight into its place;
    None: onto the first local device.
    """
    directory, step = find_step(path)
    config = read_config(str(directory.parent))
    folder = directory / str(step)
    # The handler alone: a Checkpointer looks for its own metadata beside each item and warns that
    # there is none, since it stands beside the whole step.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:

        def shapes(item: str) -> dict:
            metadata = handler.metadata(folder / item)
            return getattr(metadata, "tree", metadata)

        def read(item: str, tree: dict) -> dict:
            if shardings is None:
                device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                places = jax.tree.map(lambda _: device, tree)
            else:
                places = _part_of(shardings, tree)
            target = jax.tree.map(
                lambda m, s: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=s), tree, places
            )
            return handler.restore(folder / item, args=ocp.args.StandardRestore(target))

        tree = shapes("params")
        if not (folder / "ema").is_dir():
            return read("params", tree), config
        averaged = shapes("ema")  # of what the run trains: all, or the head alone
        if len(jax.tree.leaves(averaged)) == len(jax.tree.leaves(tree)):
            return read("ema", averaged), config
        return merge(read("params", tree), read("ema", averaged)), config


def _part_of(tree: Any, like: Any) -> Any:
    """The part of a nested dict that another one has."""
    if not isinstance(like, dict):
        return tree
    return {key: _part_of(tree[key], value) for key, value in like.items()}
