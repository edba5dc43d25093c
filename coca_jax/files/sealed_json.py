"""JSON files that carry a checksum of their contents: damage is never taken for contents."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from coca_jax.data import bounded_json
from coca_jax.files import storage

KEY = "sha256_of_the_rest"


def seal(data: dict[str, Any]) -> dict[str, Any]:
    """`data`, as JSON would give it back, with its checksum under KEY."""
    data = json.loads(json.dumps(data, default=list))
    return data | {KEY: _checksum(data)}


def write(path: str | os.PathLike[str], data: dict[str, Any]) -> None:
    """Writes the sealed data; the file is there whole or not at all. A folder or a bucket."""
    storage.write_text(path, json.dumps(seal(data), indent=1) + "\n")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What was written, without the checksum; files of older versions have none.

    Raises ValueError when the file is no JSON object or its checksum is another one.
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
    sealed = data.pop(KEY, None) or _renamed_seal(data)
    if sealed is not None and sealed != _checksum(data):
        raise ValueError(
            f"{name} is damaged, or was changed by hand: its checksum does not match (if the "
            f"change is meant, delete the line {KEY!r})"
        )
    return data


def _renamed_seal(data: dict[str, Any]) -> str | None:
    """Something that is no checksum of anything, where a checksum of the rest stands under another
    name: it is KEY that was damaged."""
    for key, value in data.items():
        if isinstance(value, str) and len(value) == 64:
            if value == _checksum({name: data[name] for name in data if name != key}):
                return "damaged"
    return None


def _checksum(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
