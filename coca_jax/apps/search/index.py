"""An index: pictures embedded into a folder, and what can be asked of it."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import typing
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import numpy as np

from coca_jax.apps.search import embed, nearest
from coca_jax.apps.search.embed import Group
from coca_jax.apps.search.parts import LEASE, STAGED, Parts, check_dtype, check_model
from coca_jax.data import image_files
from coca_jax.data.sources import files
from coca_jax.data.sources.fields import printable
from coca_jax.data.sources.items import resuming_reads
from coca_jax.inference import fingerprint
from coca_jax.runtime import progress as bars
from coca_jax.runtime import storage
from coca_jax.runtime.workers import Engine, Report

if typing.TYPE_CHECKING:
    from coca_jax.inference.model import CoCaModel


# Groups of pictures that workers have embedded apart, each into a small index of its own.
#
# OUT/staged/NAME/   an index of one group: its parts get their numbers when all are joined


def stage(
    load: Callable[[], CoCaModel],
    groups: Sequence[Group],
    parts: Parts,
    engine: Engine,
    *,
    checkpoint: str,
    batch_size: int,
    part: int = embed.PART,
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
    left = [one for one in groups if not join_staged(parts, one)]
    there = staged_names(parts.folder)
    own = [
        one
        for one in engine.own(left)
        if staged_name(one) not in there or not _whole(parts.folder, one)
    ]
    work = Work(load, parts.folder, dict(parts.about), checkpoint, batch_size, part)
    total = sum(one.count for one in own) or None
    with bars.Bar(total, "pictures", shown=progress) as bar:
        engine.run(work, own, bar.update, models=True)
    there = staged_names(parts.folder)
    return sum(staged_name(one) not in there or not _whole(parts.folder, one) for one in left)


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
        info = embed.about(self._model, self._checkpoint)
        check_model(self._out, self._about, info)
        own = Parts(_place(self._out, group))
        own.begin(info)
        embed.add(self._model, group, own, self._batch_size, self._part, lambda text: None, report)


def staged_names(folder: str) -> set[str]:
    """Of the groups that are staged for an index, in one request: a bucket takes tens of
    milliseconds to say of each of ten thousand that nothing of it is there."""
    try:
        return {*files.listing(files.join(folder, STAGED))}
    except FileNotFoundError:
        return set()


def take_staged(parts: Parts, group: Group, say: Callable[[str], None]) -> bool:
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


def remove_staged(folder: str, group: Group) -> None:
    """Removes what was staged of a group."""
    storage.remove(_place(folder, group))


def _place(folder: str, group: Group) -> str:
    return files.join(folder, f"{STAGED}/{staged_name(group)}")


def staged_name(group: Group) -> str:
    """The folder of a group, as `names` lists it."""
    keys = [group.key] if group.key else [one.name for one in group.files]
    # Relative names stay so: jobs on several machines may see the data below other folders.
    listing = "\n".join(key if "://" in key else os.path.normpath(key) for key in keys)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def join_staged(parts: Parts, group: Group) -> bool:
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


_LEAST = 1e-6  # length of a query before it is normalised, whose largest weight is 1


def groups(
    inputs: Sequence[str],
    parts: Parts,
    part: int = embed.PART,
    allow_paths: Sequence[str] = (),
) -> list[Group]:
    """The pictures at `inputs` that `parts` does not hold, or not as they are now: none of a folder
    that is `emptied`. allow_paths: see `pictures.groups`.

    Raises:
        FileNotFoundError, ValueError: nothing to read.
    """
    taken: set[str] = set()

    def state(name: str, caption: str) -> embed.State:
        whole = parts.whole_path(printable(name))
        if whole in taken:  # by another spelling
            return "done"
        taken.add(whole)
        before = parts.files.get(whole)
        if before is None:
            return "new"
        if before.row < 0:
            return "failed"
        # Remote files have no stamp.
        same = before.stamp is None or storage.stamp(name) in (before.stamp, None)
        # A picture that is named alone, or a folder without metadata, says nothing of it.
        return "done" if same and caption in (before.caption, "") else "new"

    found: dict[Any, Group] = {}
    for input in inputs:
        try:
            there = embed.groups(_from_base(input, parts.base), state, part, allow_paths)
        except ValueError:
            if not emptied(input, parts):
                raise
            continue
        for group in there:
            found.setdefault(parts.whole_path(group.key) if group.key else group.files, group)
    return list(found.values())


def gone(inputs: Sequence[str], parts: Parts, allow_paths: Sequence[str] = ()) -> list[int]:
    """Rows of local files at or below `inputs` and `allow_paths`, or the folders of lists there,
    that don't exist any more."""
    places = [parts.whole_path(embed.place(_from_base(input, parts.base))) for input in inputs]
    places += [parts.whole_path(_from_base(path, parts.base)) for path in allow_paths]
    below = tuple(os.path.join(place, "") for place in places if "://" not in place)
    return [
        known.row
        for name, known in parts.files.items()
        if known.row >= 0
        and (name in places or name.startswith(below))
        and not re.search(r"://|\\", name)  # of a name that is not UTF-8 only an escape is known
        and _is_gone(name)
    ]


def _is_gone(path: str) -> bool:
    """Whether nothing is there. What cannot be looked at, as in a folder that may not be read or on
    a disk that does not answer, may be there: its embedding is kept."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    except OSError:
        pass
    return False


def emptied(input: str, parts: Parts) -> bool:
    """Whether a local folder, of which the index holds pictures, has none any more."""
    place = parts.whole_path(_from_base(input, parts.base))
    below = os.path.join(place, "")
    held = (name for name, known in parts.files.items() if known.row >= 0)
    if not os.path.isdir(place) or not any(name.startswith(below) for name in held):
        return False
    try:
        return not image_files.find([place])
    except ValueError:
        return True


def _from_base(input: str, base: str) -> str:
    """An input as another start can find it: relative names begin at the index's base."""
    if base == os.getcwd() or "://" in input or input.startswith("tfds:"):
        return input
    return os.path.abspath(input)


def add(
    model: CoCaModel | None,
    groups: Sequence[Group],
    parts: Parts,
    *,
    checkpoint: str,
    batch_size: int,
    gone: Collection[int] = (),
    part: int = embed.PART,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes new parts: what others have staged, then what `model` embeds. Then drops the old rows
    of files that have changed, and those of `gone`.

    The folder is the same to the byte whether or not runs before this one were ended in between,
    and whoever embedded.

    Args:
        model: None where all groups are staged.

    Returns:
        Numbers of pictures: new; changed, which were embedded anew; gone; already_there before;
        skipped, which could not be read; pictures, in the index now.

    Raises:
        ValueError: an index of another model.
    """
    if model:
        parts.begin(embed.about(model, checkpoint))
    before, count, known = dict(parts.files), len(parts.names()), set(parts.skipped)
    in_groups = parts.in_groups
    total, apart = sum(group.count for group in groups), staged_names(parts.folder)
    with bars.Bar(total or None, "pictures", shown=progress) as bar, resuming_reads():
        for group in groups:
            is_staged = bool(apart) and staged_name(group) in apart
            if is_staged and take_staged(parts, group, say):
                bar.update(group.count)
            elif model:
                embed.add(model, group, parts, batch_size, part, say, bar.update)
            elif not join_staged(parts, group):
                raise RuntimeError(f"{group.key or group.files[0].name} was embedded by nobody")
            if is_staged:
                remove_staged(parts.folder, group)
    names = [parts.whole_path(printable(one.name)) for group in groups for one in group.files]
    failed = [name for name in names if parts.files[name].row < 0]
    held = {name for name in names if name in before and before[name].row >= 0} - {*failed}
    others = parts.skipped.keys() - known
    parts.drop(gone)
    return dict(
        new=len(set(names) - {*held, *failed}) + parts.in_groups - in_groups,
        changed=len(held),
        gone=len({known.row for known in before.values()} & set(gone)),
        already_there=count,
        skipped=len(failed) + sum(parts.whole_path(name) not in parts.files for name in others),
        pictures=len(parts.names()),
    )


def finish(parts: Parts, *, parquet: bool = False, progress: bool = False) -> str:
    """Removes what was staged and not asked for in the end, and builds the graph of a large index,
    or removes that of one which is large no more. parquet: see `Parts.write_parquet`.

    Returns:
        'exact' or 'graph', how it is searched. One in a bucket has no graph, which is read from a
        local folder.
    """
    storage.remove(files.join(parts.folder, STAGED))
    if parquet:
        parts.write_parquet()
    count = len(parts.names())
    if count < nearest.EXACT_BELOW or storage.is_remote(parts.folder):
        storage.remove(files.join(parts.folder, nearest.FILE))
        return "exact"
    nearest.build(parts.embeddings(), parts.folder, progress=progress)
    return "graph"


def stamp(folder: str) -> Hashable:
    """Another one when the index of a folder has been changed; None while it is written to."""
    place = storage.place(folder)
    if (place / LEASE).exists():
        return None
    names = sorted(path.name for path in (place / "metadata").iterdir())
    paths = [place / "metadata" / name for name in names[-1:]] + [place / nearest.FILE]
    last = [storage.stamp(str(path)) for path in paths]
    return (place / "index.json").read_bytes(), *names, *last


class Index:
    """An index, opened.

    Attributes:
        folder, stamp: where it is, and its `stamp` when it was opened.
        names, captions: of each picture.
        embeddings: float16 [N, E].
        rows: int64 [N], the row of each in the files of the index. It stays a picture's own until
            that is changed or gone, and is no other's then.
        checkpoint: the model's place, see `Parts.checkpoint`.

    Raises:
        FileNotFoundError, ValueError: no index there, or a damaged one.
    """

    def __init__(self, folder: str):
        place = storage.place(folder)
        if not all((place / name).exists() for name in ("index.json", "metadata")):
            begun = (place / STAGED).exists()
            remedy = "join its shards: search index, without --shard" if begun else "search index"
            raise FileNotFoundError(f"--index={folder}: no index there; make it: {remedy}")
        self.folder, self.stamp = folder, stamp(folder)
        parts = Parts(folder)
        self.about: dict[str, Any] = parts.about
        self.checkpoint: Any = parts.checkpoint
        self.names, self.captions = parts.names(), parts.captions()
        self.embeddings, self._stamps = parts.embeddings(), parts.stamps()
        self._base = parts.base
        self.nearest = nearest.open_nearest(self.embeddings, folder)
        self.rows = parts.rows()

    def check(self, model: CoCaModel) -> None:
        """Raises ValueError for a model that did not make this index."""
        if not fingerprint.same(self.about["model"], model.checksum()):
            check_dtype("this index", self.about, model.config.model.dtype)
            raise ValueError(
                f"this index was made by {self.checkpoint} with other weights or preprocessing; "
                "give that --checkpoint, and the --dtype of then, or index again"
            )

    def file(self, row: int) -> tuple[str, tuple[int, int] | None]:
        """Where picture `row` lies, and its `local_files.stamp`: of a relative name below the
        folder in which the index was made.

        Raises:
            ValueError: it is there no more, or not as it was when it was embedded.
        """
        path = storage.whole_path(self.names[row], self._base)
        now, before = storage.stamp(path), self._stamps[row]
        if before.min() >= 0 and now != tuple(before):
            raise ValueError(f"{path} is gone or changed; run the same `search index` again")
        return path, now

    @functools.cached_property
    def letters(self) -> int:
        """Letters of the folder that all pictures are in, as their names begin with it."""
        return os.path.commonprefix(self.names).rfind("/") + 1

    def place(self, row: int) -> int:
        """Where `names`, `captions` and `embeddings` have a row. Raises ValueError: they do not."""
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            raise ValueError(
                f"row {row}: the index has no such picture, or it has changed or is gone; search "
                "again for its row"
            )
        return place

    def query(
        self,
        model: CoCaModel,
        texts: Sequence[str] = (),
        images: Sequence[Any] = (),
        weights: Sequence[float] = (),
    ) -> np.ndarray:
        """The embedding of texts and pictures together, float32 [E]: the weighted sum of theirs,
        L2-normalised. weights: of the texts, then of the pictures; default: all 1.

        Raises:
            ValueError: nothing to look for, another number of weights, or such as `mixed` refuses.
        """
        count = len(texts) + len(images)
        if not count or (weights and len(weights) != count):
            raise ValueError(
                f"{len(weights)} weights for {count} texts and pictures; give one each"
            )
        found = [model.encode_text(list(texts))] if texts else []
        found += [model.encode_image(list(images))] if images else []
        return mixed(np.concatenate(found), weights)

    def search(self, query: np.ndarray, k: int) -> list[dict[str, Any]]:
        """The k most similar pictures: {"rank", "row", "image", "score", "caption"}, score the
        cosine, row as in `rows`."""
        scores, places = self.nearest(query[None], k)
        return [
            dict(
                rank=rank,
                row=int(self.rows[place]),
                image=self.names[place],
                score=round(float(score), 4),
                caption=self.captions[place],
            )
            for rank, (score, place) in enumerate(zip(scores[0], places[0]), 1)
        ]


def mixed(embeddings: np.ndarray, weights: Sequence[float] = ()) -> np.ndarray:
    """The weighted sum of float32 [N, E], L2-normalised: [E]; weights: default: all 1. What has a
    negative one is looked away from.

    Raises:
        ValueError: weights that are not finite, or that leave nothing.
    """
    given = np.asarray(weights or np.ones(len(embeddings)), np.float64)
    weights_text = ", ".join(f"{weight:g}" for weight in given)
    if not np.isfinite(given).all():
        raise ValueError(f"the weights {weights_text}: give finite numbers")
    scaled = given / max(np.abs(given).max(), np.finfo(float).tiny)
    whole = scaled @ embeddings
    length = np.linalg.norm(whole)
    if length < _LEAST:
        raise ValueError(f"the weights {weights_text} leave nothing to look for; change one")
    return (whole / length).astype(np.float32)
