"""Weights to start from: found by a path or a name, and what a choice needs to know of them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import jax

from coca_jax import export_format, inference
from coca_jax.checkpoints import checkpointing
from coca_jax.config import Config, StoredConfig
from coca_jax.files import local_files, storage
from coca_jax.fitting.choose import Weights
from coca_jax.inference import export_folder
from coca_jax.interop import hub, weights_files
from coca_jax.models import coca


def check(path: str) -> None:
    """Raises ValueError or FileNotFoundError for weights that `read` would refuse, as far as that
    is known without downloading or converting them."""
    if hub.is_name(path):
        hub.resolve(path)  # refuses an unknown tag
        if not path.startswith((hub.PREFIX, "coca_")):
            raise _no_decoder(path)
    elif not storage.reach(storage.place(local_files.from_home(path))):
        raise FileNotFoundError(
            f"--init_from={path}: does not exist. Give a run, an export, a file of open_clip's "
            "weights, hf-hub:OWNER/NAME or a model name such as "
            "coca_ViT-B-32:laion2b_s13b_b90k."
        )
    elif _is_ours(path):
        _check_model(_config(path), path)


def read(path: str, into: str, say: Callable[[str], None] = print) -> Weights:
    """What `path` holds: a run, an export, or anything else that `coca_jax.load` takes. The last
    (open_clip's weights, and everything that is not in a local folder) is written to the folder
    `into` as an export, from which training can start.

    Raises as `check` and `coca_jax.load` do.
    """
    check(path)
    place = hub.local(local_files.from_home(path))
    if not _is_ours(place):
        say(f"--init_from={path}: converting it into {into}")
        model = inference.load(place, narrow=False)
        _check_model(model.config, path)
        export_folder.write(model, into)
        place = into
    config = _config(place)
    _check_model(config, path)
    if export_format.is_export(place):
        words = export_format.vocabulary_path(place)
    else:
        words = str(checkpointing.find_step(place)[0].parent / "vocabulary.model")
    shapes = jax.eval_shape(lambda: coca.init(coca.build(config.model), jax.random.key(0)))
    return Weights(
        path=os.path.abspath(place),
        name=path,
        model=config.model,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        resize=config.data.resize,
        label_token=config.data.label_token,
        vocabulary=str(pathlib.Path(words).absolute()),
    )


def _is_ours(path: str) -> bool:
    """Whether it is a local folder of a run or an export, from which training starts as it is."""
    if not os.path.isdir(path):
        return False
    foreign = any(os.path.exists(os.path.join(path, name)) for name in weights_files.FOREIGN)
    return export_format.is_export(path) or not foreign


def _config(path: str) -> StoredConfig:
    if export_format.is_export(path):
        return export_format.read_config(path)
    export_format.refuse_half(path)
    weights_files.refuse_shards(path)
    return checkpointing.load_config(path)


def _check_model(config: Config, path: str) -> None:
    if config.model.family != "coca":
        raise _no_decoder(path)
    if config.data.resize == "native":
        raise ValueError(
            f"--init_from={path}: its images keep their aspect ratio, which fit does not support. "
            "Train with coca-jax train --config.init_from, or give weights of square images."
        )


def _no_decoder(path: str) -> ValueError:
    return ValueError(
        f"--init_from={path}: this model has an image and a text tower but no decoder. Such models "
        "can be loaded to encode, search and classify, but not fine-tuned yet. Give a CoCa model, "
        "such as coca_ViT-B-32:laion2b_s13b_b90k."
    )
