"""What a module says of the parameters of its parts, beside the axes that it gives to each."""

from __future__ import annotations

import dataclasses

BOTTOM, STACK, TOP = "bottom", "stack", "top"  # where in its tower: below, in or above the layers


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model, by its place in the tree of parameters.

    serves: what it works for ("image", "text", "words" ...), as losses name what they train: a
    run none of whose losses does leaves it alone. tower: whose layers it lies below, in or above
    (`place`), '' for none; towers are what layer decay counts. optional: weights to start from may
    lack it. aid: a loss alone reads it, so that weights for other programs leave it out. wide: it
    is computed in float32 in any case. positions: how positions are fitted to another size: 'grid'
    or 'text'.
    """

    serves: str
    tower: str = ""
    place: str = TOP
    optional: bool = False
    aid: bool = False
    wide: bool = False
    positions: str = ""
