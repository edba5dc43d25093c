"""Trackers, which receive a run's metrics in addition to metrics.jsonl.

Each tracker is a file here with `open_run(workdir, start_step, config)`, which returns an object
with `write`, `flush` and `close`; `config.log.trackers` names a run's trackers. Resuming and the
report read only metrics.jsonl, so a tracker that fails is logged and training continues without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from coca_jax.config.log import TRACKERS
from coca_jax.runtime import bounded_json, extras, storage
from coca_jax.runtime.metric_log import Tracker

DEFAULT = "tensorboard"  # skipped, unless a user names it, if its package is not installed
NAMES_FILE = "trackers.json"
_NOT_IN_ID = re.compile(r"[^\w.-]")  # W&B refuses : # % and ? in a run's id
_MAX_FOLDER = 100  # characters of the folder's name in an id of at most 128


class DamagedNames(ValueError):
    """trackers.json, which stores the run's name at each service, is unreadable."""


def check(names: Sequence[str], *, asked: bool = False) -> None:
    """Raises ValueError for a tracker whose package is not installed.

    asked: the user named these trackers, so the default must be installed too.
    """
    for name in names:
        if (asked or name != DEFAULT) and importlib.util.find_spec(TRACKERS[name]) is None:
            raise ValueError(f"log.trackers={tuple(names)}: {name} needs {extras.remedy(name)}")


def open_all(
    names: Sequence[str], workdir: str | os.PathLike[str], start_step: int, config: dict[str, Any]
) -> list[Tracker]:
    """Opens the trackers of a run that starts or resumes at `start_step`.

    config: the run's config as JSON values, for trackers that display it.

    Raises ValueError for a package that is not installed and for a tracker that cannot be opened
    when a run starts. On a resume, such a tracker is skipped with a warning.
    """
    check(names)
    found: list[Tracker] = []
    for name in names:
        if importlib.util.find_spec(TRACKERS[name]) is None:
            logging.info("%s is not installed: metrics go to metrics.jsonl only.", TRACKERS[name])
            continue
        maker = importlib.import_module(f"coca_jax.training.trackers.{name}").open_run
        try:
            found.append(FaultTolerant(name, maker(workdir, start_step, config)))
        except DamagedNames:
            raise
        except Exception as error:  # server, network or login; some raise ValueError
            if not start_step:
                raise ValueError(
                    f"log.trackers={tuple(names)}: cannot open {name} ({error}). Fix that, or "
                    "remove it from log.trackers"
                ) from error
            logging.warning("%s: cannot open (%s). Training continues without it.", name, error)
    return found


class FaultTolerant:
    """Stops using a tracker after its first failure, and never raises."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker = name, tracker
        self._failed = False

    def _try(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # server, network or full disk
            self._failed = True
            logging.warning(
                "%s: stopped after an error (%s). metrics.jsonl still has all metrics.",
                self._name,
                error,
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        self._try(lambda: self._tracker.write(step, values))

    def flush(self) -> None:
        """See Tracker."""
        self._try(self._tracker.flush)

    def close(self) -> None:
        """See Tracker."""
        self._try(self._tracker.close)


def run_name(workdir: str | os.PathLike[str], tracker: str) -> str:
    """The run's name at a service, '<folder>-<8 hex digits>'.

    It is stored in the workdir, so a resumed run keeps its name, and a new run in a folder of the
    same name gets another one. Raises DamagedNames if trackers.json is damaged.
    """
    folder = storage.place(workdir)
    file = folder / NAMES_FILE
    try:
        names = bounded_json.parse(file.read_bytes()) if file.exists() else {}
    except ValueError as error:
        raise DamagedNames(
            f"{file} is damaged ({error}); restore it, or delete it to start a new run in {tracker}"
        ) from None
    if tracker not in names:
        start = _NOT_IN_ID.sub("-", folder.name.encode(errors="replace").decode())[:_MAX_FOLDER]
        names[tracker] = f"{start}-{uuid.uuid4().hex[:8]}"
        storage.write_text(file, json.dumps(names, indent=1) + "\n")
    return names[tracker]
