"""Folders that commands of ours have written, told by the names of their files: they are no part of
an input in which they lie."""

from __future__ import annotations

from collections.abc import Collection

_MARKS = ("manifest.json", "index.json")


def is_prepared(names: Collection[str]) -> bool:
    """Whether a folder with files of these names is one that `prepare` wrote."""
    return "manifest.json" in names and any(name.endswith(".array_record") for name in names)


def without_ours(names: Collection[str]) -> list[str]:
    """Names within a folder but for those of the folders below that `prepare` or `search index`
    wrote."""
    inside: dict[str, list[str]] = {}
    for name in names:
        folder, _, own = name.rpartition("/")
        inside.setdefault(folder, []).append(own)
    marked = {f: found for f, found in inside.items() if f and {*_MARKS} & {*found}}
    if not marked:
        return list(names)
    ours = {folder for folder, found in marked.items() if is_prepared(found)}
    for folder, found in marked.items():
        parts = inside.get(f"{folder}/metadata", ())
        if folder and "index.json" in found and any(one.startswith("metadata_") for one in parts):
            ours |= {folder, f"{folder}/metadata", f"{folder}/img_emb"}
    return [name for name in names if name.rpartition("/")[0] not in ours]
