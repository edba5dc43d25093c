"""From a place to a model: runs, exports, converted weights and open_clip's own."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax import export_format, partitioning
from coca_jax.config import StoredConfig
from coca_jax.data import vocabulary
from coca_jax.data.vocabulary import Vocabulary
from coca_jax.files import local_files, storage
from coca_jax.inference import devices as chosen_devices
from coca_jax.inference import read_images
from coca_jax.inference.model import CoCaModel
from coca_jax.inference.two_towers import TwoTowerModel
from coca_jax.interop import hub, weights_files
from coca_jax.interop.open_clip_layout import compare
from coca_jax.machine import compile_cache
from coca_jax.models import coca, roles, two_towers


def load(
    path: str | os.PathLike[str],
    *,
    pretrained: str = "",
    dtype: str | None = None,
    narrow: bool = True,
    **options: Any,
) -> CoCaModel:
    """Loads a model to use; of weights without a decoder a `TwoTowerModel`, which has the methods
    that need none.

    Args:
        path: a run's workdir, its checkpoints folder or one step of it (the averaged parameters
            where the run kept them); an export or converted folder; or open_clip's own weights
            (.bin, .pt, .safetensors, or their folder), converted on the way; CLIP's, MetaCLIP's
            and SigLIP's too, which have no decoder (two_towers.py). Local, or in a bucket (gs://,
            s3://). Or a name: 'hf-hub:org/name[@revision]' on the Hugging Face hub, or one of
            open_clip's, 'coca_ViT-L-14' with its `pretrained` or 'coca_ViT-L-14:TAG'.
        pretrained: which weights of open_clip's name; see `coca_jax.list_pretrained`.
        dtype: 'float32' or 'bfloat16', of weights and products; default: the run's.
        narrow: of a model that computes in bfloat16 the matrices are kept in it; False keeps them
            as they were stored, for what writes them again.
        options: of `CoCaModel`.

    Raises:
        FileNotFoundError: nothing of that kind at `path`, or the hub cannot be reached.
        ValueError: damaged or mismatched files, an unknown name, tag or dtype.
        OSError: what converts weights on the way was ended by a signal.
        TypeError: an option that there is not.
    """
    _check(path, dtype, options)
    path = hub.local(local_files.from_home(os.fspath(path)), pretrained)
    compile_cache.use()
    place, step = storage.place(path), None
    if not storage.reach(place):
        raise FileNotFoundError(
            f"{path} does not exist; give a run, an export, weights or hf-hub:OWNER/NAME"
        )
    export_format.refuse_file(path)
    if place.is_dir() and export_format.is_export(path):
        params, config = export_format.read_export(path)
        if not export_format.has_checksums(path):
            _check_fit(params, config, path)
        words = vocabulary.load(export_format.vocabulary_path(path))
    elif place.is_dir() and not any((place / name).exists() for name in weights_files.FOREIGN):
        export_format.refuse_half(path)
        weights_files.refuse_shards(path)
        params, config, words, step = _read_run(path)
    else:
        with storage.local_copy(path) as copy:
            params, config, words = _read_open_clip(copy)
    stored = config.model.dtype
    if dtype is not None:
        config = config.change({"model.dtype": dtype})
    if narrow and config.model.dtype == "bfloat16":
        params = roles.narrow(params)
    kind: Any = CoCaModel if config.model.family == "coca" else TwoTowerModel
    model: CoCaModel = kind(config, params, words, **options)
    model.stored_dtype, model.step = stored, step
    return model


def _check(path: Any, dtype: str | None, options: dict[str, Any]) -> None:
    """Raises ValueError for what is no path or dtype, TypeError for an option that models do not
    have, before anything is read."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):  # of which "" is here
        raise ValueError(f"path={path!r}: give a run, an export, weights or hf-hub:OWNER/NAME")
    if dtype is not None:
        try:
            StoredConfig().change({"model.dtype": dtype})
        except ValueError as error:  # it names the key, and here there is an argument
            raise ValueError(str(error).replace("config.model.dtype", "dtype", 1)) from None
    known = [name for name in inspect.signature(CoCaModel).parameters][3:]  # after the weights
    for name, value in options.items():
        if name in ("device", "gpu"):
            platform = str(value).partition(":")[0] if name == "device" else "gpu"
            raise TypeError(f"{name}={value!r}: give devices=jax.devices({platform!r})")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise TypeError(f"{name}={value!r}: no option of load; {remedy}")
    read_images.check_batch_size(options.get("batch_size", 1))
    chosen_devices.check(options.get("devices"))


def _check_fit(params: dict, config: StoredConfig, path: str) -> None:
    """Raises ValueError for an export whose configuration is of another model than its arrays:
    somebody else wrote it, or changed it."""
    given = {name: tuple(x.shape) for name, x in export_format.flatten(params).items()}
    sigmoid = roles.sigmoid_bias(params) is not None
    if config.model.family != "coca":
        towers = two_towers.build(config.model, sigmoid=sigmoid)
        made: Any = functools.partial(two_towers.init, towers)
    else:
        module = coca.build(
            config.model,
            sigmoid=sigmoid,
            head=config.head if roles.has_task_head(params) else None,
            num_classes=len(config.class_names),
        )
        made = functools.partial(coca.init, module)
    shapes = jax.eval_shape(lambda: partitioning.unbox(made(jax.random.key(0))))
    wanted = {name: tuple(x.shape) for name, x in export_format.flatten(shapes).items()}
    problems = compare(given, wanted)
    if problems:
        raise ValueError(f"{path}: its arrays do not fit its config.json: {'; '.join(problems)}")


def _read_run(path: str) -> tuple[dict, StoredConfig, Vocabulary, int]:
    from coca_jax.checkpoints import checkpointing  # Orbax: only where a run is read

    params, config, step = checkpointing.load_step(path)
    file = checkpointing.find_step(path)[0].parent / "vocabulary.model"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing, the run's own vocabulary; copy it there from where the run was"
        )
    words = vocabulary.load(str(file))
    if config.vocabulary_checksum not in ("", words.checksum):
        raise ValueError(f"{file} is not the vocabulary that this run was trained with; restore it")
    return params, config, words, step


def _read_open_clip(path: str) -> tuple[dict, StoredConfig, Vocabulary]:
    """Through the command, which says in one line what is wrong with a file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "coca_jax.convert", f"--input={path}", f"--out={folder}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode < 0:  # what it said last is no reason
            raise OSError(
                f"{path}: its conversion was ended by signal {-done.returncode}, perhaps for want "
                f"of memory or of room in {tempfile.gettempdir()}; convert it once: coca-jax "
                f"convert --input={path} --out=weights"
            )
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1].removeprefix("error: ")
            if "--bpe" in why:  # a flag of that command alone
                why = f"{why}: coca-jax convert --input={path} --bpe=FILE --out=weights"
            raise ValueError(why)
        params, config = export_format.read_export(folder)
        words = vocabulary.load(export_format.vocabulary_path(folder))
        return jax.tree.map(jnp.asarray, params), config, words
