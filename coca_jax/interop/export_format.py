"""The export folder: weights without optimizer state, with all that it takes to use them.

    config.json          'model' (config.model), 'preprocess', 'tokenizer' (its file, and the ids of
                         the begin and end symbol), 'files' (checksums)
    params.safetensors   float32, by path 'a/b/c', layers stacked: the layout of models/
    vocabulary.*         the tokenizer's file

The configuration is written last: a folder that has one is complete. It carries checksums of itself
and of every file, and reading compares them.

In the layout of the hub (see inference/hub_folder.py) the parameters are called model.safetensors
and config.json says that they are of this library.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from etils import epath

from coca_jax.config import StoredConfig, base, read
from coca_jax.interop import safetensors
from coca_jax.interop.safetensors import Blocks
from coca_jax.runtime import bounded_json, json_files, out_folder, storage

if TYPE_CHECKING:
    import jax

_DEEPEST = 32  # levels of a tree of parameters
GENERATION = "generation_config.json"
CONFIG, PARAMS, PROGRAMS = "config.json", "params.safetensors", "programs"
HUB_PARAMS, LIBRARY = "model.safetensors", dict(library_name="coca_jax")
CARD, PREPROCESSOR = "README.md", "preprocessor_config.json"  # in the layout of the hub
ONNX = "onnx"  # the folder of programs for onnxruntime
PREPROCESSED = ("resize", "num_frames", "label_token")  # keys of `data` that a model goes by
PLATFORMS = ("cpu", "tpu", "cuda", "rocm")  # that exported programs may be for


def check_platforms(platforms: Iterable[str]) -> None:
    """Raises ValueError for a platform that programs cannot be exported for, or for none."""
    platforms = list(platforms)
    if not platforms:
        raise ValueError(f"--platforms= names none: choose from {', '.join(PLATFORMS)}")
    for platform in platforms:
        if platform not in PLATFORMS:
            raise ValueError(f"--platforms={platform}: choose from {', '.join(PLATFORMS)}")


def is_export(directory: str | os.PathLike[str]) -> bool:
    """Whether the folder, which may be in a bucket, is a complete export."""
    return bool(_params_name(directory))


def refuse_file(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for one file of a model, which is read as a folder."""
    file = storage.place(path)
    of_export = file.name in (PARAMS, HUB_PARAMS) and is_export(file.parent)
    if (file.name == CONFIG or of_export) and file.is_file():
        folder = os.path.dirname(os.fspath(path)) or "."
        raise ValueError(f"{path} is one file of a model; give the folder {folder}")


def _params_name(directory: str | os.PathLike[str]) -> str:
    """Of the file with the parameters; '' where the folder is no export."""
    folder = storage.place(directory)
    if not (folder / CONFIG).exists():
        return ""
    name = HUB_PARAMS if _is_of_library(folder) else PARAMS
    return name if (folder / name).exists() else ""


def _is_of_library(folder: epath.Path) -> bool:
    """Whether config.json is ours, in the layout of the hub: others have files of these names."""
    try:
        data = bounded_json.parse((folder / CONFIG).read_bytes())
    except ValueError:
        return False
    return data.items() >= LIBRARY.items()


def refuse_half(directory: str | os.PathLike[str]) -> None:
    """Raises FileNotFoundError for what was an export, one of whose two main files is missing, and
    ValueError where it is the configuration that is damaged."""
    config = storage.place(directory) / CONFIG
    for name in (PARAMS, HUB_PARAMS):
        params = storage.place(directory) / name
        if params.exists() and not config.exists():
            raise FileNotFoundError(
                f"{config} is missing: {name} alone is no export; write or download it again"
            )
        if config.exists() and name in json_files.listed_files(json_files.read_sealed(config)):
            raise FileNotFoundError(f"{params} is missing; write or download the folder again")


def write_export(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    vocabulary_path: str | os.PathLike[str],
    *,
    hub: bool = False,
    programs: Iterable[str] = (),
    progress: bool = False,
) -> None:
    """Writes an export folder, here or in a bucket. Programs of an export that was in a local one
    stay part of it where it is of the same model; those of another one are removed, as are
    parameters and a tokenizer that it had under other names.

    Args:
        params: nested dict of arrays, or flat by path; an array may be `Blocks`, which are written
            one at a time.
        config: 'model', and 'preprocess' {'resize', 'mean', 'std'}, with 'num_frames' and
            'label_token' where they are not as by default; 'tokenizer' gets its file.
        vocabulary_path: the tokenizer's file, copied.
        hub: in the layout of the hub.
        programs: files of this model, 'programs/NAME' or 'onnx/NAME', that are there already.
        progress: show a bar while the arrays are written.

    Raises:
        FileNotFoundError: no such vocabulary.
        ValueError: naming an array with values that are NaN or infinite.
    """
    tensors = {path: blocks(path, array) for path, array in flatten(params).items()}
    params_name = HUB_PARAMS if hub else PARAMS
    name = ("tokenizer" if hub else "vocabulary") + _suffixes(vocabulary_path)
    plain = dict(config)
    plain["tokenizer"] = plain.get("tokenizer", {}) | {"file": name}
    plain |= LIBRARY if hub else {}
    with out_folder.gone_if_refused(directory), storage.local_folder(directory) as folder:
        before = _earlier(folder)
        safetensors.write(os.path.join(folder, params_name), tensors, progress=progress)
        target = os.path.join(folder, name)
        if os.path.abspath(target) != os.path.abspath(vocabulary_path):
            shutil.copyfile(vocabulary_path, target)
        found = json_files.describe_files(folder, [params_name, name])
        plain[json_files.FILES_KEY] = found
        written = list(programs)
        found |= _keep_programs(folder, before, json.loads(json.dumps(plain)), written)
        found |= json_files.describe_files(folder, written)
        sealed = json.dumps(json_files.seal(plain), indent=2)
        storage.write_text(os.path.join(folder, CONFIG), sealed)
        _remove_replaced(folder, before, found)


def refuse_other(directory: str | os.PathLike[str], params: Mapping, name: str = "") -> None:
    """Raises FileExistsError for a folder with other weights: its scores would be taken for theirs.

    params: as of `write_export`. name: of the file of weights; default: that of an export.
    """
    name = name or _params_name(directory)
    if not name or not (storage.place(directory) / name).exists():
        return
    tensors = {path: blocks(path, array) for path, array in flatten(params).items()}
    with storage.local_copy(storage.place(directory) / name) as file:
        try:
            there = safetensors.read(file)
        except ValueError:  # cut short: what reads the folder says to write it again
            return
        if not safetensors.same(there, tensors):
            raise FileExistsError(
                f"--out={os.fspath(directory)} holds a model with other weights ({name}); give "
                "another --out, or remove that folder"
            )


def _remove_replaced(
    directory: str | os.PathLike[str], before: dict[str, Any], found: Collection[str]
) -> None:
    """Removes the parameters and tokenizer of the export before, where those of the one that is
    there now have other names: two layouts in a folder would be two models."""
    tokenizer = before.get("tokenizer")
    own = (PARAMS, HUB_PARAMS, tokenizer.get("file") if isinstance(tokenizer, dict) else None)
    for name in json_files.listed_files(before):
        path = pathlib.Path(directory) / name
        if name in own and name not in found and json_files.is_name(name) and path.is_file():
            logging.warning("%s is removed: it is of the export that was here before", path)
            path.unlink()


def _earlier(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration that stands in a local folder; {} for none that can be read."""
    try:
        return bounded_json.parse((pathlib.Path(directory) / CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}


def _keep_programs(
    directory: str | os.PathLike[str],
    before: dict[str, Any],
    now: dict[str, Any],
    written: Collection[str],
) -> dict[str, Any]:
    """What is known of the programs of the export before, where it was of the same model; else {},
    and their files are removed, but for those that are `written` anew."""
    old = {
        name: entry for name, entry in json_files.listed_files(before).items() if is_program(name)
    }
    copied = {}
    for name, entry in old.items():
        path = pathlib.Path(directory) / name
        if name in written or not path.is_file():
            continue
        if _identity(before) == _identity(now):
            copied[name] = entry
        else:
            logging.warning("%s is removed: it is of another model", path)
            path.unlink()
    return copied


def _identity(config: dict[str, Any]) -> tuple:
    """What the programs of a model go by: its sizes, preprocessing, weights and tokenizer."""
    listed = json_files.listed_files(config)
    files = sorted(str(digest) for name, digest in listed.items() if not is_program(name))
    return config.get("model"), config.get("preprocess"), files


def is_program(name: str) -> bool:
    """Whether a file that an export lists is one of its programs."""
    folder, _, rest = name.partition("/")
    return folder in (PROGRAMS, ONNX) and json_files.is_name(rest)


def files(directory: str | os.PathLike[str]) -> list[str]:
    """The files of an export by their paths in it, sorted; nothing else that lies in its folder."""
    folder = pathlib.Path(directory)
    config: dict[str, Any] = bounded_json.parse((folder / CONFIG).read_bytes())
    names = [CONFIG, *config[json_files.FILES_KEY]]
    if (folder / GENERATION).exists():
        names.append(GENERATION)
    if config.items() >= LIBRARY.items():
        names += [name for name in (CARD, PREPROCESSOR) if (folder / name).exists()]
    return sorted(names)


def read_export(directory: str | os.PathLike[str]) -> tuple[dict, StoredConfig]:
    """(params, config) of an export folder; params is a nested dict of float32 arrays mapped from
    the file. From a bucket a temporary copy is mapped.

    Raises:
        FileNotFoundError: the folder is not an export, or a file of it is missing.
        ValueError: a file in it is damaged, or an array holds values that are NaN or infinite.
    """
    data, params = _read_config(directory), _params_name(directory)
    config = _typed(data, os.path.join(directory, CONFIG))
    for name in json_files.listed_files(data):  # programs are not run here, but elsewhere
        if not is_program(name):
            continue
        if (storage.place(directory) / name).exists():
            json_files.check_files(directory, data, name)
        else:
            logging.warning("%s is missing; the model is loaded without it", name)
    with storage.local_copy(storage.place(directory) / params) as file:
        json_files.check_files(os.path.dirname(file), data, params)
        arrays = safetensors.read(file)
    try:
        for name, array in arrays.items():
            safetensors.check_finite(name, array)
        return unflatten(arrays), config
    except ValueError as error:
        raise ValueError(f"{os.path.join(directory, params)}: {error}") from None


def contrastive_loss(directory: str | os.PathLike[str]) -> str:
    """The form of the contrastive loss of an export's weights: 'sigmoid' where they have its bias.
    Raises as `read_export`."""
    with storage.local_copy(storage.place(directory) / _params_name(directory)) as file:
        return "sigmoid" if "logit_bias/value" in safetensors.read(file) else "softmax"


def has_checksums(directory: str | os.PathLike[str]) -> bool:
    """Whether the folder says what its files hold: one that does was written as a whole."""
    return bool(json_files.listed_files(_read_config(directory)))


def read_config(directory: str | os.PathLike[str]) -> StoredConfig:
    """The configuration of an export folder; of `data` what it says of preprocessing.

    Raises:
        FileNotFoundError: the folder is not an export.
        ValueError: its configuration is damaged.
    """
    return _typed(_read_config(directory), os.path.join(directory, CONFIG))


def _read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """As it stands in the file, the checksums of the files included."""
    path = storage.place(directory) / CONFIG
    if not is_export(directory):
        raise FileNotFoundError(f"{os.fspath(directory)}: no {CONFIG} and {PARAMS}: not an export")
    try:
        data = bounded_json.parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    data = json_files.unseal(data, str(path))
    for part in ("model", "tokenizer"):
        if not isinstance(data.get(part), dict):
            raise ValueError(
                f"{path}: it has no {part!r}; it is not the configuration of an export"
            )
    name = data["tokenizer"].get("file")
    if not json_files.is_name(name):
        raise ValueError(f"{path}: tokenizer.file={name!r} is not the name of a file beside it")
    return data


def _typed(data: dict[str, Any], path: str) -> StoredConfig:
    required = ("model", "head", "class_names")
    tree: dict[str, Any] = {key: data[key] for key in required if key in data}
    preprocess = data.get("preprocess") or {}
    image = tree.get("model", {}).get("image")
    if isinstance(image, dict) and image.get("onnx"):  # a file of the folder
        place = os.path.abspath(os.path.join(os.path.dirname(path), str(image["onnx"])))
        tree["model"] = tree["model"] | dict(image=image | dict(onnx=place))
    try:
        tree["data"] = {name: preprocess[name] for name in PREPROCESSED if name in preprocess}
        return read(StoredConfig, tree | {"tokenizer": data["tokenizer"]["file"]}, old=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def vocabulary_path(directory: str | os.PathLike[str]) -> str:
    """The tokenizer's file in an export folder.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or the configuration names anything but a file in the folder.
    """
    data = _read_config(directory)
    json_files.check_files(directory, data, data["tokenizer"]["file"])
    return os.path.join(directory, data["tokenizer"]["file"])


def vocabulary_beside(weights: str) -> str:
    """The tokenizer's file of an export, a run or one of its steps; '' where there is none.
    Raises ValueError for a damaged export."""
    folders = [storage.place(weights)]
    if not storage.reach(folders[0]) or not folders[0].is_dir():
        return ""
    if is_export(folders[0]):
        return vocabulary_path(folders[0])
    while folders[-1].name.isdigit() or folders[-1].name == "checkpoints":  # a step, its folder
        folders.append(folders[-1].parent)
    found = (file for folder in folders for file in sorted(folder.glob("vocabulary*")))
    return str(next(found, ""))


def place(params: Any, shardings: Any) -> Any:
    """Mapped arrays -> arrays on a mesh; each process reads the parts that its devices hold.

    Args:
        params: nested dict of arrays (as `read_export` gives).
        shardings: the same tree of jax.sharding.NamedSharding.
    """
    import jax  # only here: commands read a folder's configuration without it

    def one(array: np.ndarray, sharding: Any) -> jax.Array:
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: np.array(array[index])
        )

    return jax.tree.map(one, params, shardings)


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> flat dict by path 'a/b/c'."""
    return base.flatten(params, "/")


def unflatten(flat: Mapping[str, Any]) -> dict:
    """The inverse of `flatten`.

    Raises ValueError for a path that is another one's parent, or deeper than any model's.
    """
    nested: dict = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        inner = nested
        for parent in parents[:_DEEPEST]:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                break
        if len(parents) > _DEEPEST or not isinstance(inner, dict) or name in inner:
            raise ValueError(f"the array {path[:200]!r} fits no tree of parameters")
        inner[name] = value
    return nested


def blocks(path: str, array: Any) -> Blocks:
    """An array as `safetensors_file.write` takes it, float32, read when it is written."""
    if isinstance(array, Blocks):
        return array

    def parts() -> Iterable[np.ndarray]:
        whole = np.asarray(array, np.float32)
        safetensors.check_finite(path, whole)
        yield whole

    return Blocks(tuple(array.shape), parts)


def _suffixes(path: str | os.PathLike[str]) -> str:
    name = os.path.basename(os.fspath(path))
    if name.endswith(".gz"):
        return ".bpe.gz"
    return os.path.splitext(name)[1]
