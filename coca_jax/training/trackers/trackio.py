"""trackio, a tracker that lives on this machine: `trackio show` draws it. TRACKIO_PROJECT names the
project, TRACKIO_SPACE_ID a Space that shows it too, TRACKIO_DIR the folder of its database."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import trackio

from coca_jax.training import trackers


class Trackio:
    """A run of trackio, the same one when the run goes on; steps that are done again are there
    twice, with the same values."""

    def __init__(self, workdir: str | os.PathLike[str], config: dict[str, Any]):
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "coca_jax"),
            name=trackers.run_name(workdir, "trackio"),
            resume="allow",
            config=config,
            space_id=os.environ.get("TRACKIO_SPACE_ID") or None,
            embed=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A step's metrics; those that are not finite are left out."""
        self._run.log({k: v for k, v in values.items() if math.isfinite(v)}, step=step)

    def flush(self) -> None:
        """trackio writes from a thread of its own, which `close` waits for."""

    def close(self) -> None:
        """Waits until all is in the database."""
        self._run.finish()


def open_run(workdir: str | os.PathLike[str], start_step: int, config: dict[str, Any]) -> Trackio:
    """A run of trackio with the run's config."""
    return Trackio(workdir, config)
