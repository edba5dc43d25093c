"""Which split the name of a file or a folder tells."""

from __future__ import annotations

from collections.abc import Collection

VALIDATION = ("validation", "valid", "val", "dev")  # one split by its usual names
SPLITS = {  # what files and folders are called, in any case -> the split that they tell
    **dict(train="train", training="train", test="test", testing="test"),
    **dict.fromkeys(VALIDATION, "validation"),
}


def tell(told: Collection[str], all_told: bool = False) -> bool:
    """Whether names make splits, by what each of them tells."""
    return all(told) and bool(told) if all_told else any(told)


def told(name: str) -> str:
    """The split that the topmost folder tells that tells one, else a file's own name, '' for none;
    of several in one part of the name the first of SPLITS."""
    for part in name.split("/"):
        if found := _words(part) & SPLITS.keys():
            return next(split for word, split in SPLITS.items() if word in found)
    return ""


def _words(part: str) -> set[str]:
    for mark in "-_.":
        part = part.replace(mark, " ")
    return set(part.lower().split())
