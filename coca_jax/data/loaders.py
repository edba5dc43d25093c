"""The batches of a process, by the loader that a run asks for: `direct`, or seqio's Tasks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from coca_jax import extras
from coca_jax.config import Config
from coca_jax.data.batches import Batches, DirectStream, Stream
from coca_jax.data.features import Features
from coca_jax.data.mixture import Mixture
from coca_jax.data.vocabulary import Vocabulary


def check_loader(loader: str) -> None:
    """Raises ValueError for a `config.data.loader` that is not installed."""
    if loader == "seqio" and not importlib.util.find_spec("seqio"):
        raise ValueError(
            "data.loader='seqio' needs the extra 'seqio', which brings TensorFlow: "
            f"{extras.remedy('seqio')}; data.loader='direct' gives the same batches without it"
        )


def open_stream(
    config: Config,
    vocabulary: Vocabulary,
    mixture: Mixture | None = None,
    *,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    class_names: Sequence[str] = (),
    features: Sequence[Features] = (),
) -> Stream:
    """The batches of this process, from step `start_step` on, without end; see `Batches`.

    They are made by `Batches` itself, or with `config.data.loader='seqio'` by seqio's Tasks and
    mixture (seqio_tasks.py); they are the same.

    Raises:
        ValueError, FileNotFoundError: what `Batches` raises; an unknown loader, or one that is not
            installed; later, with the batch that it concerns, what `Batches.batch` raises, or more
            undecodable images than `config.data.max_bad_fraction`.
    """
    check_loader(config.data.loader)
    batches = Batches(
        config,
        vocabulary,
        mixture,
        process_index=process_index,
        process_count=process_count,
        class_names=class_names,
        features=features,
    )
    if config.data.loader == "direct":
        return DirectStream(batches, start_step)
    from coca_jax.data.seqio_tasks import SeqioStream  # imports TensorFlow

    return SeqioStream(config, vocabulary, batches, start_step)
