"""What stands beside the shards: the manifest, and the files by which tensorflow-datasets reads."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from coca_jax.data import files, manifest
from coca_jax.files import local_files
from coca_jax.files.storage import write_bytes
from coca_jax.importers.items import Drawn

MANIFEST = manifest.FILE
_FEATURE = "tensorflow_datasets.core.features."
_TEXT = {"pythonClassName": f"{_FEATURE}text_feature.Text", "text": {}}
_TEXTS = {
    "pythonClassName": f"{_FEATURE}sequence_feature.Sequence",
    "sequence": {"feature": _TEXT, "length": "-1"},
}
_IMAGE = {
    "pythonClassName": f"{_FEATURE}image_feature.Image",
    "image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}},
}


def have_changed(before: str, now: str, *, times: bool = False) -> bool:
    """Whether two states (`indexes.state`) are of other files, or with `times` of other times. What
    one of them does not tell, as those of earlier versions, is taken for the same."""
    pairs = list(zip(before.split("-"), now.split("-")))
    return any(one != other for one, other in (pairs if times else pairs[::2]))


def read_manifest(out: str) -> dict[str, Any]:
    """The manifest of a folder, or an empty one. Raises ValueError where it is damaged."""
    return manifest.read(out) or {"format": "coca_jax-1", "class_names": [], "splits": {}}


def remove_empty(out: str) -> None:
    """Removes a local folder and the one that it is in where they are empty."""
    if not files.is_remote(out):
        with contextlib.suppress(OSError):
            os.rmdir(out)
            os.rmdir(os.path.dirname(out))


def request(out: str, split: str) -> dict[str, Any]:
    """What a split of a folder was asked for by, {'format', 'input', 'options'}; {} where there is
    no such split, or an earlier version wrote it. Raises as `read_manifest`."""
    return read_manifest(out)["splits"].get(split, {}).get("request") or {}


@contextlib.contextmanager
def changing(out: str) -> Iterator[dict[str, Any]]:
    """The manifest of a folder that is there, to be changed inside, and written at the end: nobody
    else changes it meanwhile, but in a bucket, which knows no locks. Raises as `read_manifest`."""
    with contextlib.nullcontext() if files.is_remote(out) else local_files.alone_in(out):
        told = read_manifest(out)
        yield told
        write(out, told)


def drawn(split: Mapping[str, Any]) -> Drawn:
    """What was drawn until a split of a manifest was left; of one of earlier versions, which did
    not count, by its own request."""
    if "drawn" in split:
        return Drawn(split["drawn"]["holdouts"], tuple(split["drawn"]["seeds"]))
    return with_drawn(Drawn(), split.get("request", {}).get("options", {}))


def with_drawn(before: Drawn, options: Mapping[str, Any]) -> Drawn:
    """What was drawn after an import with these options of data of which `before` was."""
    seeds = [options.get("seed", 0)] if options.get("sample", 1.0) < 1.0 else []
    return Drawn(before.holdouts + bool(options.get("holdout")), (*before.seeds, *seeds))


def class_names(told: dict[str, Any], split: str, seen: set[str]) -> list[str]:
    """The class names of all splits, `seen` being those of `split`, which may be there as another.
    Of splits that do not list theirs, as they did not once, all that there are may be theirs."""
    names = set(seen)
    for name, other in told["splits"].items():
        if name != split:
            names.update(other.get("classes", told["class_names"] if other["with_label"] else ()))
    return sorted(names)


def write(out: str, told: dict[str, Any]) -> None:
    """Writes the manifest last: while it is absent the data set is not finished."""
    if not any("root" in split for split in told["splits"].values()):
        _write_for_tfds(out, told)  # which would take the references of an index for images
    _write_json(files.join(out, MANIFEST), told)


def _write_for_tfds(out: str, told: dict[str, Any]) -> None:
    features = {"image": _IMAGE, "text": _TEXTS, "label": _TEXTS, "key": _TEXT, "extra": _TEXT}
    _write_json(
        files.join(out, "features.json"),
        {
            "pythonClassName": f"{_FEATURE}features_dict.FeaturesDict",
            "featuresDict": {"features": features},
        },
    )
    splits = [
        {
            "name": name,
            "filepathTemplate": "{SPLIT}-{SHARD_X_OF_Y}.{FILEFORMAT}",
            "shardLengths": [str(shard["count"]) for shard in split["shards"]],
            "numBytes": str(sum(shard["bytes"] for shard in split["shards"])),
        }
        for name, split in sorted(told["splits"].items())
    ]
    _write_json(
        files.join(out, "dataset_info.json"),
        {"fileFormat": "array_record", "splits": splits, "version": "1.0.0"},
    )


def _write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())
