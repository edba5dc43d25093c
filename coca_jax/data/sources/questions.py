"""Questions about an image and their answers, as a record holds them."""

from __future__ import annotations

import json
from typing import Any

from coca_jax.data.sources.records import Record, json_text

Asked = tuple[str, tuple[str, ...]]  # a question and its answers


def questions_of(record: Record, field: str) -> list[Asked]:
    """The questions of a record: those that a field of its `extra` lists as {question, answer}, one
    answer or several; with field '' its texts, which its labels answer.

    Raises:
        ValueError: naming the record, whose field lists something else.
    """
    if not field:
        return [(text, record.labels) for text in record.texts if record.labels]
    found = json.loads(record.extra).get(field) or []
    try:
        pairs = [(item["question"], item["answer"]) for item in found]
    except (KeyError, TypeError):
        raise ValueError(
            f"field {field!r} of {record.key!r} must list {{question, answer}} objects"
        ) from None
    asked = [
        (_text(q), tuple(filter(None, map(_text, a if isinstance(a, list) else [a]))))
        for q, a in pairs
    ]
    return [(question, answers) for question, answers in asked if question and answers]


def _text(value: Any) -> str:
    """'' where nothing is said: null, or blanks alone."""
    text = "" if value is None else json_text(value)
    return text if text.strip() else ""
