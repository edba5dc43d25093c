"""The manifest of prepared data: which splits there are, and the shards of each."""

from __future__ import annotations

import hashlib
import posixpath
from typing import Any

from coca_jax.data import bounded_json, files
from coca_jax.files import local_files

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


def told(path: str, split: str) -> dict[str, Any]:
    """{examples, sha256}: how many examples a split of prepared data has, and a digest of its
    shards' checksums, which tells its data from others. Raises KeyError where there is none."""
    found = (read(local_files.plain(path)) or {"splits": {}})["splits"][split]
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
    told = [split.get(key) for key in _COUNTS]
    total = sum(shard["count"] for shard in shards)
    if not all(map(_is_count, told)) or told[0] != total or max(told) > total:
        raise ValueError(
            f"split {name!r} has {total} examples, but says {dict(zip(_COUNTS, told))}"
        )


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
