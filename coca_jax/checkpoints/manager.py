"""Checkpoints of a run: asynchronous saves, restore on any mesh, parameters alone.

Contents are checked when they are read (see saved_record.py). Where the newest checkpoint is
damaged, the one before it is used and a line says so.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from coca_jax.checkpoints import items, verify
from coca_jax.checkpoints import steps as saved_steps
from coca_jax.checkpoints.items import first_line
from coca_jax.checkpoints.verify import Damaged
from coca_jax.config import StoredConfig, read
from coca_jax.data.sources import files
from coca_jax.models import param_groups
from coca_jax.runtime import activity, json_files, multihost, notes, storage

# Where the processes of a run meet while a checkpoint is written behind the steps.
#
# Orbax has three such places in a save: all have written, process 0 has put the checkpoint in its
# place, the save is over. A process that could not write skips the first two and waits at the third
# for the others, which wait for it at the first: all of them for twenty minutes, and then without the
# reason. Here each says where it is, so those that wait for one that comes no more hear why.


# Of Orbax's names, those that a process skips whose part of the save has failed.
SKIPPED = ("async_write_complete", "async_commit_complete")

_managers = itertools.count()  # which all processes open in one order


class State(Protocol):
    """A pytree that a checkpoint stores as named items (`training.state.TrainState`)."""

    def items(self) -> dict[str, Any]:
        """Name of each item -> its pytree."""

    def from_items(self, items: dict[str, Any]) -> Self:
        """A state of the same type from what `items` gave."""


S = TypeVar("S", bound=State)


class FailedElsewhere(RuntimeError):
    """Another process could not write its part of a checkpoint."""


class Barrier:
    """Orbax's `BarrierSyncFn` of one checkpoint manager, which calls it in one thread at a time."""

    def __init__(self) -> None:
        self._name = f"coca_jax/saves/{next(_managers)}"
        self._rounds = itertools.count()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Returns once all processes are at `key`.

        Raises FailedElsewhere with what one of them said that has skipped this place. That one
        waits on, for those to whom this happened: they come to where it is.
        """
        skipped = any(name in key for name in SKIPPED)
        while True:
            number = next(self._rounds)
            replies = multihost.meet(f"{self._name}/{number}", {key: _failure()}, timeout_ms)
            multihost.forget(f"{self._name}/{number - 1}")
            others = [text for name, text in replies.items() if name != key]
            if not others:
                return
            if skipped or len(replies) > 2:
                raise FailedElsewhere(others[0] or "another process could not write its part")


def _failure() -> str:
    """What ended this process's part of the save: Orbax comes here while it handles that."""
    error = sys.exception()
    return "" if error is None else f"process {jax.process_index()}: {first_line(error)}"


def barrier_options() -> ocp.options.AsyncOptions:
    """For a new checkpoint manager; all processes of a run call it."""
    if jax.process_count() == 1:
        return ocp.options.AsyncOptions()
    return ocp.options.AsyncOptions(barrier_sync_fn=Barrier())


# Saves that leave no memory behind, and that compile nothing for small arrays.
#
# TensorStore (0.1.86, its newest version when this was written) never frees the strings of the JSON
# that it gives to Python, and Orbax asks it for some at every array of every save: 280 KiB in a save
# of 320 arrays, for as long as the run lives. What Orbax asks for is the same for all arrays of a
# folder, and what it counts is only logged: now it asks once for a folder, and does not count.
#
# An array that several devices hold whole is cut by Orbax into a slice for each of them to write,
# each by a program of its own: a hundred programs at the first save of a small model. Arrays with
# less than a MiB for each are written by one.
#
# What the threads of a save have freed, the C library keeps in pieces: it is given back.


MODULE = "orbax.checkpoint._src.serialization.tensorstore_utils"
SPEC, COUNT = "_build_ocdbt_kvstore_tspec", "get_tensorstore_raw_bytes"
SMALLEST, SLICE_BYTES = "_min_slice_bytes_for_replica_parallel", 1 << 20
FOLDERS = 64  # of which the answer is kept: those of the items of a few saves


@functools.cache
def enable() -> None:
    """From now on Orbax asks TensorStore less and cuts no small arrays. Versions of it that lack a
    function are left alone: they do not ask."""
    import orbax.checkpoint as ocp

    arrays = ocp.type_handlers.get_type_handler(jax.Array)
    if hasattr(arrays, SMALLEST):
        setattr(arrays, SMALLEST, SLICE_BYTES)
    try:
        utils = importlib.import_module(MODULE)
    except ImportError:
        return
    if hasattr(utils, SPEC):
        setattr(utils, SPEC, by_folder(getattr(utils, SPEC)))
    if hasattr(utils, COUNT):
        setattr(utils, COUNT, lambda *_, **__: 0)  # as of a storage that does not count


def by_folder(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Orbax's function from a folder, an array's name and options to a specification, which is the
    same for every name but for the name itself."""
    of_folder = functools.lru_cache(maxsize=FOLDERS)(build)

    @functools.wraps(build)
    def of_array(directory: str, name: str | None = None, **options: Any) -> dict[str, Any]:
        spec = copy.deepcopy(of_folder(directory, **options))
        return spec if name is None else spec | {"path": name}

    return of_array


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's function; other C libraries have none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def give_back() -> None:
    """Gives free memory back to the system, to be called after a save; about a millisecond."""
    trim = _trim()
    if trim is not None:
        trim(0)


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those before it are untouched.

    why: the reason, in a few words.
    """

    def __init__(self, text: str, why: str = ""):
        super().__init__(f"{text}: {why}" if why else text)
        self.why = why


class Checkpoints:
    """Steps under `workdir/checkpoints`, each with params, ema, optimizer state and counters apart.

    keep: how many steps stay, the newest ones. best: says which stay besides. run: the contents of
    config.json, kept in each. Saves are asynchronous; a step appears only when it is whole. What a
    killed save left is removed.
    """

    def __init__(
        self,
        workdir: str,
        *,
        keep: int = 3,
        best: ocp.checkpoint_managers.PreservationPolicy | None = None,
        run: dict[str, Any] | None = None,
    ) -> None:
        self.directory = saved_steps.place(workdir) / "checkpoints"
        self._run, self._opened = run or {}, 0
        newest = ocp.checkpoint_managers.LatestN(keep)
        self._stay = [newest] if best is None else [newest, best]
        enable()
        items.ignore_late_answers()
        self._open()

    def _open(self) -> None:
        self._opened += 1
        if jax.process_index() == 0:
            for folder in saved_steps.unfinished(
                self.directory
            ):  # what a killed or failed save left
                with contextlib.suppress(OSError):
                    folder.rmtree()
        # Processes that went on from a failed save must not meet at barriers of before.
        several = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=f"open{self._opened}")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(self._stay),
            create=True,
            multiprocessing_options=several,
            async_options=barrier_options(),
            **saved_steps.atomicity(self.directory),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """The whole steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State, quarantine: Sequence[Sequence[Any]] = ()) -> None:
        """Starts writing `state` as `step`, with the rows of the run's quarantine; returns when the
        device arrays may change again.

        Call `wait` first: it says how the save before ended. Raises SaveFailed.
        """
        if step in self._manager.all_steps():
            return
        trees = state.items()
        items: dict[str, Any] = {name: ocp.args.StandardSave(x) for name, x in trees.items()}
        record = verify.make(trees, self._run, quarantine)
        items[verify.ITEM] = ocp.args.JsonSave(record)
        try:
            with activity.doing(f"writing {self.directory / str(step)}"):
                self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:
            if jax.process_count() > 1:  # the others wait inside it: only an end helps them
                raise
            self._reopen()
            raise SaveFailed(f"could not save step {step}", first_line(error)) from error

    def quarantine(self, step: int) -> list[Sequence[Any]]:
        """The rows that were saved with a step. Raises as `verify.read_record`."""
        return verify.read_record(self.directory / str(step)).get("quarantine", [])

    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Returns once the save under way, if any, is whole on all processes, else raises
        SaveFailed on all of them."""
        problem = None
        try:
            with activity.doing(f"writing to {self.directory}"):
                self._manager.wait_until_finished()
        except Exception as error:
            problem = error
        give_back()
        if _agree(problem is None):
            return
        self._reopen()
        elsewhere = problem is None or isinstance(problem, FailedElsewhere)
        why = str(problem or "on another process") if elsewhere else first_line(problem)
        raise SaveFailed(f"could not finish a save in {self.directory}", why) from problem

    def wait_for(self, step: int) -> None:
        """`wait`, and SaveFailed unless `step` is then among the whole ones."""
        self.wait()
        if step not in self._manager.all_steps():
            raise SaveFailed(f"could not save step {step}")

    def _reopen(self) -> None:
        with contextlib.suppress(Exception):
            self._manager.close()
        self._open()

    def restore_newest(self, abstract: S, shardings: S) -> tuple[S, int, list[str]] | None:
        """(state, step, what was wrong with newer ones), whatever mesh wrote it; None without any.

        The state is read straight into the given shardings. Damaged steps are set aside under
        other names. Raises Misfit when a whole checkpoint's arrays do not match the model,
        Damaged when no whole one is left.
        """
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        )
        steps = self.steps()[::-1]
        problems: dict[int, str] = {}
        for step in steps:
            state, problem = self._try(step, target)
            if problem is None:
                return state, step, self._set_aside(problems, step)
            problems[step] = problem
        if not problems:
            return None
        raise Damaged(
            f"every checkpoint of {self.directory} is damaged ({problems[steps[0]]}); put a copy "
            "of one in its place, or move the folder away to begin at step 0"
        )

    def _try(self, step: int, target: S) -> tuple[S | None, str | None]:
        """(state, None), or (None, what is wrong with its contents)."""
        folder = self.directory / str(step)
        try:
            with activity.doing(f"reading {folder}"):
                parts = target.items().items()
                found = {name: items.restore(folder, name, x) for name, x in parts}
        except Damaged as error:
            problem: str | None = str(error)
        else:
            problem = None
        if not _agree(problem is None):  # what comes now they do together
            return None, problem or "damaged where another process reads it"
        try:
            for name, tree in found.items():
                items.check(folder, name, tree)
        except Damaged as error:
            return None, str(error)
        return target.from_items(found), None

    def _set_aside(self, problems: dict[int, str], used: int) -> list[str]:
        """Renames damaged steps; returns the lines that say so."""
        lines = []
        for step, problem in problems.items():
            name = f"{step}.damaged"
            for number in range(2, 100):
                if not (self.directory / name).exists():
                    break
                name = f"{step}.damaged{number}"
            if jax.process_index() == 0:
                saved_steps.rename(self.directory / str(step), self.directory / name)
            lines.append(
                f"checkpoint {step} is damaged ({problem}): set aside as {self.directory / name}"
            )
        if lines:
            step = max(problems)
            lines.append(f"going on from step {used}, {step - used} steps are trained again")
            _meet("damaged checkpoints are set aside")
            self._manager.reload()
        return lines

    def drop_after(self, step: int) -> None:
        """Deletes the steps after `step`. All processes call it; no save may be under way."""
        for newer in self.steps():
            if newer > step:
                self._manager.delete(newer)
        _meet("newer checkpoints are deleted")

    def close(self) -> None:
        """Waits for writes under way on every process."""
        self._manager.wait_until_finished()
        self._manager.close()


def _agree(fine: bool) -> bool:
    """Whether all processes say so."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def find_steps(path: str) -> tuple[epath.Path, list[int]]:
    """(checkpoints directory, its steps, newest first) of a workdir or a checkpoints directory;
    the one step that `path` itself is.

    Raises FileNotFoundError when there is no whole checkpoint.
    """
    found = saved_steps.place(path)
    if found.name.isdecimal() and (found / "params").is_dir() and saved_steps.is_whole(found):
        return found.parent, [int(found.name)]
    for directory in (found / "checkpoints", found):
        if directory.is_dir():
            steps = [
                int(p.name)
                for p in directory.iterdir()
                if p.name.isdecimal() and saved_steps.is_whole(p)
            ]
            if steps:
                return directory, sorted(steps, reverse=True)
    if not (found / "config.json").exists() and _holds_images(path):
        raise FileNotFoundError(
            f"no checkpoint under {path}: it is a folder of images; give a run's workdir or one of "
            "its steps"
        )
    cut = saved_steps.unfinished(found / "checkpoints")
    note = f" ({len(cut)} there were not written to their end)" if cut else ""
    raise FileNotFoundError(
        f"no checkpoint under {path}{note}; give a run's workdir or one of its steps"
    )


def _holds_images(path: str) -> bool:
    """Whether images are among the first files of a folder and the folders in it."""
    names = itertools.chain.from_iterable(files.walk(path)) if files.exists(path) else ()
    return any(
        name.lower().endswith(files.IMAGE_SUFFIXES) for name in itertools.islice(names, 1000)
    )


def find_step(path: str) -> tuple[epath.Path, int]:
    """(checkpoints directory, newest step); see `find_steps`."""
    directory, steps = find_steps(path)
    return directory, steps[0]


def load_config(path: str) -> StoredConfig:
    """The configuration of the run that holds the checkpoint `path`."""
    directory, _ = find_step(path)
    return read_config(str(directory.parent))


def read_config(workdir: str) -> StoredConfig:
    """`workdir/config.json`; where it is damaged, what the newest checkpoint says it was.

    Raises FileNotFoundError when it is not there, ValueError when neither is whole.
    """
    file = storage.place(workdir) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; a checkpoint is read with its run's config")
    return read(StoredConfig, read_run(workdir), f"{file}: config", old=True)


def read_run(workdir: str) -> dict[str, Any]:
    """The contents of config.json: the config, the vocabulary's checksum, the head's classes."""
    file = storage.place(workdir) / "config.json"
    try:
        return json_files.read_sealed(file)
    except ValueError as error:
        with contextlib.suppress(FileNotFoundError, ValueError):
            directory, step = find_step(workdir)
            record = verify.read_record(directory / str(step))
            if record["config"]:
                logging.warning("%s; the config kept with step %d is used", error, step)
                return record["config"]
        raise


def load_params(path: str, shardings: Any = None) -> tuple[Any, StoredConfig]:
    """`load_step` without the step."""
    params, config, _ = load_step(path, shardings)
    return params, config


def load_step(path: str, shardings: Any = None) -> tuple[Any, StoredConfig, int]:
    """Parameters alone (their average when the run keeps one), the run's config, and the step that
    the parameters are of.

    Of a workdir, those of the newest step that is not damaged; a warning names the damaged ones.
    Raises Damaged when the step that `path` names, or every step, is.

    shardings: a tree of shardings like the parameters, to read each array straight into its place;
    None: onto the first local device.
    """
    directory, steps = find_steps(path)
    config = read_config(str(directory.parent))
    for step in steps:
        try:
            return _params(directory / str(step), shardings), config, step
        except Damaged as error:
            if step == steps[-1]:
                raise
            line = f"checkpoint {step} is damaged ({error}); the one before it is read"
            logging.warning(line)
            notes.add(f"warning: {line}")
    raise AssertionError("find_steps gives at least one step")


def _params(folder: epath.Path, shardings: Any) -> Any:
    """The parameters of one checkpoint, checked."""

    def read(item: str) -> Any:
        tree = items.metadata(folder, item)
        if shardings is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            places = jax.tree.map(lambda _: device, tree)
        else:
            places = _part_of(shardings, tree)
        target = jax.tree.map(
            lambda m, s: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=s), tree, places
        )
        return items.read_item(folder, item, target)

    if "ema" not in verify.read_record(folder)["items"]:
        return read("params")
    ema = read("ema")  # of what the run trains: all, or the head alone
    count = len(jax.tree.leaves(items.metadata(folder, "params")))
    return ema if len(jax.tree.leaves(ema)) == count else param_groups.merge(read("params"), ema)


def _part_of(tree: Any, like: Any) -> Any:
    """The part of a nested dict that another one has."""
    if not isinstance(like, dict):
        return tree
    return {key: _part_of(tree[key], value) for key, value in like.items()}
