"""A scene in words: canonical captions, alt-text as people write it, names of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coca_jax.data.scenes.world import COUNTS, Draws, relations

SYNONYMS = {
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
    "striped": ("stripy",),
    "dotted": ("spotted", "polka-dot"),
    "red": ("crimson",),
    "orange": ("tangerine",),
    "yellow": ("golden",),
    "green": ("emerald",),
    "cyan": ("turquoise",),
    "blue": ("azure",),
    "purple": ("violet",),
    "pink": ("rose",),
    "circle": ("disc", "round shape"),
    "square": ("box",),
    "triangle": ("triangular shape",),
    "star": ("five-pointed star",),
    "cross": ("plus sign",),
    "ring": ("hoop",),
    "heart": ("heart shape",),
    "diamond": ("rhombus",),
}
_PLACE_PHRASES = {  # the first is the usual one
    "top left": ("at the top left", "in the top left corner", "in the upper left"),
    "top": ("at the top", "near the top", "in the upper part"),
    "top right": ("at the top right", "in the top right corner", "in the upper right"),
    "left": ("on the left", "on the left side", "at the left"),
    "centre": ("in the centre", "in the middle", "in the center"),
    "right": ("on the right", "on the right side", "at the right"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom": ("at the bottom", "near the bottom", "in the lower part"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
_BACKGROUND_PHRASES = ("on a {} background", "against a {} backdrop", "{} background")
_OPENINGS = (
    *("a picture of", "picture of", "image of", "an image showing", "clip art of", "drawing of"),
    *("a drawing of", "stock illustration of", "we see", "here is", "you can see", "vector art:"),
)
_CLOSINGS = (
    *(" for kids", " | shapes", " - free download", " #shapes", " clipart", ", flat design"),
    *(" (stock image)", " vector", " ...", "!", " icon"),
)


def _word(word: str, draws: Draws | None) -> str:
    if draws is None or not draws.chance(0.06):
        return word
    return draws.choice(SYNONYMS[word])


def _place(place: str, draws: Draws | None) -> str:
    phrases = _PLACE_PHRASES[place]
    return phrases[0] if draws is None or draws.chance(0.85) else draws.choice(phrases[1:])


def plural(noun: str) -> str:
    if noun == "rhombus":
        return "rhombuses"
    return noun + ("es" if noun.endswith(("x", "ss")) else "s")


def _join(parts: Sequence[str], last: str = " and ") -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


_LOOKS = ("size", "texture", "colour", "shape")


def _groups(scene: dict[str, Any]) -> list[tuple[dict[str, str], list[str]]]:
    """Returns (object, places) for objects alike but for their place, in reading order."""
    groups: dict[tuple[str, ...], tuple[dict[str, str], list[str]]] = {}
    for o in scene["objects"]:
        key = tuple(o[a] for a in _LOOKS)
        groups.setdefault(key, (o, []))[1].append(o["place"])
    return list(groups.values())


def _noun_phrase(
    o: dict[str, str],
    count: int,
    draws: Draws | None,
    *,
    size: bool = True,
    texture: bool = True,
    colour: bool = True,
    article: bool = True,
) -> str:
    adjectives = [_word(o["size"], draws)] if size else []
    if texture and o["texture"] != "solid":
        adjectives.append(_word(o["texture"], draws))
    if colour:
        adjectives.append(_word(o["colour"], draws))
    if draws is not None and len(adjectives) > 1 and draws.chance(0.06):
        adjectives = adjectives[::-1]
    noun = _word(o["shape"], draws)
    text = " ".join([*adjectives, plural(noun) if count > 1 else noun])
    if count > 1:
        return f"{COUNTS[count]} {text}"
    if not article:
        return text
    return f"an {text}" if text[0] in "aeiou" else f"a {text}"


def canonical_caption(scene: dict[str, Any]) -> str:
    """Returns the usual, noise-free caption: size, texture unless solid, colour, shape, place.

    Training captions follow this form more often than any other, so it is what greedy decoding
    gives when a model has understood a picture.
    """
    return _join(
        [
            f"{_noun_phrase(o, len(places), None)} {_join([_place(p, None) for p in places])}"
            for o, places in _groups(scene)
        ]
    )


def full_caption(scene: dict[str, Any]) -> str:
    """Returns the canonical caption with the background, where it has a name: what the evaluation
    splits retrieve."""
    text = canonical_caption(scene)
    return f"{text} on a {scene['background']} background" if scene["background"] else text


def noisy_caption(scene: dict[str, Any], draws: Draws) -> str:
    """Returns one alt-text as people write them: forms, word orders, synonyms, noise."""
    groups = _groups(scene)
    related = _relation_caption(groups, draws)
    if related is not None:
        text, plain = related, False
    else:
        text, plain = _listing_caption(groups, draws)
    if draws.chance(0.3):
        phrase = _BACKGROUND_PHRASES[0 if draws.chance(0.8) else draws.below(3)]
        if scene["background"]:
            filled = phrase.format(scene["background"])
            comma = filled.endswith("background") and filled[0] != "o"
            text += f", {filled}" if comma else f" {filled}"
    if plain and draws.chance(0.08):
        text = f"{draws.choice(_OPENINGS)} {text}"
    if draws.chance(0.06):
        text += draws.choice(_CLOSINGS)
    if draws.chance(0.04):
        text = _typo(text, draws)
    if draws.chance(0.06):
        text = text[0].upper() + text[1:] + ("." if draws.chance(0.5) else "")
    elif draws.chance(0.015):
        text = text.upper()
    return text


def _relation_caption(groups: list, draws: Draws) -> str | None:
    """Returns 'a blue star left of a green ring' for a quarter of the scenes that allow it."""
    if len(groups) != 2 or any(len(places) > 1 for _, places in groups) or draws.chance(0.75):
        return None
    (a, (place_a,)), (b, (place_b,)) = groups if draws.chance(0.7) else groups[::-1]
    relation = draws.choice(relations(place_a, place_b))
    if relation in ("left of", "right of") and draws.chance(0.3):
        relation = f"to the {relation}"
    size = draws.chance(0.7)
    return (
        f"{_noun_phrase(a, 1, draws, size=size)} {relation} {_noun_phrase(b, 1, draws, size=size)}"
    )


def _listing_caption(groups: list, draws: Draws) -> tuple[str, bool]:
    """Returns a caption that lists the objects, and whether an opening may stand before it."""
    form = draws.weighted(
        ((0.7, "usual"), (0.07, "order"), (0.06, "fronted"), (0.06, "terse"), (0.06, "there"))
        + ((0.05, "short"),)
    )
    # Colour is left out often: shapes are then learned apart from it, which new pairs need.
    mentioned = {
        key: draws.chance(p) for key, p in dict(size=0.94, texture=0.97, colour=0.75).items()
    }
    if form == "short":
        phrases = [_noun_phrase(o, len(p), draws, size=False, texture=False) for o, p in groups]
        return _join(phrases), True
    if form == "order":
        groups = sorted(groups, key=lambda _: draws.uniform())
    article = form != "terse"
    phrases = []
    for o, places in groups:
        what = _noun_phrase(o, len(places), draws, article=article, **mentioned)
        where = _join([_place(p, draws) for p in places])
        if form == "fronted":
            phrases.append(f"{where} {what}")
        elif form == "terse":
            phrases.append(f"{what}, {where}")
        else:
            phrases.append(f"{what} {where}")
    text = _join(phrases, "; " if form == "terse" else " and ")
    if form == "there":
        many = len(groups) > 1 or len(groups[0][1]) > 1
        return f"there {'are' if many else 'is'} {text}", False
    return text, form == "usual"


def _typo(text: str, draws: Draws) -> str:
    """Returns the text with a letter dropped, doubled or swapped with the next."""
    i = draws.below(len(text) - 1)
    kind = draws.below(3)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    if kind == 1:
        return text[: i + 1] + text[i:]
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def label_names(scene: dict[str, Any], draws: Draws | None) -> list[str]:
    """Returns the names of a one-object scene: 'circle', mostly 'red circle', at times two more.

    Without draws the first two.
    """
    o = scene["objects"][0]
    names, pair = [o["shape"]], f"{o['colour']} {o['shape']}"
    if draws is None:
        return [*names, pair]
    if draws.chance(0.7):
        names.append(pair)
    if o["texture"] != "solid" and draws.chance(0.7):
        names.append(f"{o['texture']} {o['shape']}")
    if draws.chance(0.2):
        names.append(f"{o['size']} {o['shape']}")
    return names
