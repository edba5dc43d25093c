"""What is checked before a run reads its data, and before it trains on them."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
from jax.sharding import Mesh

from coca_jax import ops
from coca_jax.checkpoints import config_file, manager, steps
from coca_jax.config import Config, Entry
from coca_jax.data import source_index, vocabulary
from coca_jax.data.batches import check_loader
from coca_jax.data.mixture import Mixture
from coca_jax.data.sources import files
from coca_jax.parallel import sharding
from coca_jax.runtime import out_folder, storage
from coca_jax.runtime.signals import Stop
from coca_jax.training import (
    auto_mesh,
    best_checkpoint,
    guard,
    run_vocabulary,
    trackers,
    warm_start,
)
from coca_jax.training.optimizer import orthogonalises


def _resumes(workdir: str) -> bool:
    """Whether a run there has saved a step: it does not read again what it started from."""
    try:
        return bool(manager.find_steps(workdir)[1])
    except FileNotFoundError:
        return False


def check_start(config: Config, workdir: str) -> None:
    """Raises ValueError or FileNotFoundError for weights that a new run cannot start from, before
    any data are read."""
    if config.init_from and not _resumes(workdir):
        warm_start.check_weights(config.init_from)
        warm_start.check_model(config)


def check(config: Config, workdir: str) -> Mesh:
    """The mesh of a run. Raises ValueError for a config that cannot be, before any long work."""
    choice = check_config(config)
    if choice.reason:
        say(choice.reason)
    steps.check_writable(workdir)
    check_start(config, workdir)
    for source in config.data.sources:
        out_folder.check_apart(workdir, source.path)
    check_seen(config.data.sources, workdir)
    sources = tuple(
        dataclasses.replace(one, path=source_index.planned(one.path, workdir))
        if source_index.is_needed(one)
        else one
        for one in config.data.sources
    )
    planned = config.change({"data.sources": tuple(one.to_dict() for one in sources)})
    config_file.check_before_data(planned, workdir)
    return choice.mesh


def check_seen(sources: Sequence[Entry], workdir: str) -> None:
    """Raises FileNotFoundError where a run that goes on is asked for in another folder, from which
    its data are not seen, and would be taken for one of other data."""
    if not (storage.place(workdir) / "config.json").exists():
        return
    for one in sources:
        whole = os.path.isabs(one.path) or files.is_remote(one.path)
        if one.path and not (whole or files.is_pattern(one.path) or files.exists(one.path)):
            raise FileNotFoundError(
                f"data source {one.path} is not there, seen from {os.getcwd()}; run the command in "
                "the folder from which it is seen, or put it back"
            )


def check_config(config: Config) -> auto_mesh.Choice:
    """The mesh of a run that may start later. Raises as `check`, for what needs no workdir."""
    choice = check_devices(config)
    guard.check(config.eval)
    best_checkpoint.check(config.checkpoint.best, config.eval)
    Mixture(config)  # which opens nothing yet: kinds, and shares of a batch
    return choice


def check_devices(config: Config) -> auto_mesh.Choice:
    """The mesh of a run whose data are still to come. Raises as `check`, for what needs neither
    them nor a workdir."""
    config.check()
    check_loader(config.data.loader)
    trackers.check(config.log.trackers)
    choice = auto_mesh.make(config)
    config_file.check_batch(config, sharding.batch_parts(choice.mesh))
    sharding.readers(choice.mesh)  # which processes read which rows, or why they cannot
    check_features(config.data.features)
    check_started(config)
    return choice


def check_features(folder: str) -> None:
    """Raises ValueError where tokens of the image encoder cannot be kept: in what is no folder of
    this machine, or by several processes."""
    if folder and jax.process_count() > 1:
        raise ValueError(
            f"data.features={folder} is for one process, these are {jax.process_count()}; set it "
            "to ''"
        )
    if not folder:
        return
    if storage.is_remote(folder):
        raise ValueError(f"data.features={folder} is no folder of this machine; give one")
    try:
        storage.check_writable(folder, make=False)
    except ValueError as error:
        raise ValueError(f"data.features: {error}") from None


def check_started(config: Config) -> None:
    """Raises ValueError where parts stay as they are and no weights say how."""
    optimizer = config.optimizer
    if config.init_from:
        return
    if optimizer.image_learning_rate == 0:
        raise ValueError(
            "optimizer.image_learning_rate=0 locks the image encoder and needs init_from, the "
            "weights that it has; without any set -1"
        )
    if optimizer.text_learning_rate == 0:
        raise ValueError(
            "optimizer.text_learning_rate=0 locks the text tower and needs init_from, the weights "
            "that it has; without any set -1"
        )
    if optimizer.keep_embeddings:
        raise ValueError(
            "optimizer.keep_embeddings keeps what weights have and needs init_from; without any "
            "set it to False"
        )
    if optimizer.lora_rank:
        raise ValueError(
            f"optimizer.lora_rank={optimizer.lora_rank} adapts kernels that weights have and needs "
            "init_from; without any set it to 0"
        )


def with_examples(config: Config, mixture: Mixture) -> Config:
    """The config with how many examples the data have, where the loss against all of them asks.

    Raises ValueError for fewer than the data have."""
    if config.loss.contrastive != "global" or not config.loss.contrastive_weight:
        return config
    given, found = config.loss.global_examples, mixture.num_examples
    if given and given < found:
        raise ValueError(
            f"loss.global_examples={given} is less than the {found} examples of the data; leave it "
            "at 0"
        )
    return config.change({"loss.global_examples": given or found})


def check_vocabulary(config: Config, old: dict[str, Any], workdir: str) -> None:
    """Raises ValueError where a run that goes on would read other tokens than it began with.

    old: the contents of the run's config.json.
    """
    bound = old.get("vocabulary_checksum")
    if bound is None:
        return
    path = storage.place(workdir) / run_vocabulary.VOCABULARY_FILE
    place = path if path.exists() else config.data.vocabulary
    if not place:
        raise ValueError(
            f"{path} is missing, and the run of {workdir} was trained with it (sha256 "
            f"{bound[:12]}); put it back"
        )
    found = vocabulary.load(place).checksum
    if found != bound:
        raise ValueError(
            f"{place} (sha256 {found[:12]}) is not the vocabulary that the run of {workdir} was "
            f"trained with ({bound[:12]}); put that one back, or use a new --workdir"
        )


Kernels = Sequence[futures.Future[Any]]


def begin_kernels(config: Config, platform: str) -> Kernels:
    """See `Reference.begin_kernels`: of the config's train step."""
    form = ops.choose(platform, config.model.implementation)
    return form.begin_kernels(
        config.model.dtype,
        convolutions=bool(config.model.image.conv_widths),
        muon=orthogonalises(config.optimizer),
    )


def wait_for_kernels(kernels: Kernels, stop: Stop) -> None:
    """Waits until they are compiled, and says so where that takes more than a second."""
    if futures.wait(kernels, timeout=1).not_done:
        begin(stop, "compiling kernels for this processor, once")
        futures.wait(kernels)


def begin(stop: Stop, work: str) -> None:
    """Says on standard error what takes the time that follows ('reading data'). A request to stop
    can leave it at any moment."""
    stop.stage(work)
    say(f"{work} ...")


def say(line: str) -> None:
    """Prints a line on standard error, on the main process."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
