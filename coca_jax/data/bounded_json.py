"""JSON objects of strangers: bounded in size and depth, and objects, not whatever JSON allows."""

from __future__ import annotations

import json
from typing import Any

MAX_BYTES = 4 << 20


def parse(data: bytes, most: int = MAX_BYTES) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UnicodeDecodeError: not UTF-8.
        ValueError: not a JSON object, larger than `most` bytes, or too deep.
    """
    if len(data) > most:
        raise ValueError(f"JSON of {len(data)} bytes, limit {most}")
    try:
        found = json.loads(data.decode())
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError(f"not a JSON object, but a {type(found).__name__}")
    return found
