"""An index: pictures embedded into a folder, and what can be asked of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tqdm

from coca_jax import storage
from coca_jax.inference import read_ahead
from coca_jax.searching import nearest, pictures
from coca_jax.searching.parts import Done, Parts
from coca_jax.searching.pictures import Group, Picture

if TYPE_CHECKING:
    from coca_jax.inference.model import CoCaModel

PART = 1024  # pictures a part: what a stop loses at most
VERSION = 1  # of the folder's layout


def add(
    model: CoCaModel,
    input: str,
    parts: Parts,
    *,
    checkpoint: str,
    batch_size: int,
    part: int = PART,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Embeds the pictures at `input` that `parts` does not hold, and writes them as new parts.

    The folder is the same to the byte whether or not runs before this one were ended in between.

    Returns:
        new, already_there, skipped: numbers of pictures; pictures: in the index.

    Raises:
        FileNotFoundError, ValueError: nothing to read, or an index of another model.
    """
    width = model.config.model.embed_dim
    about = dict(version=VERSION, model=model.checksum(), checkpoint=checkpoint, width=width)
    known = set(parts.names()) | parts.skipped.keys()
    groups = pictures.groups(input, known)
    parts.begin(about)
    before, skipped_before = len(parts.names()), len(parts.skipped)
    total = sum(group.count for group in groups)
    with tqdm.tqdm(total=total or None, unit="picture", disable=not progress) as bar:
        for group in groups:
            done = parts.done.get(group.key, Done()) if group.key else Done()
            bar.update(done.pictures)
            if done.whole:
                continue
            left = itertools.islice(group.read(), done.pictures, None)
            for chunk, last in _chunks(left, part):
                if not chunk and not group.key:
                    continue  # no new files; an empty archive is written down, as done
                _add_part(model, group, chunk, last, parts, batch_size, say)
                bar.update(len(chunk))
    new = len(parts.names()) - before
    return dict(
        new=new,
        already_there=before,
        skipped=len(parts.skipped) - skipped_before,
        pictures=before + new,
    )


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
        return model.preprocess(picture.image)

    for batch in read_ahead.batches(chunk, read, batch_size):
        good = [(picture, x) for picture, x in batch if isinstance(x, np.ndarray)]
        for picture, why in batch:
            if not isinstance(why, np.ndarray):
                skipped[picture.name] = " ".join(str(why).split())
                say(f"skipped {picture.name}: {skipped[picture.name]}")
        if good:
            found.append(model.encode_image(np.stack([x for _, x in good])))
            rows += [(picture.name, picture.caption) for picture, _ in good]
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


def finish(parts: Parts, *, progress: bool = False) -> str:
    """Builds the graph of a large index; returns 'exact' or 'graph', how it is searched."""
    count = len(parts.names())
    if count < nearest.EXACT_BELOW:
        return "exact"
    nearest.build(parts.embeddings(), parts.folder, progress=progress)
    return "graph"


class Index:
    """An index, opened.

    Attributes:
        names, captions: of each picture.
        embeddings: float16 [N, E].
        checkpoint: the model's place, as it was given.

    Raises:
        FileNotFoundError, ValueError: no index there, or a damaged one.
    """

    def __init__(self, folder: str):
        place = storage.place(folder)
        parts = Parts(folder) if (place / "index.json").exists() else None
        if parts is None:
            raise FileNotFoundError(f"--index={folder}: no index there; make it: search index")
        self.about, self.checkpoint = parts.about, parts.about["checkpoint"]
        self.names, self.captions = parts.names(), parts.captions()
        self.embeddings = parts.embeddings()
        self.nearest = nearest.open_nearest(self.embeddings, folder)

    def check(self, model: CoCaModel) -> None:
        """Raises ValueError for a model that did not make this index."""
        if model.checksum() != self.about["model"]:
            raise ValueError(
                f"this index was made by {self.checkpoint} with other weights; give that "
                "--checkpoint, or index again"
            )

    def query(
        self,
        model: CoCaModel,
        texts: Sequence[str] = (),
        images: Sequence[Any] = (),
        weights: Sequence[float] = (),
    ) -> np.ndarray:
        """The embedding of texts and pictures together, float32 [E]: the weighted mean of theirs,
        L2-normalised. weights: of the texts, then of the pictures; default: all 1.

        Raises:
            ValueError: nothing to look for, or another number of weights.
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
        cosine, row the place in the index."""
        scores, rows = self.nearest(query[None], k)
        return [
            dict(
                rank=rank,
                row=int(row),
                image=self.names[row],
                score=round(float(score), 4),
                caption=self.captions[row],
            )
            for rank, (score, row) in enumerate(zip(scores[0], rows[0]), 1)
        ]


def mixed(embeddings: np.ndarray, weights: Sequence[float] = ()) -> np.ndarray:
    """The weighted mean of float32 [N, E], L2-normalised: [E]; weights: default: all 1."""
    mean = np.average(embeddings, 0, weights or None)
    return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)
