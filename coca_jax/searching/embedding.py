"""Embeds pictures into the parts of an index."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from coca_jax.inference import read_ahead
from coca_jax.searching.parts import Parts, Row
from coca_jax.searching.pictures import Group, Picture

if TYPE_CHECKING:
    from coca_jax.inference.model import CoCaModel

VERSION = 1  # of the folder's layout


def about(model: CoCaModel, checkpoint: str) -> dict[str, Any]:
    """The contents of index.json."""
    told = dict(version=VERSION, model=model.checksum(), checkpoint=checkpoint)
    sizes = model.config.model
    return told | dict(width=sizes.embed_dim, dtype=sizes.dtype, made_in=os.getcwd())


def add(
    model: CoCaModel,
    group: Group,
    parts: Parts,
    batch_size: int,
    part: int,
    say: Callable[[str], None],
    report: Callable[[int], Any],
) -> None:
    """Embeds the pictures of a group that `parts` does not hold. part: pictures a part; say: told
    of pictures that cannot be read; report: given the numbers of pictures done."""
    done = parts.done(group.key)
    report(done.pictures)
    if done.whole:
        return
    for chunk, last in _chunks(itertools.islice(group.read(), done.pictures, None), part):
        _add_part(model, group, chunk, last, parts, batch_size, say)
        report(len(chunk))


def _add_part(
    model: CoCaModel,
    group: Group,
    chunk: list[Picture],
    last: bool,
    parts: Parts,
    batch_size: int,
    say: Callable[[str], None],
) -> None:
    rows, found, skipped = [], [np.zeros((0, parts.about["width"]), np.float32)], {}

    def read(picture: Picture) -> np.ndarray:
        if picture.problem:
            raise ValueError(picture.problem)
        return model.fit_image(picture.image)

    for batch in read_ahead.batches(chunk, read, batch_size):
        good = [(picture, x) for picture, x in batch if isinstance(x, np.ndarray)]
        for picture, why in batch:
            if not isinstance(why, np.ndarray):
                text = " ".join(str(why).split())
                skipped[picture.name] = text
                say(f"skipped {text if picture.name in text else f'{picture.name}: {text}'}")
        if good:
            found.append(model.encode_image(np.stack([x for _, x in good])))
            rows += [Row(one.name, one.caption, one.stamp) for one, _ in good]
    parts.write(group.key, np.concatenate(found), rows, skipped, last)


def _chunks(items: Iterator[Picture], size: int) -> Iterator[tuple[list[Picture], bool]]:
    """Lists of `size`, and whether each is the last; one empty list where there is nothing."""
    chunk = list(itertools.islice(items, size))
    while True:
        following = list(itertools.islice(items, 1))
        yield chunk, not following
        if not following:
            return
        chunk = following + list(itertools.islice(items, size - 1))
