"""What a caption says of a scene, and how much of it is right."""

from __future__ import annotations

import itertools
import re
from typing import Any

from coca_jax.data.scenes.language import SYNONYMS, plural
from coca_jax.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    SHAPES,
    SIZES,
    TEXTURES,
    relations,
)

_CANONICAL_WORDS = {
    **{w: w for w in (*SHAPES, *COLOURS, *SIZES, *TEXTURES)},
    **{plural(s): s for s in SHAPES},
    **{s: word for word, alternatives in SYNONYMS.items() for s in alternatives if " " not in s},
    "round": "circle",
    "plus": "cross",
    "triangular": "triangle",
    **{"discs": "circle", "boxes": "square", "hoops": "ring", "rhombuses": "diamond"},
    "plain": "solid",
}
_PLACE_WORDS = {
    **dict(top="top", upper="top", bottom="bottom", lower="bottom", left="left", right="right"),
    **dict(centre="centre", center="centre", middle="centre"),
}
_NUMBERS = {"a": 1, "an": 1, **{w: n for n, w in enumerate(COUNTS)}}
_OPPOSITES = {"right of": "left of", "below": "above"}

Attributes = frozenset[tuple[Any, ...]]


def parse_caption(text: str) -> Attributes:
    """Returns what a caption says, as a set of tuples; words it does not know are passed over.

    ('count', 'red circle', 2), ('size', 'red circle', 'large'), ('texture', 'red circle',
    'solid') (also when no texture is named), ('place', 'red circle', 'top left'), ('relation',
    'blue star', 'left of', 'green ring'), ('background', 'white'). An object whose colour or shape
    is missing is recorded with '?' in its stead, which matches no scene.
    """
    found, attributes, current = _mentions(re.findall(r"[a-z]+(?:-dot)?", text.lower()))
    names = [f"{o.get('colour', '?')} {o['shape']}" for o in found]
    if "colour" in current:
        attributes.add(("count", f"{current['colour']} ?", 1))
    for name in set(names):
        alike = [o for n, o in zip(names, found) if n == name]
        attributes.add(("count", name, sum(o.get("count", 1) for o in alike)))
        for o in alike:
            attributes.add(("texture", name, o.get("texture", "solid")))
            if "size" in o:
                attributes.add(("size", name, o["size"]))
            attributes.update(("place", name, place) for place in o["places"])
    for name, o in zip(names, found):
        if "relation" in o:
            first, way = o["relation"]
            if way in _OPPOSITES:
                attributes.add(("relation", name, _OPPOSITES[way], names[first]))
            else:
                attributes.add(("relation", names[first], way, name))
    return frozenset(attributes)


def _mentions(words: list[str]) -> tuple[list[dict[str, Any]], set[tuple[Any, ...]], dict]:
    """The objects that words mention, in their order, the background if one is named, and the
    adjectives after which no shape came."""
    found: list[dict[str, Any]] = []  # objects in order of mention
    current: dict[str, Any] = {}
    attributes: set[tuple[Any, ...]] = set()
    waiting: list[str] = []  # places named before their object
    relation: tuple[int, str] | None = None
    fronted = False
    i = 0
    while i < len(words):
        word = words[i]
        following = words[i + 1] if i + 1 < len(words) else ""
        known = _CANONICAL_WORDS.get(word)
        if word in BACKGROUNDS and following in ("background", "backdrop"):
            attributes.add(("background", word))
            current = {}  # drops the article
            i += 2
            continue
        if (word in ("left", "right") and following == "of") or word in ("above", "below"):
            name = word if word in ("above", "below") else f"{word} of"
            relation = (len(found) - 1, name) if found else None
        elif word in _PLACE_WORDS:
            place = _PLACE_WORDS[word]
            if place in ("top", "bottom") and following in ("left", "right"):
                place = f"{place} {following}"
                i += 1
            fronted = fronted or not found
            if fronted:
                waiting.append(place)
            else:
                found[-1]["places"].append(place)
        elif known in SHAPES:
            new = dict(current, shape=known, places=waiting)
            if relation is not None:
                new["relation"] = relation
            found.append(new)
            current, waiting, relation = {}, [], None
        elif known in COLOURS:
            current["colour"] = known
        elif known in SIZES:
            current["size"] = known
        elif known in TEXTURES:
            current["texture"] = known
        elif word in _NUMBERS:
            current = dict(count=_NUMBERS[word])  # a new noun phrase
        i += 1
    return found, attributes, current


def described_attributes(scene: dict[str, Any]) -> Attributes:
    """Returns what a complete caption must say: count, size, texture, place of every object."""
    attributes: set[tuple[Any, ...]] = set()
    names = [f"{o['colour']} {o['shape']}" for o in scene["objects"]]
    for name, o in zip(names, scene["objects"]):
        attributes.add(("count", name, names.count(name)))
        attributes.update((key, name, o[key]) for key in ("size", "texture", "place"))
    return frozenset(attributes)


def true_attributes(scene: dict[str, Any]) -> Attributes:
    """Returns all that a caption may say: the described attributes, relations, the background."""
    attributes = set(described_attributes(scene))
    if scene["background"]:
        attributes.add(("background", scene["background"]))
    for a, b in itertools.permutations(scene["objects"], 2):
        for way in relations(a["place"], b["place"]):
            if way not in _OPPOSITES:
                names = (f"{o['colour']} {o['shape']}" for o in (a, b))
                attributes.add(("relation", next(names), way, next(names)))
    return frozenset(attributes)


def score_caption(text: str, scene: dict[str, Any]) -> tuple[bool, float]:
    """Returns (every attribute said and right, F1 of the attributes).

    Precision counts what is said and true in the picture, recall what of `described_attributes`
    is said: naming the background or a true relation is no error and not required.
    """
    parsed, wanted, true = parse_caption(text), described_attributes(scene), true_attributes(scene)
    right = len(parsed & true)
    precision = right / len(parsed) if parsed else 0.0
    recall = len(parsed & wanted) / len(wanted)
    exact = wanted <= parsed and parsed <= true
    return exact, 2 * precision * recall / (precision + recall) if right else 0.0
