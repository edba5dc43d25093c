"""The texts that a field of somebody's data holds, in whichever of the usual shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

INNER_TEXTS = ("raw", "caption", "text", "sentence")  # where an object in a field has its text
INNER_LABELS = ("name", "label")


def strings(value: Any, inner: Sequence[str] = INNER_TEXTS) -> list[str]:
    """A field that holds one text, a list of them, or texts by name (of a language), or nothing. Of
    an object that says more about a text, only the text counts.

    inner: names, of which the first that an object has is its text.

    Raises:
        ValueError: an object has none of these names, and not only texts.
    """
    if value is None:
        return []
    if isinstance(value, Mapping):
        name = next((name for name in inner if value.get(name) is not None), None)
        if name is None and not all(map(_is_text, value.values())):
            there = ", ".join(sorted(map(str, value)))
            raise ValueError(f"an object of {there}: none of them is called {' or '.join(inner)}")
        found = value.values() if name is None else [value[name]]
        return [text for one in found for text in strings(one, inner)]
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in strings(one, inner)]
    if isinstance(value, float) and value != value:  # NaN: how tables say 'nothing'
        return []
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return [text] if text.strip() else []


def _is_text(value: Any) -> bool:
    """Whether a value is a text, a list of texts, or nothing."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(one is None or one != one or isinstance(one, (str, bytes)) for one in values)
