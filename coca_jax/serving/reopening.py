"""An index that is served while others write to its folder."""

from __future__ import annotations

import time
from typing import Any

from absl import logging
from starlette.concurrency import run_in_threadpool

from coca_jax.files import storage
from coca_jax.searching.index import Index, stamp

SECONDS = 5.0  # between two looks at the folder


class Reopened:
    """An index, opened again where its folder has changed.

    index: a searching.index.Index, or None; model: what made it.
    """

    def __init__(self, index: Any, model: Any):
        self._index, self._model = index, model
        self._stamp = getattr(index, "stamp", None)
        self._looked = time.monotonic()

    async def now(self) -> Any:
        """The index as it is now, or was some seconds ago; None for none. While a changed one is
        read, and where it cannot be, other requests get the one before."""
        if self._index is not None and time.monotonic() - self._looked >= SECONDS:
            self._looked = time.monotonic()
            await run_in_threadpool(self._look)
        return self._index

    def _look(self) -> None:
        folder, found = self._index.folder, self._stamp
        try:
            with storage.as_os_error(folder, "cannot be read"):
                found = stamp(folder)
                if found in (None, self._stamp):
                    return
                index = Index(folder)
            index.check(self._model)
            self._index = index
        except (OSError, ValueError) as error:
            logging.warning("--index is served as it was before it changed: %s", error)
            if isinstance(error, OSError):  # the same folder may be read at the next look
                return
        self._stamp = found
