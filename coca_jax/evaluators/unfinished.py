"""What an evaluation has finished when it is killed: eval_progress.json, while it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from coca_jax import storage
from coca_jax.evaluators import results
from coca_jax.inference import model_checksum


class Unfinished:
    """What an evaluation has finished, in workdir/eval_progress.json until all of it is.

    Args:
      workdir: made when missing.
      request: what the scores depend on besides the task; a file of another request is dropped.
      main_process: the one that writes.

    Attributes:
      request: as the file has it, whose checksum may be of an older kind.
    """

    def __init__(self, workdir: str, request: Mapping[str, Any], *, main_process: bool):
        self._path = storage.place(workdir) / "eval_progress.json"
        self._main = main_process
        if main_process:
            if not model_checksum.same_request(self._found().get("request"), request):
                self._write(dict(request=dict(request), started=time.time_ns(), tasks={}))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("coca_jax evaluate")
            if not self._main and not self._path.exists():
                raise ValueError(
                    f"{self._path} of process 0 is not here: the folder of the scores must be "
                    "shared by all processes, or lie in a bucket"
                )
        self._state = json.loads(self._path.read_text())
        self.request: dict[str, Any] = self._state["request"]
        self.started: int = self._state["started"]

    def scores(self, task: str) -> dict[str, float] | None:
        """The scores of a task that is finished, else None."""
        return self._state["tasks"].get(task)

    def add(self, task: str, scores: Mapping[str, float]) -> None:
        """Notes that a task is finished."""
        self._state["tasks"][task] = dict(scores)
        if self._main and self._is_mine():
            self._write(self._state)

    def close(self) -> None:
        """All is finished: the next start begins anew."""
        if jax.process_count() > 1:  # all of which have read the file by then
            multihost_utils.sync_global_devices("coca_jax evaluated")
        if self._main and self._is_mine():
            self._path.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        """False where another evaluation of these weights has begun since, whose file it is now;
        or has finished."""
        return self._found().get("request") == self._state["request"]

    def _found(self) -> dict[str, Any]:
        try:
            return results.kept(self._path, request=dict, started=int, tasks=dict)
        except FileNotFoundError:  # another evaluation has just finished
            return {}

    def _write(self, state: Mapping[str, Any]) -> None:
        storage.write_text(self._path, json.dumps(state))
