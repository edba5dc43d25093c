"""The fields of somebody's data: the texts in one, in whichever of the usual shapes, and which
values it has where records are selected by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coca_jax.data.sources import conversations

INNER_TEXTS = ("raw", "caption", "text", "sentence")  # where an object in a field has its text
INNER_LABELS = ("name", "label")


def strings(value: Any, inner: Sequence[str] = INNER_TEXTS) -> list[str]:
    """A field that holds one text, a list of them, or texts by name (of a language), or nothing. Of
    an object that says more about a text, only the text counts; of a conversation the first answer.

    inner: names, of which the first that an object has is its text.

    Raises:
        ValueError: an object has none of these names, and not only texts; or as
            `conversations.answer`.
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
    if conversations.is_conversation(value):
        return strings(conversations.answer(value), inner)
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in strings(one, inner)]
    if isinstance(value, float) and value != value:  # NaN: how tables say 'nothing'
        return []
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return [text] if text.strip() else []


def values_of(
    field: str, extra: Mapping[str, Any], texts: Sequence[str], labels: Sequence[str]
) -> list[Any]:
    """The values by which a record is selected: of a field in `extra`, else its labels as 'label'
    and its texts as 'text'; [None] for none."""
    own = dict(label=labels, text=texts).get(field, ()) if field not in extra else ()
    value = list(own) or extra.get(field)
    return value if isinstance(value, list) else [value]


def wanted_values(wanted: Any) -> list[Any]:
    """The values of a field of `where`, which has one, None among them, or several."""
    return list(wanted) if isinstance(wanted, (list, tuple, set, frozenset)) else [wanted]


def selected(
    where: Mapping[str, Any], extra: Mapping[str, Any], texts: Sequence[str], labels: Sequence[str]
) -> bool:
    """Whether each field of `where` has a value, or one of the values, that it wants: 2020 is
    '2020', and true 'True'."""
    for field, wanted in where.items():
        allowed = wanted_values(wanted)
        values = values_of(field, extra, texts, labels)
        spelled = {_spelled(v) for v in allowed}
        if not any(v in allowed or _spelled(v) in spelled for v in values):
            return False
    return True


def _spelled(value: Any) -> str:
    """A value as CSV has it, where all are texts; 'TRUE' and 'False' in lower case."""
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else text


def _is_text(value: Any) -> bool:
    """Whether a value is a text, a list of texts, or nothing."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(one is None or one != one or isinstance(one, (str, bytes)) for one in values)
