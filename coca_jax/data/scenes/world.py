"""What scenes may hold, and which scene a record is: a function of its stream and index."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

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

PAIRS = tuple(itertools.product(COLOURS, SHAPES))
_TRAIN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELDOUT_PAIRS)
_HELDOUT_LIST = tuple(sorted(HELDOUT_PAIRS))
_RELATION_LIST = tuple(sorted(HELDOUT_RELATIONS))

RADIUS = {"small": 8.5, "large": 14.0}
ANCHORS = tuple((x, y) for y in (15, 32, 49) for x in (15, 32, 49))  # of PLACES, pixels

COUNTS = ("no", "one", "two", "three", "four")


def class_names() -> list[str]:
    """Returns the 64 zero-shot classes, 'red circle' and so on (a guess is right in 1.6%)."""
    return [f"{colour} {shape}" for colour, shape in PAIRS]


# ---- Random numbers: a hash of (stream, index, position), so that any record can be drawn alone.


def hash_uniform(stream: int, indices: np.ndarray, start: int, count: int) -> np.ndarray:
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


def stream(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "little")


class Draws:
    """Successive uniform numbers of one record; more are computed when the first block runs out."""

    def __init__(self, stream: int, index: int, block: list[float]):
        self.stream, self._index, self._block, self._next = stream, index, block, 0

    def uniform(self) -> float:
        if self._next == len(self._block):
            index = np.asarray([self._index])
            more = hash_uniform(self.stream, index, len(self._block), 64)
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


@functools.cache
def _layouts(count: int, same_size: bool) -> tuple[tuple[tuple[int, str], ...], ...]:
    """Returns every way to put `count` objects apart from each other: ((place, size), ...)."""
    layouts = []
    for places in itertools.combinations(range(9), count):
        for sizes in itertools.product(SIZES, repeat=count):
            if same_size and len(set(sizes)) > 1:
                continue
            apart = all(
                np.hypot(*np.subtract(ANCHORS[places[i]], ANCHORS[places[j]]))
                >= RADIUS[sizes[i]] + RADIUS[sizes[j]] - 0.5
                for i, j in itertools.combinations(range(count), 2)
            )
            if apart:
                layouts.append(tuple(zip(places, sizes)))
    return tuple(layouts)


def relations(place_a: str, place_b: str) -> list[str]:
    """Returns the relations of an object at `place_a` to one at `place_b`."""
    ax, ay = ANCHORS[PLACES.index(place_a)]
    bx, by = ANCHORS[PLACES.index(place_b)]
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
        for relation in relations(a["place"], b["place"])
    )


def draw_scene(draws: Draws, heldout: bool, counts: Sequence[tuple[float, int]]) -> dict:
    count = draws.weighted(counts)
    while True:
        scene = _propose_scene(draws, heldout, count)
        if has_heldout(scene) == heldout:
            return scene


def _propose_scene(draws: Draws, heldout: bool, count: int) -> dict[str, Any]:
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
            if relation not in relations(objects[a]["place"], objects[b]["place"]):
                a, b = b, a
            for o, shape in ((objects[a], shape_a), (objects[b], shape_b)):
                o["shape"] = shape
                if (o["colour"], shape) in HELDOUT_PAIRS:
                    o["colour"] = "green" if o["colour"] != "green" else "blue"
    return dict(objects=objects, background=draws.choice(tuple(BACKGROUNDS)))
