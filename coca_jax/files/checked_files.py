"""Files beside a configuration that says what they hold: damage is never taken for contents.

The configuration has `{"files": {name: {"bytes": ..., "crc32": ...}}}` and is sealed itself (see
sealed_json.py). CRC-32 sees every damage of up to 32 bits in a row for sure and one of 2^32 others
not; it reads 3 GB a second, SHA-256 a tenth to a quarter of it. It protects from accidents, not
from people: those can write a checksum too.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from typing import Any

from etils import epath

from coca_jax.files import storage

KEY = "files"
_CHUNK = 1 << 20


def is_name(name: Any) -> bool:
    """Whether it is the name of a file beside another: a string that leads nowhere else."""
    plain = isinstance(name, str) and name not in ("", ".", "..")
    return plain and not set(name) & set("/\\:\0")


def describe(folder: str | os.PathLike[str], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the files of a folder hold, for its configuration under KEY."""
    return {name: _contents(storage.place(folder) / name) for name in sorted(names)}


def listed(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of files, by name; {} where it says nothing that is known here."""
    files = config.get(KEY)
    return files if isinstance(files, dict) else {}


def check(folder: str | os.PathLike[str], config: dict[str, Any], name: str) -> None:
    """Compares a file of the folder with what the configuration says; one of an older version, or
    of somebody else, says nothing.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it holds something else.
    """
    wanted = listed(config).get(name)
    if wanted is None:
        return
    path = storage.place(folder) / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; write or download the folder again")
    found = _contents(path)
    if found != wanted:
        raise ValueError(
            f"{path} is damaged: its {found['bytes']} bytes are not those that were written "
            "(another checksum); write or download it again"
        )


def _contents(path: epath.Path) -> dict[str, Any]:
    size, checksum = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return dict(bytes=size, crc32=f"{checksum:08x}")
