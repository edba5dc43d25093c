"""Everything that a new run lacks on this machine, in one message with a command that runs here."""

from __future__ import annotations

import contextlib
import pathlib
import re
import shlex
from collections.abc import Callable, Sequence

import jax

from coca_jax.checkpoints import config_file
from coca_jax.config import Config
from coca_jax.data.batches import check_loader
from coca_jax.data.sources import files
from coca_jax.parallel import sharding
from coca_jax.training import auto_mesh, memory

STAND_IN = "scenes"  # synthetic data, for a command that runs without any
_FROM_MESH = {"mesh.data": -1, "mesh.fsdp": 0, "mesh.tensor": 0}


def check(
    config: Config,
    workdir: str,
    *,
    has_data: bool,
    recipe: str,
    command: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Raises ValueError where the workdir, the data, a package, or devices for the mesh and the
    batch are missing. The message also states the memory of a step, and ends with a command line.

    has_data: the command line names data in place of the recipe's. recipe: its name or file.
    command: the words of the command line. say: takes a line before what lasts.
    """
    problems: list[str] = []
    changes: dict[str, object] = {}  # of the config, in the suggested command
    added: list[str] = []
    if not workdir:
        problems.append("--workdir: not given")
        added.append(f"--workdir=runs/{_name(recipe)}")
    if missing := [] if has_data else _missing(config):
        problems.append(
            f"data source {', '.join(missing)}: no such folder; write it with `coca-jax prepare "
            f"--out={missing[0]}`, or give your own data with --data=PATH"
        )
        added.append(f"--data={STAND_IN}" + (":label" if config.head.kind else ""))
    try:
        check_loader(config.data.loader)
    except ValueError as error:
        problems.append(str(error))
        changes["data.loader"] = "direct"
    try:
        mesh = auto_mesh.make(config).mesh
    except ValueError as error:
        problems.append(str(error))
        changes |= _FROM_MESH
        mesh = auto_mesh.make(config.change(_FROM_MESH)).mesh
    try:
        config_file.check_batch(config, sharding.batch_parts(mesh))
    except ValueError as error:
        problems.append(str(error))
        unit = sharding.batch_parts(mesh) * config.text_parts
        changes |= dict(batch_size=max(unit, config.batch_size // unit * unit), batch_sizes=())
        changes["accumulate_steps"] = 1
    if not problems:
        return
    runs_here = True
    if not config.head.kind:  # the classes of a head come from the data
        runs = config.change({**changes, "data.sources": ({"builtin": STAND_IN},)})
        line, fitting = memory.problem(runs, mesh, say)
        problems += [line] if line else []
        changes |= fitting
        runs_here = bool(fitting) or not line
    platform = mesh.devices.flat[0].platform
    numbered = "; ".join(f"({number}) {line}" for number, line in enumerate(problems, 1))
    stand_in = f" (--data={STAND_IN} is synthetic: replace it with your data)" if missing else ""
    remedy = f"this command runs here{stand_in}: {shlex.join(_command(command, changes, added))}"
    if not runs_here:
        remedy = "not even the smallest batch fits: take a smaller model or more devices"
    raise ValueError(
        f"the run cannot start on {jax.device_count()} {platform} device(s): {numbered}. {remedy}"
    )


def _missing(config: Config) -> list[str]:
    """The paths of the config's sources that do not exist."""
    paths = dict.fromkeys(source.path for source in config.data.sources if source.path)
    found = []
    for path in paths:
        with contextlib.suppress(ValueError, OSError):  # a bucket: read later, with its own message
            if not (files.is_pattern(path) or files.is_remote(path) or files.exists(path)):
                found.append(path)
    return found


def _name(recipe: str) -> str:
    """The recipe's name, as a folder of the run."""
    return pathlib.PurePath(recipe.partition(":")[0]).stem


def _command(command: Sequence[str], changes: dict[str, object], added: Sequence[str]) -> list[str]:
    """The command line with other values; sizes of the mesh that are chosen anyway are left out."""
    changed = "|".join(map(re.escape, changes)) or "$^"
    words = [w for w in command if not re.match(rf"--?config\.({changed})=", w)]
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    return [*words, *added, *flags]
