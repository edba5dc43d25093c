"""Models on the Hugging Face hub: names, downloads into its cache, and uploads.

All of it goes through huggingface_hub (the extra 'hf'): its cache (HF_HOME), its token, its
settings, HF_HUB_OFFLINE and HF_ENDPOINT among them.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from coca_jax.data.vocabulary import clip_bpe
from coca_jax.interop import export_format, open_clip_config, towers_config
from coca_jax.interop.pretrained import PRETRAINED
from coca_jax.runtime import bounded_json, extras

PREFIX = "hf-hub:"  # as open_clip names what is on the hub
_SMALL = [
    *(
        export_format.CONFIG,
        export_format.GENERATION,
        open_clip_config.CONFIG_FILE,
        "tokenizer.*",
        "spiece.model",
    ),
    *(towers_config.TOKENIZER, towers_config.PREPROCESSOR, clip_bpe.FILE_NAME),
]


def local(place: str, pretrained: str = "") -> str:
    """The folder of a name, downloaded where it needs to be; a path or a bucket's URL as it is.

    Raises as `resolve` and `download` do.
    """
    if not pretrained and not is_name(place):
        return place
    name = resolve(place, pretrained)
    return download(name) if name.startswith(PREFIX) else name


def is_name(place: str) -> bool:
    """Whether it names a model, and no file or folder that is here."""
    named = place.startswith(PREFIX) or place.partition(":")[0] in {of for of, _ in PRETRAINED}
    return named and not os.path.exists(place)


def resolve(name: str, pretrained: str = "") -> str:
    """'hf-hub:org/name' for a model of `pretrained.PRETRAINED`; anything else as it is.

    name: 'ViT-L-14' with `pretrained`, or 'ViT-L-14:openai'.
    Raises ValueError with the choices for a missing or unknown tag, and for an unknown model.
    """
    if pretrained and os.path.exists(pretrained):
        raise ValueError(
            f"pretrained={pretrained!r} is a file, not a tag of {name}; convert it first: coca-jax "
            f"convert --input={pretrained} --model={name} --out=FOLDER"
        )
    model, _, tag = name.partition(":")
    tags = [known for of, known in PRETRAINED if of == model]
    if not tags:
        if not pretrained:
            return name
        near = difflib.get_close_matches(model, {of for of, _ in PRETRAINED}, n=3, cutoff=0.5)
        close = f"Close names: {', '.join(near)}. " if near else ""
        raise ValueError(
            f"{name!r} with pretrained={pretrained!r}: not a model name whose weights are known. "
            f"{close}coca_jax.list_pretrained() lists all names; for a path or hf-hub:OWNER/NAME, "
            "leave pretrained out."
        )
    tag = pretrained or tag
    if (model, tag) not in PRETRAINED:
        problem = f"no weights with the tag {tag!r}" if tag else "a model name without a tag"
        raise ValueError(f"{model}: {problem}. Give {model}:TAG, with a tag of {', '.join(tags)}.")
    return PREFIX + PRETRAINED[model, tag]


def download(name: str) -> str:
    """The folder of huggingface_hub's cache with a model's files, fetched where they are not there
    yet: the configuration and tokenizer, and the weights, once.

    name: 'hf-hub:org/name' or 'hf-hub:org/name@revision'.

    Raises:
        FileNotFoundError: no such repository or revision, no model in it, or the hub cannot be
            reached and the cache does not have it.
        ValueError: huggingface_hub is missing, or it is no name.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    hub = _package()
    folder = _ask(
        name,
        lambda: hub.snapshot_download(repository, revision=revision or None, allow_patterns=_SMALL),
    )
    commit = os.path.basename(folder)
    for weights in _weights(folder):
        get = functools.partial(hub.hf_hub_download, repository, weights, revision=commit)
        try:
            _ask(name, get)
            return folder
        except FileNotFoundError as error:
            missing = error
    raise missing


def push(folder: str, repository: str, *, private: bool = False) -> str:
    """Uploads a folder in hub layout as one commit, what else lies in it left out; the repository
    is made where it is missing.

    Returns its URL. Raises ValueError when huggingface_hub is missing or 'org/name' is none,
    FileNotFoundError when the hub cannot be reached or does not let us.
    """
    api = _package().HfApi(**export_format.LIBRARY)

    def upload() -> str:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload with coca_jax",
            allow_patterns=export_format.files(folder),
        )
        return str(url)

    return _ask(PREFIX + repository, upload)


def _weights(folder: str) -> tuple[str, ...]:
    """The files that may hold the weights, best first, by the configuration that is there."""
    config = os.path.join(folder, export_format.CONFIG)
    if os.path.isfile(config):
        with open(config, "rb") as file:
            try:
                found: dict[str, Any] = bounded_json.parse(file.read())
            except ValueError:
                return (export_format.HUB_PARAMS, *open_clip_config.WEIGHTS_FILES)
        if found.items() >= export_format.LIBRARY.items():
            return (export_format.HUB_PARAMS,)
        if str(found.get("model_type")) in towers_config.FAMILIES:
            return open_clip_config.WEIGHTS_FILES + towers_config.WEIGHTS_FILES
    return open_clip_config.WEIGHTS_FILES


def _package() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"models of the hub need huggingface_hub: {extras.remedy('hf')}") from None
    return huggingface_hub


def _ask(name: str, call: Callable[[], Any]) -> Any:
    """What the call gives, with its errors in one line that names the model."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.HFValidationError:
        raise ValueError(f"{name}: no name of a model on the hub; give {PREFIX}org/name") from None
    except errors.GatedRepoError:
        why = "its owner grants access one by one; ask on its page, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "there is no such model, or it is private: look at the name, or run `hf auth login`"
    except errors.RevisionNotFoundError:
        why = "there is no such revision; leave out what is behind the '@', or name another"
    except errors.LocalEntryNotFoundError:
        why = "the hub cannot be reached and the cache does not have it (HF_HUB_OFFLINE, HF_HOME)"
    except errors.EntryNotFoundError:
        why = "its repository holds no weights that are known here"
    except OSError as error:  # all that is of the network or the disk
        why = " ".join(str(error).split())
    raise FileNotFoundError(f"{name}: {why}")
