"""Warnings that a command repeats next to its result: others have scrolled away by then."""

from __future__ import annotations

_notes: list[str] = []


def add(line: str) -> None:
    """The line is shown again with the command's result, once."""
    if line not in _notes:
        _notes.append(line)


def take() -> list[str]:
    """All lines since the last call."""
    found = _notes.copy()
    _notes.clear()
    return found
