"""Where a run's metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio.

Each is a file here with a class that has `write`, `flush` and `close`, and an extra of setup.py of
the same name. `config.log.trackers` names those of a run. metrics.jsonl is what resuming and the
report read: a tracker that fails is said and left, the run goes on.
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

from coca_jax.runtime import bounded_json, extras, storage
from coca_jax.runtime.metric_log import Tracker

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
UNASKED = "tensorboard"  # the default of a run: written where its package is there
NAMES_FILE = "trackers.json"
_NO_ID = re.compile(r"[^\w.-]")  # W&B refuses some of these in an id, as : # % and ?
_LONGEST = 100  # letters of a folder's name in an id, which has 128 at most


class DamagedNames(ValueError):
    """The file that keeps what services call a run cannot be read."""


def check(names: Sequence[str], *, asked: bool = False) -> None:
    """Raises ValueError for a tracker that was asked for and whose package is not installed.

    asked: the user named them all, the default too.
    """
    for name in names:
        if (asked or name != UNASKED) and importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(f"log.trackers={tuple(names)}: {name} needs {extras.remedy(name)}")


def open_all(
    names: Sequence[str], workdir: str | os.PathLike[str], start_step: int, config: dict[str, Any]
) -> list[Tracker]:
    """The trackers of a run that starts or resumes from `start_step`.

    config: of the run, as JSON holds it, shown by those that show one. TensorBoard is left out,
    with a line of the log, where its package is missing; one that cannot be opened, as without a
    network, where a run goes on. Raises ValueError as `check`, and for one that cannot be opened
    when a run begins.
    """
    check(names)
    found: list[Tracker] = []
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            logging.info("%s is not installed: metrics go to metrics.jsonl only.", PACKAGES[name])
            continue
        maker = importlib.import_module(f"coca_jax.training.trackers.{name}").open_run
        try:
            found.append(Careful(name, maker(workdir, start_step, config)))
        except DamagedNames:
            raise
        except Exception as error:  # of a server, a network, a login; some are ValueErrors
            if not start_step:
                raise ValueError(
                    f"log.trackers={tuple(names)}: {name} cannot be opened ({error}); mend that, "
                    "or leave it out"
                ) from error
            logging.warning("%s takes no metrics of this run (%s): it goes on", name, error)
    return found


class Careful:
    """A tracker whose failures end it and nothing else."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker = name, tracker
        self._failed = False

    def _try(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # of a server, a network, a full disk
            self._failed = True
            logging.warning(
                "%s takes no more metrics of this run (%s); metrics.jsonl has all of them",
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
    """What a service calls this run, '<folder>-<8 digits>': kept in the workdir, so that a run that
    goes on is the same one there, and a new run in a folder of the same name is another. Raises
    DamagedNames where the file that keeps it is damaged."""
    folder = storage.place(workdir)
    file = folder / NAMES_FILE
    try:
        names = bounded_json.parse(file.read_bytes()) if file.exists() else {}
    except ValueError as error:
        raise DamagedNames(
            f"{file} is damaged ({error}); restore it, or delete it: {tracker} then takes this run "
            "for a new one"
        ) from None
    if tracker not in names:
        start = _NO_ID.sub("-", folder.name.encode(errors="replace").decode())[:_LONGEST]
        names[tracker] = f"{start}-{uuid.uuid4().hex[:8]}"
        storage.write_text(file, json.dumps(names, indent=1) + "\n")
    return names[tracker]
