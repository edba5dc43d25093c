"""From a place to a model: runs, exports, converted weights and open_clip's own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.config import StoredConfig
from coca_jax.data import vocabulary
from coca_jax.data.vocabulary import Vocabulary
from coca_jax.inference import devices as chosen_devices
from coca_jax.inference import preprocess
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.inference.model import CoCaModel, model_class
from coca_jax.interop import export_format, hub, onnx_encoder, weights_files
from coca_jax.interop.open_clip_weights import compare
from coca_jax.models import network, param_groups
from coca_jax.parallel import sharding
from coca_jax.runtime import machine, storage


def load(
    path: str | os.PathLike[str],
    pretrained: str | None = None,
    *,
    dtype: str | None = None,
    batch_size: int = 64,
    num_frames: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    class_names: Sequence[str] | None = None,
    narrow: bool = True,
) -> CoCaModel:
    """Implements `coca_jax.load`, which documents the arguments."""
    _check(path, dtype)
    preprocess.check_batch_size(batch_size)
    chosen_devices.check(devices)
    path = hub.local(storage.from_home(os.fspath(path)), pretrained or "")
    machine.use()
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
        params = param_groups.narrow(params)
    model: CoCaModel = model_class(config.model.family)(
        config,
        params,
        words,
        batch_size=batch_size,
        num_frames=num_frames,
        devices=devices,
        class_names=class_names,
    )
    model.stored_dtype, model.step = stored, step
    if model.writes_captions and place.is_dir():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def _check(path: Any, dtype: str | None) -> None:
    """Raises ValueError for a value that is not a path or a dtype, before anything is read."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):  # of which "" is here
        raise ValueError(f"path={path!r}: give a run, an export, weights or hf-hub:OWNER/NAME")
    if dtype is not None:
        try:
            StoredConfig().change({"model.dtype": dtype})
        except ValueError as error:  # it names the key, and here there is an argument
            raise ValueError(str(error).replace("config.model.dtype", "dtype", 1)) from None


def _check_fit(params: dict, config: StoredConfig, path: str) -> None:
    """Raises ValueError for an export whose configuration is of another model than its arrays:
    somebody else wrote it, or changed it."""
    given = {name: tuple(x.shape) for name, x in export_format.flatten(params).items()}
    module = network.build(
        config.model,
        sigmoid=param_groups.sigmoid_bias(params) is not None,
        head=config.head if param_groups.has_task_head(params) else None,
        num_classes=len(config.class_names),
    )
    shapes = jax.eval_shape(lambda: sharding.unbox(network.init(module, jax.random.key(0))))
    wanted = {name: tuple(x.shape) for name, x in export_format.flatten(shapes).items()}
    problems = compare(given, wanted)
    if problems:
        raise ValueError(f"{path}: its arrays do not fit its config.json: {'; '.join(problems)}")


def _read_run(path: str) -> tuple[dict, StoredConfig, Vocabulary, int]:
    from coca_jax.checkpoints import manager  # Orbax: only where a run is read

    params, config, step = manager.load_step(path)
    workdir = manager.find_step(path)[0].parent
    moved = os.path.join(workdir, "encoder", onnx_encoder.FILE)
    if config.model.image.onnx and os.path.exists(moved):  # the run's own copy
        config = config.change({"model.image.onnx": os.path.abspath(moved)})
    file = workdir / "vocabulary.model"
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
        command = [
            sys.executable,
            "-m",
            "coca_jax.cli.convert",
            f"--input={path}",
            f"--out={folder}",
        ]
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
