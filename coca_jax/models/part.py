"""What a module says of the parameters of its parts, beside the axes that it gives to each."""

from __future__ import annotations

import dataclasses

# What a parameter works for. A run that has none of it leaves the parameter alone.
SERVES = ("image", "decoding", "captioning", "contrastive", "head", "words", "tokens")
BOTTOM, STACK, TOP = "bottom", "stack", "top"  # where in its tower: below, in or above the layers


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model, by its place in the tree of parameters.

    serves: of SERVES. tower: whose layers it lies below, in or above (`place`), '' for none; towers
    are what layer decay counts. optional: weights to start from may lack it. wide: it is computed
    in float32 in any case. positions: how positions are fitted to another size: 'grid' or 'text'.
    captions_alone: no embedding depends on it, only captions do.
    """

    serves: str
    tower: str = ""
    place: str = TOP
    optional: bool = False
    wide: bool = False
    positions: str = ""
    captions_alone: bool = False
