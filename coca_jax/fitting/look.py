"""What some data are: how many pictures, captions and labels, how large, how long, how often.

One pass over the data, reading every picture's bytes and header and decoding a few of them.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from coca_jax.console import bars
from coca_jax.data import images
from coca_jax.importers import checks, dedup
from coca_jax.importers.items import Item

_DECODED = 96  # pictures whose pixels are looked at
_TEXTS = 200_000  # captions that are kept to measure
# Least share of equal neighbors before the background of a drawing. Medians: Twitter's emoji 0.53,
# Google's 0.29, screenshots 0.29; photographs on white 0.10, Fashion-MNIST 0.04.
_FLAT = 0.1


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of some data before anything is chosen for them.

    Attributes:
        train, test: examples to train on, and held out.
        captions, labels: how many of `train` have a caption, a label.
        test_captions, test_labels: how many of `test`.
        distinct_captions: of all, each counted once.
        words: of a caption, (median, 95%, most).
        distinct_words: of all captions and labels.
        characters: distinct ones in them.
        scripts: most used first, such as 'Latin'.
        classes: names, by number of examples.
        largest_class: its share of the labelled examples.
        width, height: medians, in pixels; 0 where no picture could be read.
        aspect: of the long side to the short one, median and 95%.
        drawn: whether the pictures are drawings, icons or screens more than photographs.
        repeated: pictures whose bytes occur before.
        left_out: reason -> number of examples that cannot be used.
        first_problem: details of the first example with the most common reason.
        fields: names of other fields of the data.
        tokens: of a text as trained on with begin and end, (75%, 99%, most); (0, 0, 0): not known.
    """

    train: int
    test: int = 0
    captions: int = 0
    labels: int = 0
    test_captions: int = 0
    test_labels: int = 0
    distinct_captions: int = 0
    words: tuple[int, int, int] = (0, 0, 0)
    distinct_words: int = 0
    characters: int = 0
    scripts: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    largest_class: float = 0.0
    width: int = 0
    height: int = 0
    aspect: tuple[float, float] = (1.0, 1.0)
    drawn: bool = False
    repeated: int = 0
    left_out: tuple[tuple[str, int], ...] = ()
    first_problem: str = ""
    fields: tuple[str, ...] = ()
    tokens: tuple[int, int, int] = (0, 0, 0)

    @property
    def problems(self) -> str:
        """`left_out` in words: '3 unreadable_image, 1 missing_text'."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out)


class Scan:
    """Goes through the items of some data once.

    Attributes: facts (all examples count as `train`), and places, float64 [n], where the bytes of
    each usable picture put it for a holdout (`checks.place`).
    """

    def __init__(self, items: Iterable[Item], *, show: str = "", total: int | None = None):
        self._texts: list[str] = []
        self._sizes: list[tuple[int, int]] = []
        self._classes: collections.Counter[str] = collections.Counter()
        self._problems: collections.Counter[str] = collections.Counter()
        self._first: dict[str, str] = {}  # of each problem: what it says of its first example
        self._fields: collections.Counter[str] = collections.Counter()
        self._seen: set[bytes] = set()
        self._sample: list[tuple[float, bytes]] = []  # a heap of those with the lowest place
        self._captions = self._labels = self._repeated = 0
        places: list[float] = []
        with bars.Bar(total, "pictures", show, shown=bool(show)) as bar:
            for item in items:
                if self._add(item):
                    places.append(checks.place(item.image, item.drawn.holdouts))
                bar.update()
        self.places = np.asarray(places)
        self.facts = self._facts()

    def _add(self, item: Item) -> bool:
        """Counts an item; False for one that cannot be used."""
        self._fields.update(item.extra.keys())
        problem = item.problem or ("" if item.image else "empty_image")
        if not problem:
            try:
                self._sizes.append(images.open_image(item.image).size)
            except ValueError:
                problem = "unreadable_image"
        if not problem and not item.texts and not item.labels:
            problem = "missing_text"
        if problem:
            self._problems[problem] += 1
            self._first.setdefault(problem, item.detail)
            return False
        self._captions += bool(item.texts)
        self._labels += bool(item.labels)
        self._classes.update(item.labels)
        if len(self._texts) < _TEXTS:
            self._texts.extend(item.texts)
        digest = dedup.content_hash(item.image)
        self._repeated += digest in self._seen
        self._seen.add(digest)
        entry = (-checks.place(item.image), item.image)
        if len(self._sample) < _DECODED:
            heapq.heappush(self._sample, entry)
        else:
            heapq.heappushpop(self._sample, entry)
        return True

    def _facts(self) -> Facts:
        sides = np.asarray(self._sizes or [(0, 0)], np.float64)
        aspect = sides.max(1) / np.maximum(sides.min(1), 1)
        words = [len(text.split()) for text in self._texts] or [0]
        names = [name for name, _ in self._classes.most_common()]
        known = collections.Counter(
            word for text in (*self._texts, *names) for word in text.lower().split()
        )
        return Facts(
            train=len(self._sizes) - self._problems["missing_text"],
            captions=self._captions,
            labels=self._labels,
            distinct_captions=len(set(self._texts)),
            words=tuple(int(x) for x in np.quantile(words, (0.5, 0.95, 1.0))),  # type: ignore
            distinct_words=len(known),
            characters=len(set().union(*known) if known else ()),
            scripts=scripts([*self._texts[:2000], *names[:2000]]),
            classes=tuple(names),
            largest_class=max(self._classes.values(), default=0) / max(self._labels, 1),
            width=int(np.median(sides[:, 0])),
            height=int(np.median(sides[:, 1])),
            aspect=(float(np.median(aspect)), float(np.quantile(aspect, 0.95))),
            drawn=drawn([data for _, data in self._sample]),
            repeated=self._repeated,
            left_out=tuple(self._problems.most_common()),
            first_problem=self._first[max(self._problems, key=self._problems.__getitem__)]
            if self._problems
            else "",
            fields=tuple(name for name, _ in self._fields.most_common(12)),
        )


def scripts(texts: Sequence[str]) -> tuple[str, ...]:
    """The scripts in which at least 1% of the letters are written, most used first.

    A script is the first word of a letter's Unicode name: LATIN, CJK, CYRILLIC, ARABIC ...
    """
    letters = collections.Counter(c for text in texts for c in text if c.isalpha())
    found: collections.Counter[str] = collections.Counter()
    for letter, count in letters.items():
        found[unicodedata.name(letter, "other").split()[0].split("-")[0].title()] += count
    return tuple(s for s, count in found.most_common() if count >= sum(found.values()) / 100)


def drawn(pictures: Sequence[bytes]) -> bool:
    """Whether most pictures are drawn: transparent, or flat with a plain background.

    A background of exactly one color on a quarter of the image was filled. What lies before it
    tells drawings from photographs of objects on white, which have noise and shades everywhere.
    """
    votes = []
    for data in pictures:
        try:
            pixels = images.decode_rgba(data)
        except ValueError:
            continue
        if pixels.shape[-1] == 4 and (pixels[..., 3] < 128).mean() > 0.05:
            votes.append(True)
            continue
        colors = pixels[..., :3].astype(np.uint32)
        codes = (colors[..., 0] << 16) | (colors[..., 1] << 8) | colors[..., 2]  # [H, W]
        values, counts = np.unique(codes[::2, ::2], return_counts=True)
        filled = counts.max() > 0.25 * counts.sum()
        front = codes != values[counts.argmax()]
        pairs = front[:, 1:] & front[:, :-1]  # neighbors that both lie before the background
        equal = (codes[:, 1:] == codes[:, :-1]) & pairs
        votes.append(bool(filled and equal.sum() >= _FLAT * pairs.sum()))
    return bool(votes) and float(np.mean(votes)) > 0.5


def with_counts(facts: Facts, train: dict[str, Any], test: dict[str, Any]) -> Facts:
    """The facts with what an import wrote: entries of a manifest's splits."""
    out = collections.Counter(train["quarantined"]) + collections.Counter(test["quarantined"])
    return dataclasses.replace(
        facts,
        train=train["count"],
        captions=train["with_text"],
        labels=train["with_label"],
        test=test["count"],
        test_captions=test["with_text"],
        test_labels=test["with_label"],
        left_out=tuple(out.most_common()),
    )


def holdout(places: np.ndarray) -> float:
    """The share of the range of places to hold out of a data set whose pictures have these.

    A tenth of the distinct pictures, up to 1,000; a twentieth of those beyond 20,000, up to 5,000;
    8 at least. Equal pictures have one place, so all of them go. Raises ValueError for one picture
    alone, however often.
    """
    distinct = np.unique(places)
    if len(distinct) < 2:
        raise ValueError(
            f"all {len(places):,} pictures are the same one: there is nothing to tell apart and "
            "nothing to hold out; give different pictures"
        )
    count = min(max(8, len(distinct) // 10), 1000)
    count = min(max(count, len(distinct) // 20), 5000)
    count = min(count, len(distinct) - 1)
    return float((distinct[count - 1] + distinct[count]) / 2)
