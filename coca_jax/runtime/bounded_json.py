"""JSON objects of strangers: bounded in size and depth, and objects, not whatever JSON allows."""

from __future__ import annotations

import json
from typing import Any

MAX_BYTES = 4 << 20


def loads(text: str | bytes) -> Any:
    """Any JSON value. Raises ValueError: it is none, or too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


def parse(data: bytes, most: int = MAX_BYTES) -> dict[str, Any]:
    """A JSON object, behind a byte order mark or not.

    Raises:
        UnicodeDecodeError: not UTF-8.
        ValueError: not a JSON object, larger than `most` bytes, or too deep.
    """
    if len(data) > most:
        raise ValueError(f"JSON of {len(data)} bytes, limit {most}")
    found = loads(data.decode("utf-8-sig"))
    if not isinstance(found, dict):
        raise ValueError(f"not a JSON object, but a {type(found).__name__}")
    return found
