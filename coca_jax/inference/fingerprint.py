"""What tells a model from another: its weights, and all else that its embeddings depend on.

A checksum is that of the weights, '-' and that of the rest; older files hold the first alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coca_jax.config import Data, Model
from coca_jax.config.base import Section
from coca_jax.data.vocabulary import Vocabulary

# Of config.model: what only training reads, and how the same numbers are computed.
_NO_MATTER = (
    *("temperature", "dtype", "implementation", "layer_scale"),
    *("image.patch_dropout", "image.onnx", "pooler.token_dropout", "pooler.query_std"),
)


def of_rest(model: Model, data: Data, vocabulary: Vocabulary) -> str:
    """16 hexadecimal digits of `rest`."""
    text = json.dumps(rest(model, data, vocabulary), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rest(model: Model, data: Data, vocabulary: Vocabulary) -> dict[str, Any]:
    """What is no weight, by its key: activation, preprocessing, tokenizer and so on. Values that
    are the default count for nothing, so that a new key changes no checksum. How many frames a
    model takes is each caller's own: an index, which is of pictures, takes none."""
    settings: dict[str, Any] = {
        name: value for name, value in _changed(model) if name not in _NO_MATTER
    }
    settings |= dict(_changed(data, ("resize", "label_token")))
    if data.resize == "native":
        settings |= dict(_changed(data, ("max_patches",)))
    return settings | dict(vocabulary=vocabulary.checksum)


def _changed(section: Section, names: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """(key, value) of what is not the default; names: of these keys alone."""
    for field in dataclasses.fields(section):
        value, default = getattr(section, field.name), field.default
        if isinstance(value, Section):
            for name, inner in _changed(value):
                yield f"{field.name}.{name}", inner
        elif (not names or field.name in names) and value != default:
            yield field.name, dict(value) if isinstance(value, Mapping) else value


def same(stored: str, now: str) -> bool:
    """Whether a checksum that a file holds is that of the model now."""
    return now in (stored, f"{stored}-{now.partition('-')[2]}")


def same_request(stored: Mapping[str, Any] | None, now: Mapping[str, Any]) -> bool:
    """Whether two mappings are equal, the checksums below 'weights' compared as `same` does."""
    stored = stored or {}
    if not isinstance(stored.get("weights"), str) or not same(stored["weights"], now["weights"]):
        return False
    return {**stored, "weights": ""} == {**now, "weights": ""}
