"""What tells the families of image and text towers apart (`config.model.family`).

This file alone parses that name; all else asks the kind. The family 'coca' is none of them: it has
a decoder.
"""

from __future__ import annotations

import dataclasses

CLASS, MEAN, QUERY = "class", "mean", "query"


@dataclasses.dataclass(frozen=True)  # modules that hold equal kinds are equal
class TowerKind:
    """A family of towers.

    Attributes:
        name: in config.model.family.
        about: whose weights they are.
        causal: whether a text's token sees only itself and what is before, and the end symbol's
            state is the text's; else all see each other, and the state at the last place is.
        text_bias: whether the projection behind a text's state has a bias.
        pool: what of the image's tokens is the image: CLASS, the class token behind a norm; MEAN,
            the mean of the others behind a norm; QUERY, what one learned query finds.
        projection: whether one leads from there to the embedding, ...
        image_bias: ... and whether it has a bias.
        begins, ends: whether a text has a begin and an end symbol.
        cleaned: whether texts are put in lower case, and more (config.model.clean).
    """

    name: str
    about: str
    causal: bool
    text_bias: bool
    pool: str
    projection: bool = True
    image_bias: bool = False
    begins: bool = True
    ends: bool = True
    cleaned: bool = False


KINDS: dict[str, TowerKind] = {
    kind.name: kind
    for kind in (
        TowerKind("clip", "CLIP, MetaCLIP", True, False, CLASS),
        TowerKind(
            *("siglip", "SigLIP", False, True, QUERY), projection=False, begins=False, cleaned=True
        ),
        TowerKind("pe", "Perception Encoder core", True, False, QUERY, image_bias=True),
        TowerKind("openvision", "OpenVision, CLIPA", False, False, MEAN, ends=False),
    )
}


def of(name: str) -> TowerKind:
    """The kind that config.model.family names. Raises ValueError where it is none of towers."""
    if name not in KINDS:
        raise ValueError(f"model.family={name!r}: of towers only {', '.join(KINDS)}")
    return KINDS[name]
