"""Weights to start from, as far as a choice needs to know them: no array is read."""

from __future__ import annotations

import os
import pathlib

import jax

from coca_jax import export_format
from coca_jax.checkpoints import checkpointing
from coca_jax.fitting.choose import Weights
from coca_jax.models import coca
from coca_jax.training import warm_start


def read(path: str) -> Weights:
    """What `path`, a run, a checkpoint or an export, holds.

    Raises:
        FileNotFoundError: no run and no export there.
        ValueError: a file, or open_clip's folder, which needs converting first.
    """
    if os.path.isfile(path):
        raise ValueError(
            f"--init_from={path} is a file: convert it first with coca-jax convert --input={path} "
            "--out=DIR, and give DIR"
        )
    if not os.path.isdir(path):
        raise FileNotFoundError(
            f"--init_from={path}: no such folder here; give a run or an export on this machine "
            "(coca-jax export --checkpoint=NAME_OR_URL --out=DIR brings others here)"
        )
    warm_start.check_place(path)
    if export_format.is_export(path):
        config = export_format.read_config(path)
        words = export_format.vocabulary_path(path)
    else:
        config = checkpointing.load_config(path)
        run = checkpointing.find_step(path)[0].parent
        words = str(run / "vocabulary.model")
    if config.data.resize == "native":
        raise ValueError(
            f"--init_from={path}: its images keep their aspect ratio, which fit does not; train "
            "with --config.init_from, or give weights of square images"
        )
    shapes = jax.eval_shape(lambda: coca.init(coca.build(config.model), jax.random.key(0)))
    return Weights(
        path=os.path.abspath(path),
        model=config.model,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        resize=config.data.resize,
        label_token=config.data.label_token,
        vocabulary=str(pathlib.Path(words).absolute()),
    )
