"""An index: pictures embedded into a folder, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tqdm

from coca_jax import storage
from coca_jax.data import files
from coca_jax.importers.items import printable
from coca_jax.searching import embedding, nearest, pictures, staged
from coca_jax.searching.parts import STAGED, Parts
from coca_jax.searching.pictures import Group

if TYPE_CHECKING:
    from coca_jax.inference.model import CoCaModel


def groups(inputs: Sequence[str], parts: Parts, part: int = pictures.PART) -> list[Group]:
    """The pictures at `inputs` that `parts` does not hold.

    Raises:
        FileNotFoundError, ValueError: nothing to read.
    """
    known = set(parts.names()) | parts.skipped.keys()
    found: dict[Any, Group] = {}
    for input in inputs:
        for group in pictures.groups(input, known, part):
            known.update(printable(name) for name, _ in group.files)
            found.setdefault(group.key or group.files, group)
    return list(found.values())


def add(
    model: CoCaModel | None,
    groups: Sequence[Group],
    parts: Parts,
    *,
    checkpoint: str,
    batch_size: int,
    part: int = pictures.PART,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes new parts: what others have staged, then what `model` embeds.

    The folder is the same to the byte whether or not runs before this one were ended in between,
    and whoever embedded.

    Args:
        model: None where all groups are staged.

    Returns:
        new, already_there, skipped: numbers of pictures; pictures: in the index.

    Raises:
        ValueError: an index of another model.
    """
    if model:
        parts.begin(embedding.about(model, checkpoint))
    before, skipped_before = len(parts.names()), len(parts.skipped)
    total = sum(group.count for group in groups)
    with tqdm.tqdm(total=total or None, unit="picture", disable=not progress) as bar:
        for group in groups:
            if staged.take(parts, group, say):
                bar.update(group.count)
            elif model:
                embedding.add(model, group, parts, batch_size, part, say, bar.update)
            elif not staged.joined(parts, group):
                raise RuntimeError(f"{group.key or group.files[0][0]} was embedded by nobody")
            staged.remove(parts.folder, group)
    new = len(parts.names()) - before
    return dict(
        new=new,
        already_there=before,
        skipped=len(parts.skipped) - skipped_before,
        pictures=before + new,
    )


def finish(parts: Parts, *, progress: bool = False) -> str:
    """Removes what was staged and not asked for in the end, and builds the graph of a large index.

    Returns:
        'exact' or 'graph', how it is searched.
    """
    storage.remove(files.join(parts.folder, STAGED))
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
