"""Conversations about an image, as sets for chat models have them: LLaVA's and ShareGPT4V's
`conversations`, turns of {from, value}, or the `messages` of others, turns of {role, content}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TURNS = (("from", "value"), ("role", "content"))  # who speaks, what is said
_ANSWERS = ("gpt", "assistant", "model")


def is_conversation(value: Any) -> bool:
    """Whether a field is a list of turns, each with a speaker and what is said."""
    return isinstance(value, (list, tuple)) and bool(value) and _names(value) is not None


def _names(turns: Sequence[Any]) -> tuple[str, str] | None:
    """What all turns call the speaker and what is said."""
    for names in _TURNS:
        if all(isinstance(turn, Mapping) and turn.keys() >= {*names} for turn in turns):
            return names
    return None


def answer(turns: Sequence[Mapping[str, Any]]) -> Any:
    """What the model of a conversation says first, which is the caption: later turns ask about
    parts of the image. A text, or a list of the texts among its parts.

    Raises:
        ValueError: it is no conversation, or no turn is the model's.
    """
    names = _names(turns)
    if names is None:
        raise ValueError(f"no conversation: not all of {len(turns)} turns say who speaks")
    who, said = names
    found = next((turn[said] for turn in turns if turn[who] in _ANSWERS), None)
    if found is None:
        there = " and ".join(dict.fromkeys(str(turn[who]) for turn in turns))
        raise ValueError(f"a conversation of {there}, without an answer of {', '.join(_ANSWERS)}")
    if isinstance(found, (list, tuple)):
        return [part.get("text") if isinstance(part, Mapping) else part for part in found]
    return found
