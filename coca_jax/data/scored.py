"""Whether data hold the scores by which captions='scored' draws their texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coca_jax.config import Entry
from coca_jax.data.sources.source import Source, read_all
from coca_jax.data.texts import made_of

_AT_ONCE = 256  # records


def check(sources: Sequence[Source], entries: Sequence[Entry]) -> None:
    """Raises ValueError for a source of captions='scored' whose records have no scores, or those of
    other texts than are read: they would be drawn alike, whatever `synthetic` says. Reads texts
    until it finds scores, and judges by that block. entries: of the sources."""
    for source, entry in zip(sources, entries):
        if entry.captions == "scored" and entry.path and not _has_scores(source):
            raise ValueError(
                f"data source {source.name}: captions='scored', and its records have no scores of "
                "the texts that are read; give what `coca-jax recaption --to=array_record` wrote "
                "(of its tars with text_field='texts'), or leave captions out"
            )


def _has_scores(source: Source) -> bool:
    for start in range(0, len(source), _AT_ONCE):
        rows = np.arange(start, min(start + _AT_ONCE, len(source)))
        records, unread = read_all(source, rows, texts=True)
        read = [one for row, one in enumerate(records) if row not in unread and one.texts]
        known = [(one, made) for one in read if (made := made_of(one.extra))]
        if known:
            # An image may keep a single text, whose score is that of the only one that is read.
            fits = [len(made["scores"]) == len(one.texts) for one, made in known]
            several = any(ok and len(one.texts) > 1 for ok, (one, _) in zip(fits, known))
            return several or all(fits)
    return False
