"""Opens the entries of config.data.sources, wherever their data lie."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from coca_jax.config import Entry
from coca_jax.data import views
from coca_jax.data.random_access import Source
from coca_jax.data.view_index import Indexes

# The key of an entry that names its place, and the module of coca_jax.data whose
# `open_entry(entry, split)` opens it. Only that module is imported.
PLACES = {"path": "prepared", "builtin": "drawn", "tfds": "tfds_source", "seqio": "seqio_source"}


def open_source(
    entry: Entry | Mapping[str, Any] | str,
    split: str = "train",
    *,
    training: bool = False,
    indexes: Indexes | None = None,
) -> Source:
    """Opens one entry of `config.data.sources`, or a path of prepared data.

    Args:
        entry: a path, or what `config.Entry` has, with one of path, builtin, tfds and
            seqio.
        split: the split where the entry names none.
        training: leave out records without what the kind trains on.
        indexes: where the index of a view is kept; None: beside the data, where that can be
            written.

    Raises:
        ValueError, FileNotFoundError: what is wrong with it, in one line.
    """
    entry = Entry.of(entry)
    return views.narrow(open_whole(entry, split), entry, training=training, indexes=indexes)


def open_whole(entry: Entry, split: str = "train") -> Source:
    """All records of an entry's split, also those that it leaves out. Raises as `open_source`."""
    places = [place for place in PLACES if getattr(entry, place)]
    if len(places) != 1:
        raise ValueError(f"data source {entry.to_dict()}: give exactly one of {', '.join(PLACES)}")
    place = importlib.import_module(f"coca_jax.data.{PLACES[places[0]]}")
    return place.open_entry(entry, entry.split or split)
