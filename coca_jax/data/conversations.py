"""Conversations about an image, as sets for chat models have them: LLaVA's and ShareGPT4V's
`conversations`, turns of {from, value}, or the `messages` of others, turns of {role, content}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TURNS = (("from", "value"), ("role", "content"))  # who speaks, what is said
_ANSWERS = ("gpt", "assistant", "model")


def is_conversation(value: Any) -> bool:
    """Whether a field is a list of turns, each with a speaker and what is said."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return any(
        all(isinstance(turn, Mapping) and turn.keys() >= {*names} for turn in value)
        for names in _TURNS
    )


def answer(turns: Any) -> Any:
    """What the model of a conversation says first, which is the caption: later turns ask about
    parts of the image. A text, or a list of the texts among its parts.

    Raises:
        ValueError: no turn is the model's.
    """
    who, said = next(names for names in _TURNS if turns[0].keys() >= {*names})
    found = next((turn[said] for turn in turns if turn[who] in _ANSWERS), None)
    if found is None:
        there = " and ".join(dict.fromkeys(str(turn[who]) for turn in turns))
        raise ValueError(f"a conversation of {there}, without an answer of {', '.join(_ANSWERS)}")
    if isinstance(found, (list, tuple)):
        return [part.get("text") if isinstance(part, Mapping) else part for part in found]
    return found
