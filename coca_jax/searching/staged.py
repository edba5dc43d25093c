"""Groups of pictures that workers have embedded apart, each into a small index of its own.

OUT/staged/NAME/   an index of one group: its parts get their numbers when all are joined
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from coca_jax.console import bars
from coca_jax.data import files
from coca_jax.engines import Engine, Report
from coca_jax.files import storage
from coca_jax.importers.items import printable
from coca_jax.searching import embedding, pictures
from coca_jax.searching.checks import STAGED, check_model
from coca_jax.searching.parts import Parts
from coca_jax.searching.pictures import Group

if TYPE_CHECKING:
    from coca_jax.inference.model import CoCaModel


def stage(
    load: Callable[[], CoCaModel],
    groups: Sequence[Group],
    parts: Parts,
    engine: Engine,
    *,
    checkpoint: str,
    batch_size: int,
    part: int = pictures.PART,
    progress: bool = False,
) -> int:
    """Embeds the engine's share of the groups, each apart, where that is not done.

    Args:
        load: gives the model; pickled to the workers.
        part: pictures a part.

    Returns:
        How many groups others have still to embed.

    Raises:
        ValueError: an index of another model.
    """
    left = [one for one in groups if not joined(parts, one)]
    there = names(parts.folder)
    own = [
        one for one in engine.own(left) if name(one) not in there or not _whole(parts.folder, one)
    ]
    work = Work(load, parts.folder, dict(parts.about), checkpoint, batch_size, part)
    total = sum(one.count for one in own) or None
    with bars.Bar(total, "pictures", shown=progress) as bar:
        engine.run(work, own, bar.update, models=True)
    there = names(parts.folder)
    return sum(name(one) not in there or not _whole(parts.folder, one) for one in left)


class Work:
    """Embeds a group into an index of its own; loads the model at the first one.

    Args:
        about: index.json of the index that is added to, {} for a new one: made by the same model.
    """

    def __init__(
        self,
        load: Callable[[], CoCaModel],
        out: str,
        about: dict[str, Any],
        checkpoint: str,
        batch_size: int,
        part: int,
    ):
        self._load, self._out, self._about = load, out, about
        self._checkpoint, self._batch_size, self._part = checkpoint, batch_size, part
        self._model: CoCaModel | None = None

    def __call__(self, group: Group, report: Report) -> None:
        """Raises ValueError: another model than that of the index."""
        if self._model is None:
            self._model = self._load()
        told = embedding.about(self._model, self._checkpoint)
        check_model(self._out, self._about, told)
        own = Parts(_place(self._out, group))
        own.begin(told)
        embedding.add(
            self._model, group, own, self._batch_size, self._part, lambda text: None, report
        )


def names(folder: str) -> set[str]:
    """Of the groups that are staged for an index, in one request: a bucket takes tens of
    milliseconds to say of each of ten thousand that nothing of it is there."""
    try:
        return {*files.listing(files.join(folder, STAGED))}
    except FileNotFoundError:
        return set()


def take(parts: Parts, group: Group, say: Callable[[str], None]) -> bool:
    """Adds what is staged of a group to the index; returns whether that is all of the group.

    Raises:
        ValueError: another model embedded it.
    """
    place = _place(parts.folder, group)
    if not files.exists(files.join(place, "index.json")):
        return False
    staged = Parts(place)
    parts.begin(staged.about)
    for picture, why in staged.skipped.items():
        say(f"skipped {picture}: {why}")
    parts.take(staged, parts.done(group.key).pictures)
    return _is_whole(staged, group)


def remove(folder: str, group: Group) -> None:
    """Removes what was staged of a group."""
    storage.remove(_place(folder, group))


def _place(folder: str, group: Group) -> str:
    return files.join(folder, f"{STAGED}/{name(group)}")


def name(group: Group) -> str:
    """The folder of a group, as `names` lists it."""
    keys = [group.key] if group.key else [one.name for one in group.files]
    # Relative names stay so: jobs on several machines may see the data below other folders.
    told = "\n".join(key if "://" in key else os.path.normpath(key) for key in keys)
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def joined(parts: Parts, group: Group) -> bool:
    """Whether the index holds all of a group; of files it is only asked for those that are new."""
    return parts.done(group.key).whole


def _whole(folder: str, group: Group) -> bool:
    place = _place(folder, group)
    if not files.exists(files.join(place, "index.json")):
        return False
    return _is_whole(Parts(place), group)


def _is_whole(staged: Parts, group: Group) -> bool:
    """Whether a staged index holds all of its one group; files are one part."""
    paths = [staged.whole_path(printable(one.name)) for one in group.files]
    return all(path in staged.files for path in paths) if paths else staged.done(group.key).whole
