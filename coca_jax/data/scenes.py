"""The embedded data set: drawn scenes with noisy alt-text or label names, nothing to download.

A record is a function of (split, index) alone: the same on every machine, host and resume. Scenes
hold one to four objects; an object has a shape, a colour, a size, a texture and a place. Eight of
the 64 colour+shape pairs and a few spatial relations never occur in the splits `train` and `test`,
in no image, caption or label; every scene of the split `heldout` shows at least one of them, so
scores there measure composition, not recall.

Only numpy is needed. Drawing costs about 0.1 ms a scene: shapes are rasterised once, with
anti-aliasing, and blended into the image.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
COLOURS = {
    "red": (222, 38, 38),
    "orange": (250, 140, 20),
    "yellow": (246, 226, 50),
    "green": (34, 150, 60),
    "cyan": (70, 215, 225),
    "blue": (38, 70, 215),
    "purple": (132, 44, 172),
    "pink": (252, 140, 196),
}
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted")
PLACES = (  # row by row, the order in which captions name objects
    *("top left", "top", "top right", "left", "centre"),
    *("right", "bottom left", "bottom", "bottom right"),
)
BACKGROUNDS = {
    "white": (244, 244, 244),
    "grey": (150, 150, 150),
    "black": (22, 22, 22),
    "beige": (222, 200, 164),
}
SPLIT_SIZES = {"train": 200_000, "test": 2_000, "heldout": 2_000}
IMAGE_SIZE = 64

# One pair for each colour and each shape, so that both still occur in training with seven others.
HELDOUT_PAIRS = frozenset(
    (colour, SHAPES[(3 * i + 1) % 8]) for i, colour in enumerate(COLOURS)
)  # (colour, shape)
HELDOUT_RELATIONS = frozenset(
    {
        ("star", "left of", "ring"),
        ("circle", "left of", "heart"),
        ("square", "above", "triangle"),
        ("diamond", "above", "cross"),
    }
)

_PAIRS = tuple(itertools.product(COLOURS, SHAPES))
_TRAIN_PAIRS = tuple(pair for pair in _PAIRS if pair not in HELDOUT_PAIRS)
_HELDOUT_LIST = tuple(sorted(HELDOUT_PAIRS))
_RELATION_LIST = tuple(sorted(HELDOUT_RELATIONS))

_RADIUS = {"small": 8.5, "large": 14.0}
_ANCHORS = tuple((x, y) for y in (15, 32, 49) for x in (15, 32, 49))  # of PLACES, pixels
_PATCH = 32
_MARGIN = 4  # canvas border that takes what an object near the edge overhangs
_VARIANTS = 12  # cached rotations, scales and texture phases of every shape

_COUNTS = ("no", "one", "two", "three", "four")


def class_names() -> list[str]:
    """Returns the 64 zero-shot classes, 'red circle' and so on (a guess is right in 1.6%)."""
    return [f"{colour} {shape}" for colour, shape in _PAIRS]


# ---- Random numbers: a hash of (stream, index, position), so that any record can be drawn alone.


def _hash_uniform(stream: int, indices: np.ndarray, start: int, count: int) -> np.ndarray:
    """Returns float64 [N, count] in [0, 1): splitmix64 of stream, index and position."""
    with np.errstate(over="ignore"):
        base = np.uint64(stream) + indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        base = _mix(base)[:, None]
        steps = np.arange(start + 1, start + count + 1, dtype=np.uint64)
        bits = _mix(base + steps * np.uint64(0xD1342543DE82EF95))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _stream(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "little")


class _Draws:
    """Successive uniform numbers of one record; more are computed when the first block runs out."""

    def __init__(self, stream: int, index: int, block: list[float]):
        self._stream, self._index, self._block, self._next = stream, index, block, 0

    def uniform(self) -> float:
        if self._next == len(self._block):
            index = np.asarray([self._index])
            more = _hash_uniform(self._stream, index, len(self._block), 64)
            self._block = self._block + more[0].tolist()
        self._next += 1
        return self._block[self._next - 1]

    def below(self, n: int) -> int:
        return int(self.uniform() * n)

    def choice(self, items: Sequence[Any]) -> Any:
        return items[int(self.uniform() * len(items))]

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def weighted(self, items: Sequence[tuple[float, Any]]) -> Any:
        u = self.uniform() * sum(weight for weight, _ in items)
        for weight, item in items:
            u -= weight
            if u < 0:
                return item
        return items[-1][1]


# ---- Scenes


@functools.cache
def _layouts(count: int, same_size: bool) -> tuple[tuple[tuple[int, str], ...], ...]:
    """Returns every way to put `count` objects apart from each other: ((place, size), ...)."""
    layouts = []
    for places in itertools.combinations(range(9), count):
        for sizes in itertools.product(SIZES, repeat=count):
            if same_size and len(set(sizes)) > 1:
                continue
            apart = all(
                np.hypot(*np.subtract(_ANCHORS[places[i]], _ANCHORS[places[j]]))
                >= _RADIUS[sizes[i]] + _RADIUS[sizes[j]] - 0.5
                for i, j in itertools.combinations(range(count), 2)
            )
            if apart:
                layouts.append(tuple(zip(places, sizes)))
    return tuple(layouts)


def _relations(place_a: str, place_b: str) -> list[str]:
    """Returns the relations of an object at `place_a` to one at `place_b`."""
    ax, ay = _ANCHORS[PLACES.index(place_a)]
    bx, by = _ANCHORS[PLACES.index(place_b)]
    found = []
    if ax != bx:
        found.append("left of" if ax < bx else "right of")
    if ay != by:
        found.append("above" if ay < by else "below")
    return found


def has_heldout(scene: dict[str, Any]) -> bool:
    """Says whether a scene shows a colour+shape pair or a relation that training never shows."""
    objects = scene["objects"]
    if any((o["colour"], o["shape"]) in HELDOUT_PAIRS for o in objects):
        return True
    return any(
        (a["shape"], relation, b["shape"]) in HELDOUT_RELATIONS
        for a, b in itertools.permutations(objects, 2)
        for relation in _relations(a["place"], b["place"])
    )


def _draw_scene(draws: _Draws, heldout: bool, counts: Sequence[tuple[float, int]]) -> dict:
    count = draws.weighted(counts)
    while True:
        scene = _propose_scene(draws, heldout, count)
        if has_heldout(scene) == heldout:
            return scene


def _propose_scene(draws: _Draws, heldout: bool, count: int) -> dict[str, Any]:
    grouped = count > 1 and draws.chance(0.2)  # "three red circles"
    layout = draws.choice(_layouts(count, grouped))
    objects: list[dict[str, str]] = []
    for place, size in layout:
        if objects and (grouped or draws.chance(0.12)):  # a second one of the same kind
            new = dict(objects[-1])
        else:
            colour, shape = draws.choice(_TRAIN_PAIRS)
            texture = draws.weighted(((0.5, "solid"), (0.25, "striped"), (0.25, "dotted")))
            new = dict(shape=shape, colour=colour, texture=texture)
        new.update(size=size, place=PLACES[place])
        objects.append(new)
    if heldout:
        if count == 1 or grouped or draws.chance(0.8):
            colour, shape = draws.choice(_HELDOUT_LIST)
            for o in objects if grouped else [draws.choice(objects)]:
                o.update(colour=colour, shape=shape)
        else:
            shape_a, relation, shape_b = draws.choice(_RELATION_LIST)
            a = draws.below(count)
            b = (a + 1 + draws.below(count - 1)) % count
            if relation not in _relations(objects[a]["place"], objects[b]["place"]):
                a, b = b, a
            for o, shape in ((objects[a], shape_a), (objects[b], shape_b)):
                o["shape"] = shape
                if (o["colour"], shape) in HELDOUT_PAIRS:
                    o["colour"] = "green" if o["colour"] != "green" else "blue"
    return dict(objects=objects, background=draws.choice(tuple(BACKGROUNDS)))


# ---- Drawing


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns which points of the square [-1, 1]^2 (y down) lie in the shape."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r <= 0.9
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.8
    if shape == "triangle":
        return (y <= 0.72) & (abs(x) <= (y + 0.95) * 0.6)
    if shape == "star":
        angle = np.arctan2(x, -y)
        sector = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        # The edge runs from the tip (1, 0) to the notch at 36 degrees, radius 0.42.
        px, py = r * np.cos(sector), r * np.sin(sector)
        nx, ny = 0.42 * np.cos(np.pi / 5), 0.42 * np.sin(np.pi / 5)
        return (px - 1) * ny - py * (nx - 1) <= 0
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.95)
    if shape == "ring":
        return (r <= 0.97) & (r >= 0.45)
    if shape == "heart":
        u, v = x * 1.25, -y * 1.2 + 0.12
        return (u**2 + v**2 - 1) ** 3 - u**2 * v**3 <= 0
    if shape == "diamond":
        return abs(x) / 0.7 + abs(y) <= 1.0
    raise ValueError(f"shape is {shape!r}; use one of {', '.join(SHAPES)}")


@functools.cache
def _masks() -> dict[tuple[str, str, str], list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Returns, by (shape, size, texture), variants of (ink, white, cover), float32 [32, 32, 1].

    `cover` is the share of a pixel that the object hides: the pixel becomes background *
    (1 - cover) + colour * ink + 255 * white. Stripes are dark, dots are white.
    """
    rng = np.random.default_rng(2022)
    fine = 4
    grid = (np.arange(_PATCH * fine) + 0.5) / fine - _PATCH / 2  # pixels from the centre
    px, py = np.meshgrid(grid, grid)

    def shrink(a: np.ndarray) -> np.ndarray:
        a = a.reshape(_PATCH, fine, _PATCH, fine).mean((1, 3), dtype=np.float32)
        return a[:, :, None]

    masks: dict[tuple[str, str, str], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for shape, size in itertools.product(SHAPES, SIZES):
        for _ in range(_VARIANTS):
            angle = np.deg2rad(rng.uniform(-11, 11))
            radius = _RADIUS[size] * rng.uniform(0.94, 1.06)
            x = (np.cos(angle) * px + np.sin(angle) * py) / radius
            y = (-np.sin(angle) * px + np.cos(angle) * py) / radius
            inside = _inside(shape, x, y)
            large = size == "large"
            period, pitch = (8.5, 6.0) if large else (6.5, 4.8)  # of stripes, of dots; pixels
            phase = rng.uniform(0, 1, 2)
            slant = ((px + py) / np.sqrt(2) + phase[0] * period) % period
            dots = np.hypot(*((p + f * pitch) % pitch - pitch / 2 for p, f in zip((px, py), phase)))
            # A plain rim keeps the outline on every background.
            core = _inside(shape, 1.18 * x, 1.18 * y) & inside
            striped, dotted = core & (slant < period / 2), core & (dots < 0.35 * pitch)
            none = np.zeros_like(inside)
            inks = dict(
                solid=(inside, none),
                striped=(inside * np.where(striped, 0.15, 1.0), none),
                dotted=(inside & ~dotted, dotted),
            )
            for texture, (ink, white) in inks.items():
                parts = (shrink(ink), shrink(white), shrink(inside))
                masks.setdefault((shape, size, texture), []).append(parts)
    return masks


@functools.cache
def _noise() -> np.ndarray:
    return np.random.default_rng(7).normal(0, 5, (192, 192, 3)).astype(np.float32)


def _render(scene: dict[str, Any], draws: _Draws) -> np.ndarray:
    """Returns the picture, uint8 [64, 64, 3]."""
    masks, noise = _masks(), _noise()
    side = IMAGE_SIZE + 2 * _MARGIN
    oy, ox = draws.below(192 - side), draws.below(192 - side)
    tone = np.asarray(BACKGROUNDS[scene["background"]], np.float32)
    canvas = noise[oy : oy + side, ox : ox + side] + (tone + (draws.uniform() - 0.5) * 24)
    for o in scene["objects"]:
        ink, white, cover = masks[o["shape"], o["size"], o["texture"]][draws.below(_VARIANTS)]
        x, y = _ANCHORS[PLACES.index(o["place"])]
        x += draws.below(5) - 2 + _MARGIN - _PATCH // 2
        y += draws.below(5) - 2 + _MARGIN - _PATCH // 2
        jitter = [draws.uniform() * 30 - 15 for _ in range(3)]
        colour = np.asarray(COLOURS[o["colour"]], np.float32) + np.asarray(jitter, np.float32)
        area = canvas[y : y + _PATCH, x : x + _PATCH]
        area *= 1 - cover
        area += ink * colour + 255 * white
        area += cover * noise[oy + y : oy + y + _PATCH, ox + x : ox + x + _PATCH]
    inner = canvas[_MARGIN : _MARGIN + IMAGE_SIZE, _MARGIN : _MARGIN + IMAGE_SIZE]
    return np.clip(inner, 0, 255).astype(np.uint8)


# ---- Language

_SYNONYMS = {
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


def _word(word: str, draws: _Draws | None) -> str:
    if draws is None or not draws.chance(0.06):
        return word
    return draws.choice(_SYNONYMS[word])


def _place(place: str, draws: _Draws | None) -> str:
    phrases = _PLACE_PHRASES[place]
    return phrases[0] if draws is None or draws.chance(0.85) else draws.choice(phrases[1:])


def _plural(noun: str) -> str:
    if noun == "rhombus":
        return "rhombuses"
    return noun + ("es" if noun.endswith(("x", "ss")) else "s")


def _join(parts: Sequence[str], last: str = " and ") -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


def _groups(scene: dict[str, Any]) -> list[tuple[dict[str, str], list[str]]]:
    """Returns (object, places) for objects alike but for their place, in reading order."""
    groups: dict[tuple[str, ...], tuple[dict[str, str], list[str]]] = {}
    for o in scene["objects"]:
        key = tuple(o[a] for a in ("size", "texture", "colour", "shape"))
        groups.setdefault(key, (o, []))[1].append(o["place"])
    return list(groups.values())


def _noun_phrase(
    o: dict[str, str],
    count: int,
    draws: _Draws | None,
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
    text = " ".join([*adjectives, _plural(noun) if count > 1 else noun])
    if count > 1:
        return f"{_COUNTS[count]} {text}"
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
    """Returns the canonical caption with the background: what the evaluation splits retrieve."""
    return f"{canonical_caption(scene)} on a {scene['background']} background"


def noisy_caption(scene: dict[str, Any], draws: _Draws) -> str:
    """Returns one alt-text as people write them: forms, word orders, synonyms, noise."""
    groups = _groups(scene)
    related = _relation_caption(groups, draws)
    if related is not None:
        text, plain = related, False
    else:
        text, plain = _listing_caption(groups, draws)
    if draws.chance(0.3):
        phrase = _BACKGROUND_PHRASES[0 if draws.chance(0.8) else draws.below(3)]
        filled = phrase.format(scene["background"])
        text += (
            f", {filled}" if filled.endswith("background") and filled[0] != "o" else f" {filled}"
        )
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


def _relation_caption(groups: list, draws: _Draws) -> str | None:
    """Returns 'a blue star left of a green ring' for a quarter of the scenes that allow it."""
    if len(groups) != 2 or any(len(places) > 1 for _, places in groups) or draws.chance(0.75):
        return None
    (a, (place_a,)), (b, (place_b,)) = groups if draws.chance(0.7) else groups[::-1]
    relation = draws.choice(_relations(place_a, place_b))
    if relation in ("left of", "right of") and draws.chance(0.3):
        relation = f"to the {relation}"
    size = draws.chance(0.7)
    return (
        f"{_noun_phrase(a, 1, draws, size=size)} {relation} {_noun_phrase(b, 1, draws, size=size)}"
    )


def _listing_caption(groups: list, draws: _Draws) -> tuple[str, bool]:
    """Returns a caption that lists the objects, and whether an opening may stand before it."""
    form = draws.weighted(
        ((0.7, "usual"), (0.07, "order"), (0.06, "fronted"), (0.06, "terse"), (0.06, "there"))
        + ((0.05, "short"),)
    )
    # Colour is left out often: shapes are then learned apart from it, which new pairs need.
    said = {key: draws.chance(p) for key, p in dict(size=0.94, texture=0.97, colour=0.75).items()}
    if form == "short":
        phrases = [_noun_phrase(o, len(p), draws, size=False, texture=False) for o, p in groups]
        return _join(phrases), True
    if form == "order":
        groups = sorted(groups, key=lambda _: draws.uniform())
    article = form != "terse"
    phrases = []
    for o, places in groups:
        what = _noun_phrase(o, len(places), draws, article=article, **said)
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


def _typo(text: str, draws: _Draws) -> str:
    """Returns the text with a letter dropped, doubled or swapped with the next."""
    i = draws.below(len(text) - 1)
    kind = draws.below(3)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    if kind == 1:
        return text[: i + 1] + text[i:]
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def label_names(scene: dict[str, Any], draws: _Draws | None) -> list[str]:
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


# ---- Scoring of captions

_CANONICAL_WORDS = {
    **{w: w for w in (*SHAPES, *COLOURS, *SIZES, *TEXTURES)},
    **{_plural(s): s for s in SHAPES},
    **{s: word for word, alternatives in _SYNONYMS.items() for s in alternatives if " " not in s},
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
_NUMBERS = {"a": 1, "an": 1, **{w: n for n, w in enumerate(_COUNTS)}}
_OPPOSITES = {"right of": "left of", "below": "above"}

Attributes = frozenset[tuple[Any, ...]]


def parse_caption(text: str) -> Attributes:
    """Returns what a caption says, as a set of tuples; words it does not know are passed over.

    ('count', 'red circle', 2), ('size', 'red circle', 'large'), ('texture', 'red circle',
    'solid') (also when no texture is named), ('place', 'red circle', 'top left'), ('relation',
    'blue star', 'left of', 'green ring'), ('background', 'white'). An object whose colour or shape
    is missing is recorded with '?' in its stead, which matches no scene.
    """
    words = re.findall(r"[a-z]+(?:-dot)?", text.lower())
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
    attributes.add(("background", scene["background"]))
    for a, b in itertools.permutations(scene["objects"], 2):
        for way in _relations(a["place"], b["place"]):
            if way not in _OPPOSITES:
                names = (f"{o['colour']} {o['shape']}" for o in (a, b))
                attributes.add(("relation", next(names), way, next(names)))
    return frozenset(attributes)


def score_caption(text: str, scene: dict[str, Any]) -> tuple[bool, float]:
    """Returns (every attribute said and right, F1 of the attributes).

    Precision counts what is said and true in the picture, recall what of `described_attributes`
    is said: naming the background or a true relation is no error and not required.
    """
    said, wanted, true = parse_caption(text), described_attributes(scene), true_attributes(scene)
    right = len(said & true)
    precision = right / len(said) if said else 0.0
    recall = len(said & wanted) / len(wanted)
    exact = wanted <= said and said <= true
    return exact, 2 * precision * recall / (precision + recall) if right else 0.0


# ---- The source


class Scenes:
    """Random access to one split; see the module for what the splits hold.

    Args:
      split: 'train', 'test' (like training) or 'heldout' (compositions that training never shows).
      kind: 'caption' (one to four objects and an alt-text) or 'label' (one object and its names).
      objects: how many objects a caption scene may have; all four counts by default.

    A record is a dict: `image` uint8 [64, 64, 3]; `text`, one noisy alt-text (in the evaluation
    splits the full caption), None for labels; `labels`, names or None; `key`; `scene`, the
    attributes. Raises ValueError for an unknown split, kind or count, and IndexError by index.
    """

    def __init__(
        self, split: str = "train", kind: str = "caption", objects: Iterable[int] = (1, 2, 3, 4)
    ):
        if split not in SPLIT_SIZES:
            raise ValueError(f"split is {split!r}; use one of {', '.join(SPLIT_SIZES)}")
        if kind not in ("caption", "label"):
            raise ValueError(f"kind is {kind!r}; use 'caption' or 'label'")
        objects = tuple(sorted(set(objects)))
        if not objects or not set(objects) <= {1, 2, 3, 4}:
            raise ValueError(f"objects is {objects}; use counts from 1 to 4")
        self.split, self.kind = split, kind
        shares = {1: 0.4, 2: 0.25, 3: 0.2, 4: 0.15}
        counts = (1,) if kind == "label" else objects
        self._counts = tuple((shares[n], n) for n in counts)
        name = f"{kind}-{''.join(map(str, counts))}"
        self._name = f"scenes/{split}/{name}"
        self._streams = [
            _stream("scenes-2", split, name, part) for part in ("scene", "ink", "text")
        ]

    def __len__(self) -> int:
        return SPLIT_SIZES[self.split]

    def _draws(self, indices: np.ndarray, part: int, count: int) -> list[_Draws]:
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"index outside 0 to {len(self) - 1} of {self._name}")
        blocks = _hash_uniform(self._streams[part], indices, 0, count).tolist()
        return [_Draws(self._streams[part], int(i), b) for i, b in zip(indices, blocks)]

    def _scenes(self, indices: np.ndarray) -> list[dict[str, Any]]:
        heldout = self.split == "heldout"
        return [_draw_scene(d, heldout, self._counts) for d in self._draws(indices, 0, 24)]

    def read(self, indices: np.ndarray | Sequence[int]) -> list[dict[str, Any]]:
        """Returns the records at `indices`, int [N]."""
        indices = np.asarray(indices, np.int64).reshape(-1)
        scenes = self._scenes(indices)
        images = [_render(s, d) for s, d in zip(scenes, self._draws(indices, 1, 24))]
        texts = self._texts(indices, scenes)
        return [
            dict(image=image, **text, key=f"{self._name}/{index}", scene=scene)
            for index, scene, image, text in zip(indices, scenes, images, texts)
        ]

    def read_texts(self, indices: np.ndarray | Sequence[int]) -> list[dict[str, Any]]:
        """Returns only {text, labels} at `indices`: no picture is drawn (vocabulary training)."""
        indices = np.asarray(indices, np.int64).reshape(-1)
        return self._texts(indices, self._scenes(indices))

    def _texts(self, indices: np.ndarray, scenes: list[dict]) -> list[dict[str, Any]]:
        draws = self._draws(indices, 2, 48)
        if self.kind == "label":
            noise = draws if self.split == "train" else [None] * len(draws)
            return [dict(text=None, labels=label_names(s, d)) for s, d in zip(scenes, noise)]
        if self.split != "train":
            return [dict(text=full_caption(s), labels=None) for s in scenes]
        return [dict(text=noisy_caption(s, d), labels=None) for s, d in zip(scenes, draws)]


def write_folder(out: str, count: int, split: str = "heldout") -> None:
    """Writes `count` pictures with metadata.jsonl, as an imagefolder that `prepare` reads."""
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, record in enumerate(Scenes(split).read(np.arange(count))):
        name = f"{number:05d}.png"
        Image.fromarray(record["image"]).save(folder / name)
        lines.append(json.dumps(dict(file_name=name, text=record["text"])))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
