"""The vocabulary of a run: kept in its workdir, given, inherited or trained on its own texts."""

from __future__ import annotations

import os
import time

from absl import logging

from coca_jax.config import Config, Recipe, typed
from coca_jax.data import vocabulary as vocabularies
from coca_jax.data.mixture import Mixture
from coca_jax.data.vocabulary import Vocabulary
from coca_jax.interop import export_format
from coca_jax.runtime import activity, storage

VOCABULARY_FILE = "vocabulary.model"
_SENTENCES_PER_PIECE = 50  # enough for stable unigram probabilities, and quick for small sizes


def load_or_train(
    config: Recipe, workdir: str, mixture: Mixture | None = None, *, process_index: int = 0
) -> Vocabulary:
    """The vocabulary of a run: the one in `workdir`, else a given one, else that of the run or
    weights it starts from, else a trained one.

    It is kept as `workdir/vocabulary.model`. With several processes the first one makes it and
    the others wait for the file. `mixture` is that of `config`, where it is open already.

    Raises:
        ValueError: more ids than `config.model.text.vocab_size`, no label symbol where the
            configuration wants it, another vocabulary than the run began with, weights to start
            from without theirs, or nothing to train on.
        FileNotFoundError: `config.data.vocabulary` does not exist, and no run began here.
    """
    config = typed(config)
    path = f"{os.fspath(workdir)}/{VOCABULARY_FILE}"
    place = config.data.vocabulary or _vocabulary_of_weights(config)
    stored = storage.place(path).exists()
    began = storage.place(f"{os.fspath(workdir)}/config.json").exists()
    given = _load_given(place, bool(config.data.vocabulary), stored and began) if place else None
    if given and config.data.vocabulary and not process_index:
        _warn_of_another(config, given)
    if stored:
        vocabulary = vocabularies.load(path)
        if given is None and not began and not process_index:
            # Of a start that was stopped, or put there. Its data may have been others.
            logging.warning(
                "the %d pieces of %s are used; no run began here, so remove that file to train new "
                "ones on the run's own texts",
                *(vocabulary.size, path),
            )
        if given is not None and given.checksum != vocabulary.checksum:
            raise ValueError(
                f"data.vocabulary={place} (sha256 {given.checksum[:12]}) is not "
                f"what {path} holds ({vocabulary.checksum[:12]}); use a new workdir"
                + ("" if began else ", or remove that file: no run began here yet")
            )
    elif process_index:
        there = storage.place(path)
        # It reads a sample of all data, in a bucket shard by shard, and then trains.
        activity.until(f"process 0 to write {path}", lambda: there.exists() or None, hours=24)
        vocabulary = vocabularies.load(path)
    elif given is not None:
        _check(config, given)  # before anything is left in the workdir
        given.save(path)
        vocabulary = given
    else:
        vocabulary = _train(config, path, mixture, process_index)
    _check(config, vocabulary)
    return vocabulary


def _train(config: Config, path: str, mixture: Mixture | None, process_index: int) -> Vocabulary:
    """A new vocabulary of the run's own texts. Raises ValueError where weights are of another."""
    if config.init_from and config.init_parts == "all":
        raise ValueError(
            f"init_from={config.init_from} has no vocabulary beside its weights, and pieces of a "
            "new one would not be theirs; give the file as data.vocabulary"
        )
    size = config.model.text.vocab_size
    started = time.monotonic()
    mixture = mixture or Mixture(config, os.path.dirname(path), process_index)
    sample = mixture.sample_texts(size * _SENTENCES_PER_PIECE)
    kind = config.data.vocabulary_kind
    vocabulary = vocabularies.train(sample, size, path, config.seed, kind=kind)
    logging.info(
        "vocabulary: %d pieces trained in %.1f s -> %s",
        *(vocabulary.size, time.monotonic() - started, path),
    )
    return vocabulary


def _check(config: Config, vocabulary: Vocabulary) -> None:
    config.model.check_vocabulary(vocabulary.size)
    if config.data.label_token and vocabulary.label_id is None:
        raise ValueError("data.label_token: this vocabulary has no symbol for it; set false")


def _warn_of_another(config: Config, given: Vocabulary) -> None:
    """Where weights know the pieces of another vocabulary than the one that is named: of the same
    size, nothing else would be wrong but every text."""
    beside = _vocabulary_of_weights(config)
    if not beside:
        return
    theirs = vocabularies.load(beside)
    if theirs.checksum != given.checksum:
        logging.warning(
            "data.vocabulary=%s is not %s, with which the weights of init_from were trained: their "
            "embeddings of pieces are of others; leave data.vocabulary out to use it",
            *(config.data.vocabulary, beside),
        )


def _load_given(place: str, named: bool, goes_on: bool) -> Vocabulary | None:
    """The vocabulary of a file; None where it is gone and a run that goes on has its own."""
    try:
        return vocabularies.load(place)
    except FileNotFoundError:
        if goes_on:
            return None
        key = "data.vocabulary" if named else "init_from has its vocabulary at"
        raise FileNotFoundError(
            f"{key}={place}: no such file; give a tokenizer's (.model, .bpe.gz or .json), or '' to "
            "train one on the run's own text"
        ) from None


def _vocabulary_of_weights(config: Config) -> str:
    """The tokenizer of the weights at `config.init_from`; '' where there is none, or the image
    encoder alone is taken: the rest of such a run starts new, its words too."""
    if not config.init_from or config.init_parts != "all":
        return ""
    return export_format.vocabulary_beside(config.init_from)
