"""All processes of a run have one command, one code, one workdir and one data set, or none trains.

What differs would be no error of the collectives' own: they add up gradients of different losses,
or wait for ever for a file that another process has written elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

import coca_jax
from coca_jax.checkpoints import config_file
from coca_jax.runtime import multihost, signals, storage

FILE = "processes.token"  # in the workdir while the processes look for it
# NFS may take a folder for missing for a minute after another machine has made it.
SEEN_WITHIN = 75.0  # seconds
FREE = ("workdir", "data.num_threads")  # spelled otherwise, and a machine's cores, do no harm
_LONG = 80  # letters of a value that a message shows


def on_command(
    settings: Mapping[str, Any], workdir: str, given: Mapping[str, str] | None = None
) -> None:
    """Before anything is written or computed: that config, code and workdir are those of process 0.

    settings: of the config (`to_dict`); given: {flag: value} of the command's other flags. Raises ValueError on all processes,
    naming the first one and what differs.
    """
    if jax.process_count() == 1:
        return
    with _token(workdir) as token:
        mine = _keys(settings, workdir) | _code() | dict(given or {})
        first = json.loads(multihost.from_first("command", json.dumps([workdir, token, mine])))
        line = multihost.difference(first[2], mine) or _elsewhere(workdir, *first[:2])
        found = multihost.agreed("command", line)
    multihost.from_first("command", "")  # what is made in the workdir now, the token does not take
    if found:
        raise multihost.KnownToAll(found)


def on_data(contents: Mapping[str, Any], workdir: str, num_examples: int) -> None:
    """Before the first step: that the data, the vocabulary and the classes are those of process 0,
    wherever they lie. contents: of config.json. Raises as `on_command`."""
    if jax.process_count() == 1:
        return
    mine = _keys(contents, workdir) | {"examples of the data": str(num_examples)}
    multihost.compare("data", mine)


@contextlib.contextmanager
def _token(workdir: str) -> Iterator[str]:
    """Inside, process 0 has a file in the workdir, that holds the text which it gets here. A folder
    that is new goes with it: what is refused leaves none."""
    if jax.process_index():
        yield ""
        return
    path, token = storage.place(workdir) / FILE, uuid.uuid4().hex
    new = not storage.is_remote(path) and not path.parent.exists()

    def remove() -> None:
        with contextlib.suppress(OSError):
            path.unlink()
            if new:
                os.rmdir(path.parent)

    storage.write_text(path, token)
    signals.before_leaving(remove)
    try:
        yield token
    finally:
        signals.not_before_leaving(remove)
        remove()


def _elsewhere(workdir: str, first: str, token: str) -> str:
    """What is wrong where process 0, whose workdir is `first`, has no file with `token` in this
    one; '' otherwise."""
    path, end = storage.place(workdir) / FILE, time.monotonic() + SEEN_WITHIN
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == token:
                return ""
        if time.monotonic() > end:
            return (
                f"{workdir} of process {jax.process_index()} is not the folder of process 0 "
                f"({first}): the workdir must be shared by all processes, or lie in a bucket"
            )
        time.sleep(0.5)


def _keys(contents: Mapping[str, Any], workdir: str) -> dict[str, str]:
    """{'data.sources[0].path': text} of a config or of config.json's contents, long values by
    their digest. Sources in the workdir are named within it."""
    found: dict[str, str] = {}

    def add(name: str, value: Any) -> None:
        if name in FREE:
            return
        if name == "data.sources":
            value = config_file.compared(name, value, workdir)
        if isinstance(value, Mapping):
            for key in value:
                add(f"{name}.{key}" if name else str(key), value[key])
        elif isinstance(value, Sequence) and any(isinstance(one, Mapping) for one in value):
            for number, one in enumerate(value):
                add(f"{name}[{number}]", one)
        else:
            text = json.dumps(value, default=list)
            short = f"{text[:_LONG]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"
            found[name] = text if len(text) <= _LONG else short

    add("", contents)
    return found


def _code() -> dict[str, str]:
    """What computes: the versions, and a digest of this package, of which a clone may be stale."""
    folder, digest = pathlib.Path(coca_jax.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)} ".encode() + path.read_bytes())
    version = f"{coca_jax.__version__} (its files: sha256 {digest.hexdigest()[:12]})"
    return {"the version of coca_jax": version, "the version of jax": jax.__version__}
