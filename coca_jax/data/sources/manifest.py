"""The manifest of prepared data: which splits there are, and the shards of each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

from coca_jax.data.sources import files
from coca_jax.data.sources.items import Drawn
from coca_jax.runtime import bounded_json, storage
from coca_jax.runtime.storage import write_bytes

FILE = "manifest.json"
MAX_BYTES = 256 << 20  # of a manifest; 100,000 shards take 20 million
_COUNTS = ("count", "with_text", "with_label")


def read(path: str) -> dict[str, Any] | None:
    """The manifest of a folder; None where there is none.

    Returns:
        class_names: list of texts; splits: name -> {count, with_text, with_label, shards}, shards
        being a list of {file, count, bytes, sha256}, of an index also root: the folder or URL of
        the data that are read in place; of later versions also classes, a list of texts, and drawn,
        {holdouts, seeds}; and what else was written.

    Raises:
        ValueError: it is damaged, or names files that are not in the folder.
    """
    file = files.join(path, FILE)
    if not files.exists(file):
        return None
    try:
        found = bounded_json.parse(files.read_bounded(file), MAX_BYTES)
        _check(found)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}; prepare the data again") from None
    return found


def digest(path: str, split: str) -> dict[str, Any]:
    """{examples, sha256}: how many examples a split of prepared data has, and a digest of its
    shards' checksums, which tells its data from others. Raises KeyError where there is none."""
    found = (read(storage.plain_path(path)) or {"splits": {}})["splits"][split]
    sums = " ".join(shard["sha256"] for shard in found["shards"])
    return {"examples": found["count"], "sha256": hashlib.sha256(sums.encode()).hexdigest()}


def _check(found: dict[str, Any]) -> None:
    """Raises ValueError for the first entry that `prepare` does not write."""
    names = found.setdefault("class_names", [])
    if not _is_list(names, str):
        raise ValueError("class_names is no list of texts")
    splits = found.get("splits")
    if not isinstance(splits, dict) or not all(isinstance(one, dict) for one in splits.values()):
        raise ValueError("splits is no object of objects")
    for name, split in splits.items():
        _check_split(name[:80], split)


def _check_split(name: str, split: dict[str, Any]) -> None:
    shards = split.get("shards")
    if not shards or not _is_list(shards, dict):
        raise ValueError(f"split {name!r} has no list of shards")
    for number, shard in enumerate(shards):
        file = shard.get("file")
        if not isinstance(file, str) or posixpath.basename(file) != file or file in ("", ".", ".."):
            raise ValueError(f"shard {number} of split {name!r} is no file of the folder: {file!r}")
        counts = [shard.get("count"), shard.get("bytes")]
        if not all(map(_is_count, counts)) or not 0 < counts[0] <= counts[1]:
            raise ValueError(f"shard {file!r} of split {name!r} has {counts[0]!r} examples in "
                             f"{counts[1]!r} bytes")  # fmt: skip
        if not isinstance(shard.get("sha256"), str):
            raise ValueError(f"shard {file!r} of split {name!r} has no checksum")
    if not isinstance(split.get("root", ""), str):
        raise ValueError(f"the root of split {name!r} is no text")
    if not _is_list(split.get("classes", []), str):
        raise ValueError(f"the classes of split {name!r} are no list of texts")
    drawn = split.get("drawn", {"holdouts": 0, "seeds": []})
    holdouts = drawn.get("holdouts") if isinstance(drawn, dict) else None
    if not (_is_count(holdouts) and holdouts < 1 << 32 and _is_list(drawn.get("seeds"), int)):
        raise ValueError(f"what was drawn of split {name!r} is no count and seeds: {drawn!r}"[:300])
    values = [split.get(key) for key in _COUNTS]
    total = sum(shard["count"] for shard in shards)
    if not all(map(_is_count, values)) or values[0] != total or max(values) > total:
        raise ValueError(
            f"split {name!r} has {total} examples, but says {dict(zip(_COUNTS, values))}"
        )


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# What stands beside the shards: the manifest, and the files by which tensorflow-datasets reads.


MANIFEST = FILE
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
    """Whether two states (`source_index.state`) are of other files, or with `times` of other times.
    What one of them does not tell is taken for the same."""
    pairs = list(zip(before.split("-"), now.split("-")))
    return any(one != other for one, other in (pairs if times else pairs[::2]))


def read_manifest(out: str) -> dict[str, Any]:
    """The manifest of a folder, or an empty one. Raises ValueError where it is damaged."""
    return read(out) or {"format": "coca_jax-1", "class_names": [], "splits": {}}


def remove_empty(out: str) -> None:
    """Removes a local folder and the one that it is in where they are empty."""
    if not files.is_remote(out):
        with contextlib.suppress(OSError):
            os.rmdir(out)
            os.rmdir(os.path.dirname(out))


def request(out: str, split: str) -> dict[str, Any]:
    """What a split of a folder was asked for by, {'format', 'input', 'options'}; {} where there is
    no such split, or another program wrote it. Raises as `read_manifest`."""
    return read_manifest(out)["splits"].get(split, {}).get("request") or {}


@contextlib.contextmanager
def changing(out: str) -> Iterator[dict[str, Any]]:
    """The manifest of a folder that is there, to be changed inside, and written at the end: nobody
    else changes it meanwhile, but in a bucket, which knows no locks. Raises as `read_manifest`."""
    with contextlib.nullcontext() if files.is_remote(out) else storage.alone_in(out):
        manifest = read_manifest(out)
        yield manifest
        write(out, manifest)


def drawn(split: Mapping[str, Any]) -> Drawn:
    """What was drawn until a split of a manifest was left."""
    drawn_by = split.get("drawn", {"holdouts": 0, "seeds": ()})
    return Drawn(drawn_by["holdouts"], tuple(drawn_by["seeds"]))


def with_drawn(before: Drawn, options: Mapping[str, Any]) -> Drawn:
    """What was drawn after an import with these options of data of which `before` was."""
    seeds = [options.get("seed", 0)] if options.get("sample", 1.0) < 1.0 else []
    return Drawn(before.holdouts + bool(options.get("holdout")), (*before.seeds, *seeds))


def class_names(manifest: dict[str, Any], split: str, seen: set[str]) -> list[str]:
    """The class names of all splits, `seen` being those of `split`, which may be there as another.
    Of splits that do not list theirs, as they did not once, all that there are may be theirs."""
    names = set(seen)
    for name, other in manifest["splits"].items():
        if name != split:
            names.update(
                other.get("classes", manifest["class_names"] if other["with_label"] else ())
            )
    return sorted(names)


def write(out: str, manifest: dict[str, Any]) -> None:
    """Writes the manifest last: while it is absent the data set is not finished."""
    if not any("root" in split for split in manifest["splits"].values()):
        _write_for_tfds(out, manifest)  # which would take the references of an index for images
    _write_json(files.join(out, MANIFEST), manifest)


def _write_for_tfds(out: str, manifest: dict[str, Any]) -> None:
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
        for name, split in sorted(manifest["splits"].items())
    ]
    _write_json(
        files.join(out, "dataset_info.json"),
        {"fileFormat": "array_record", "splits": splits, "version": "1.0.0"},
    )


def _write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())
