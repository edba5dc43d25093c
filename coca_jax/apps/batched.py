"""A model as one picklable function of columns, for data engines: Ray Data, datasets, Daft, Spark.

    annotate = coca_jax.apps.batched("captions", "runs/mine")
    annotate({"image": [jpeg_bytes, "photos/a.jpg"], "id": [1, 2]})
    # {"id": [1, 2], "caption": ["a dog", "a cat"], "error": ["", ""]}

The model is loaded at the first call in each process. docs/recaption.md has an example per engine.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

KINDS = ("captions", "embeddings", "scores")
Columns = Mapping[str, Any]

_models: dict[tuple[str, str], Any] = {}  # of this process
_loading = threading.Lock()


def batched(
    kind: str,
    checkpoint: str,
    *,
    image_column: str = "image",
    text_column: str = "text",
    load: Mapping[str, Any] | None = None,
    **generation: Any,
) -> Batched:
    """A function of a batch: dict of columns in, dict of columns out.

    Args:
        kind: 'captions' adds `caption`; 'embeddings' adds `image_embedding` and, where there is a
            column of texts, `text_embedding` (float32 [N, D], L2-normalized); 'scores' adds
            `score`, the cosine similarity of each image and its text.
        checkpoint: what `coca_jax.load` takes.
        image_column: encoded bytes, {bytes, path} as datasets has them, paths, URLs, PIL images or
            uint8 arrays [H, W, 3]. It is left out of the result.
        text_column: strings.
        load: more arguments of `coca_jax.load`, such as dict(batch_size=64).
        generation: of captions, fields of the generation settings.

    An image that cannot be decoded has its reason in the column `error` ('' for all others), an
    empty caption, and NaN for its embedding or score.

    Raises ValueError for an unknown kind, and for generation settings of another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"batched({kind!r}, ...): choose from {', '.join(KINDS)}")
    if generation and kind != "captions":
        raise ValueError(f"batched({kind!r}, ...): {', '.join(generation)} are for 'captions'")
    return Batched(kind, checkpoint, image_column, text_column, dict(load or {}), generation)


class Batched:
    """See `batched`. It holds no model, so pickling it is cheap."""

    def __init__(
        self,
        kind: str,
        checkpoint: str,
        image_column: str,
        text_column: str,
        load: dict[str, Any],
        generation: dict[str, Any],
    ):
        self.kind, self.checkpoint = kind, checkpoint
        self.image_column, self.text_column = image_column, text_column
        self.load, self.generation = load, generation

    def __call__(self, columns: Columns) -> dict[str, Any]:
        """The columns of a batch but the images, and those that this function adds.

        Raises:
            ValueError: a column is missing.
        """
        needed = [self.image_column, *([self.text_column] if self.kind == "scores" else [])]
        for name in needed:
            if name not in columns:
                raise ValueError(f"batched: no column {name!r}; there are {', '.join(columns)}")
        model = self._model()
        pixels, errors = _decoded(model, list(columns[self.image_column]))
        good = [number for number, error in enumerate(errors) if not error]
        usable = [pixels[number] for number in good]
        found: dict[str, Any] = {k: v for k, v in columns.items() if k != self.image_column}
        if self.kind == "captions":
            captions = [""] * len(errors)
            for number, text in zip(
                good, model.caption(usable, **self.generation) if usable else ()
            ):
                captions[number] = text
            return found | dict(caption=captions, error=errors)
        size = model.config.model.embed_dim
        images = np.full((len(errors), size), np.nan, np.float32)
        if usable:
            images[good] = model.encode_image(usable)
        if self.kind == "embeddings":
            found["image_embedding"] = images
        if self.text_column in columns:
            texts = [str(text) for text in columns[self.text_column]]
            encoded = model.encode_text(texts) if texts else np.zeros((0, size), np.float32)
            if self.kind == "embeddings":
                found["text_embedding"] = encoded
            else:
                found["score"] = (images * encoded).sum(1)
        return found | dict(error=errors)

    def _model(self) -> Any:
        key = (self.checkpoint, repr(sorted(self.load.items())))
        with _loading:
            if key not in _models:
                import coca_jax

                _models[key] = coca_jax.load(self.checkpoint, **self.load)
        return _models[key]


def _decoded(model: Any, images: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Images as the model takes them (None for one that cannot be decoded), and why not."""

    def one(image: Any) -> tuple[Any, str]:
        if isinstance(image, Mapping):  # of datasets with decode=False
            image = image.get("bytes") or image.get("path")
        if image is None:
            return None, "no image"
        try:
            return model.fit_image(image), ""
        except (ValueError, OSError) as error:
            return None, " ".join(str(error).split()) or type(error).__name__

    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = list(pool.map(one, images))
    return [pixels for pixels, _ in found], [error for _, error in found]
