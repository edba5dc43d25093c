"""What an evaluation has finished when it is killed: eval_progress.json, while it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from coca_jax.evaluators import results
from coca_jax.evaluators.writing import Writing
from coca_jax.files import storage
from coca_jax.inference import model_checksum


class Unfinished:
    """What an evaluation has finished, in workdir/eval_progress.json until all of it is.

    Args:
      workdir: made when missing.
      request: what the scores depend on besides the task; a file of another request is dropped.
      write: does it on one process. All call all of this, and raise NotWritten together.

    Attributes:
      request: as the file has it, whose checksum may be of an older kind.
    """

    def __init__(self, workdir: str, request: Mapping[str, Any], write: Writing):
        self._path = storage.place(workdir) / "eval_progress.json"
        self._once = write
        write(lambda: self._begin(request))
        write.agree()
        if not write.main_process and not self._path.exists():
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
        """Notes that a task is finished; what could not be written of it ends the rest."""
        self._state["tasks"][task] = dict(scores)
        self._once(self._keep)
        self._once.agree()

    def close(self) -> None:
        """All is finished, and all have read the file: the next start begins anew."""
        self._once.agree()
        self._once(self._drop)

    def _is_mine(self) -> bool:
        """False where another evaluation of these weights has begun since, whose file it is now;
        or has finished."""
        return self._found().get("request") == self._state["request"]

    def _found(self) -> dict[str, Any]:
        try:
            return results.kept(self._path, request=dict, started=int, tasks=dict)
        except FileNotFoundError:  # another evaluation has just finished
            return {}

    def _begin(self, request: Mapping[str, Any]) -> None:
        if not model_checksum.same_request(self._found().get("request"), request):
            self._write(dict(request=dict(request), started=time.time_ns(), tasks={}))

    def _keep(self) -> None:
        if self._is_mine():
            self._write(self._state)

    def _drop(self) -> None:
        if self._is_mine():
            self._path.unlink(missing_ok=True)

    def _write(self, state: Mapping[str, Any]) -> None:
        storage.write_text(self._path, json.dumps(state))
