"""Event files for TensorBoard, in workdir/tensorboard, through tensorboardX (no TensorFlow)."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from coca_jax.runtime import growing_file, storage


@contextlib.contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Inside, an import of the packages finds nothing, as where they are not installed."""
    held = {name: sys.modules[name] for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(held)


# tensorboardX imports them where they are there: seconds and memory for nothing
with _hidden("torch", "boto3", "botocore", "google.cloud.storage"):
    from tensorboardX import record_writer
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2

SCHEME = "coca_jax"  # tensorboardX opens paths by what is before their first colon


class _Files:
    """Files as `storage` writes them: a local one is seen at once, one in a bucket grows by whole
    copies, with the credentials of the run's other files."""

    def open(self, path: str) -> growing_file.Growing:
        return growing_file.Growing(path.removeprefix(f"{SCHEME}:"))

    def directory_check(self, path: str) -> None:
        """Folders are made with their first file."""


record_writer.register_writer_factory(SCHEME, _Files())


class TensorBoard:
    """An event file. Earlier files of a run keep steps that it now does again: TensorBoard is told
    to drop those."""

    def __init__(self, workdir: str | os.PathLike[str], start_step: int):
        folder = storage.place(workdir) / "tensorboard"
        # The time in a file's name has whole seconds: two starts in one must not share a file.
        suffix = f".{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self._events = EventsWriter(f"{SCHEME}:{folder}/events", suffix)
        if start_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.SessionStatus.Value("START"))
            self._events.write_event(event_pb2.Event(step=start_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """An event with a scalar a metric."""
        value = summary_pb2.Summary.Value
        found = [value(tag=name, simple_value=number) for name, number in values.items()]
        summary = summary_pb2.Summary(value=found)
        event = event_pb2.Event(step=step, summary=summary, wall_time=time.time())
        self._events.write_event(event)

    def flush(self) -> None:
        """Returns when the file holds all of it."""
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._events.close()


def open_run(
    workdir: str | os.PathLike[str], start_step: int, config: dict[str, Any]
) -> TensorBoard:
    """A run's event file; the config is not shown."""
    return TensorBoard(workdir, start_step)
