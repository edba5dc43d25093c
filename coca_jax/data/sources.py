"""Opens the entries of config.data.sources, wherever their data lie."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from coca_jax.data import kinds, views
from coca_jax.data.random_access import Source
from coca_jax.data.view_index import Indexes

# The key of an entry that names its place, and the module of coca_jax.data whose
# `open_entry(entry, split)` opens it. Only that module is imported.
PLACES = {"path": "prepared", "builtin": "drawn", "tfds": "tfds_source", "seqio": "seqio_source"}
_KEYS = {
    *PLACES, "split", "kind", "weight", "where", "text_field", "label_field", "captions", "prompts",
    "data_dir", "image_field", "limit", "objects", "questions", "answers", "module",
}  # fmt: skip


def open_source(
    config: str | Mapping[str, Any],
    split: str = "train",
    *,
    training: bool = False,
    indexes: Indexes | None = None,
) -> Source:
    """Opens one entry of `config.data.sources`, or a path of prepared data.

    Args:
        config: a path, or a mapping with one of
            path: a folder that `prepare` wrote;
            builtin: 'scenes' (with objects, how many a scene may have);
            tfds: a prepared TFDS data set (with data_dir, image_field where needed);
            seqio: a registered seqio Task (with module, image_field where needed);
            and, all optional,
            split: overrides the argument;
            kind: 'caption' (texts train), 'label' (class names train) or 'question' (each text
                is a question, and the labels are its answers);
            questions: of kind 'question', a field of `extra` that lists the questions of an image
                as {question, answer}, in place of texts and labels; an answer may be a list;
            answers: of kind 'question', only questions with one of these;
            where: {field: value or list of values} that records must have in their `extra`;
            text_field, label_field: fields of `extra` to take in place of text and label;
            captions: 'sampled' (one of an image's captions each time) or 'all' (each is an
                example);
            limit: use only the first so many records.
        split: the split where `config` names none.
        training: leave out records without what the kind trains on.
        indexes: where the index of a view is kept; None: beside the data, where that can be
            written.

    Raises:
        ValueError, FileNotFoundError: what is wrong with it, in one line.
    """
    entry: dict[str, Any] = {"path": config} if isinstance(config, str) else dict(config)
    unknown = sorted(set(entry) - _KEYS)
    if unknown:
        raise ValueError(f"data source {entry}: unknown keys {unknown}; known: {sorted(_KEYS)}")
    kinds.of(entry)
    places = [place for place in PLACES if entry.get(place)]
    if len(places) != 1:
        raise ValueError(f"data source {entry}: give exactly one of {', '.join(PLACES)}")
    place = importlib.import_module(f"coca_jax.data.{PLACES[places[0]]}")
    source = place.open_entry(entry, entry.get("split") or split)
    return views.narrow(source, entry, training=training, indexes=indexes)
