"""What a --data flag says: PATH[:KIND[:WEIGHT]]."""

from __future__ import annotations

import dataclasses

from coca_jax.data import files, kinds


@dataclasses.dataclass(frozen=True)
class Named:
    """What one flag says. kind '': as the data tell."""

    path: str
    kind: str = ""
    weight: float = 1.0


def parse(text: str) -> Named:
    """PATH, PATH:KIND or PATH:KIND:WEIGHT; read from the right, as URLs and paths have colons.

    Raises ValueError for an unknown kind behind a path that is there, or a weight that is
    not above 0, or not finite.
    """
    path, kind, weight = text, "", 1.0
    before, _, last = text.rpartition(":")
    earlier, _, middle = before.rpartition(":")
    if middle in kinds.KINDS and _is_number(last):
        path, kind, weight = earlier, middle, float(last)
    elif last in kinds.KINDS:
        path, kind = before, last
    elif before and files.exists(before) and not files.exists(text):
        raise ValueError(
            f"--data={text}: {last!r} is none of {', '.join(kinds.KINDS)}; write PATH, "
            "PATH:KIND or PATH:KIND:WEIGHT"
        )
    if not path:
        raise ValueError(f"--data={text}: it names no path; write PATH, PATH:KIND:WEIGHT ...")
    if not 0 < weight < float("inf"):
        raise ValueError(f"--data={text}: the weight is a share of the batch, above 0 and finite")
    return Named(path, kind, weight)


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False
