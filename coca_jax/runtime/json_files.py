"""JSON files that carry a checksum of their contents: damage is never taken for contents."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from typing import Any

from etils import epath

from coca_jax.runtime import bounded_json, storage

SEAL_KEY = "sha256_of_the_rest"


def seal(data: dict[str, Any]) -> dict[str, Any]:
    """`data`, as JSON would give it back, with its checksum under KEY."""
    data = json.loads(json.dumps(data, default=list))
    return data | {SEAL_KEY: _seal_of(data)}


def write_sealed(path: str | os.PathLike[str], data: dict[str, Any]) -> None:
    """Writes the sealed data; the file is there whole or not at all. A folder or a bucket."""
    storage.write_text(path, json.dumps(seal(data), indent=1) + "\n")


def read_sealed(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What was written, without the checksum.

    Raises ValueError for a file that is not a JSON object, or whose checksum does not match.
    """
    try:
        data = bounded_json.loads(storage.place(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error})") from None
    return unseal(data, str(path))


def unseal(data: Any, name: str) -> dict[str, Any]:
    """The inverse of `seal`. Raises ValueError as `read` does; name: of the file, for the text."""
    if not isinstance(data, dict):
        raise ValueError(f"{name} is damaged: it is no JSON object")
    data = dict(data)
    sealed = data.pop(SEAL_KEY, None) or _renamed_seal(data)
    if sealed is not None and sealed != _seal_of(data):
        raise ValueError(
            f"{name} is damaged, or was changed by hand: its checksum does not match (if the "
            f"change is meant, delete the line {SEAL_KEY!r})"
        )
    return data


def _renamed_seal(data: dict[str, Any]) -> str | None:
    """A value that no checksum equals, if a checksum of the rest stands under another name: the
    damage is in SEAL_KEY itself."""
    for key, value in data.items():
        if isinstance(value, str) and len(value) == 64:
            if value == _seal_of({name: data[name] for name in data if name != key}):
                return "damaged"
    return None


def _seal_of(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# Files beside a configuration that says what they hold: damage is never taken for contents.
#
# The configuration has `{"files": {name: {"bytes": ..., "crc32": ...}}}` and is sealed itself (see
# above). CRC-32 sees every damage of up to 32 bits in a row for sure and one of 2^32 others
# not; it reads 3 GB a second, SHA-256 a tenth to a quarter of it. It protects from accidents, not
# from people: those can write a checksum too.


FILES_KEY = "files"
_CHUNK = 1 << 20


def is_name(name: Any) -> bool:
    """Whether it is the name of a file beside another: a string that leads nowhere else."""
    plain = isinstance(name, str) and name not in ("", ".", "..")
    return plain and not set(name) & set("/\\:\0")


def describe_files(
    folder: str | os.PathLike[str], names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """What the files of a folder hold, for its configuration under KEY."""
    return {name: _contents(storage.place(folder) / name) for name in sorted(names)}


def listed_files(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of files, by name; {} where it says nothing that is known here."""
    files = config.get(FILES_KEY)
    return files if isinstance(files, dict) else {}


def check_files(folder: str | os.PathLike[str], config: dict[str, Any], name: str) -> None:
    """Compares a file of the folder with what the configuration says. The configuration of a folder
    that another program wrote says nothing.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it holds something else.
    """
    wanted = listed_files(config).get(name)
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
