"""Whether a run has trained on examples that it is scored on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from coca_jax.config import Entry
from coca_jax.data import evaluation_data, holdout
from coca_jax.data.sources import files, manifest


def trained_on(sources: Iterable[Entry], data: Mapping[str, Any]) -> Entry | None:
    """The source (of a run's `data.sources`) that has examples of the data at this split, itself or
    as an index or copy that was made of them; None where there is none."""
    asked = Entry.of(data)
    return next((e for e in sources if not e.builtin and _overlap(e, asked)), None)


def _overlap(source: Entry, asked: Entry) -> bool:
    """Whether examples of a source are among those asked for, as far as places, splits and values
    of fields tell."""
    if _apart(source.where, asked.where):
        return False
    if _place(source) == _place(asked):
        return (source.split or "train") == asked.split
    made, other = _made_of(source), _made_of(asked)
    if made and other and files.real(made["input"]) == files.real(other["input"]):
        same = (source.split or "train") == asked.split
        return _share(made["options"], other["options"], same)
    if not asked.path or not made or files.real(made["input"]) != files.real(asked.path):
        return False
    names, by_field = evaluation_data.find_splits(asked) or ([], None)
    split, where = holdout.split_of(asked.split), dict(asked.where)
    if by_field:
        where[holdout.FIELD] = by_field.values.get(split, ())
    if _apart(made["options"].get("where", ()), where):
        return False
    of_names = len(names) > 1 and not by_field
    return not of_names or split == holdout.split_of(source.split or "train")


def _share(made: Mapping[str, Any], other: Mapping[str, Any], same_split: bool) -> bool:
    """Whether two imports of one input have examples in common. same_split: whether they are of
    splits of one name."""
    if _apart(made.get("where", ()), other.get("where", ())):
        return False
    shares = [one.get("holdout", 0.0) for one in (made, other)]
    by_name = [bool(one.get("in_place")) and not one.get("check", True) for one in (made, other)]
    if any(shares) and by_name[0] != by_name[1]:  # the other is by content
        return True
    apart = [bool(one.get("held_out")) for one in (made, other)]
    if apart[0] != apart[1]:  # held out is what lies below its share, the rest what lies above
        held = apart.index(True)
        return shares[held] > shares[1 - held]
    return same_split or all(shares)


def part(source: Entry, data: Mapping[str, Any]) -> str:
    """'these very' where a source's examples are those of the data, 'some of these' where both are
    imports of one input, which may have held out others."""
    asked = Entry.of(data)
    known = _place(source) == _place(asked) or not _made_of(asked)
    return "these very" if known else "some of these"


def held_out(source: Entry) -> str:
    """Where the examples are that a source's data had and it did not train on; '' for nowhere."""
    if not _made_of(source).get("options", {}).get("holdout"):
        return ""
    return f"; what was held out of them is --data={source.path} --split=test"


def _place(entry: Entry) -> tuple[str, ...]:
    return (entry.path and files.real(entry.path), entry.tfds, entry.seqio)


def _made_of(source: Entry) -> dict[str, Any]:
    """The request by which a source was prepared; {} where that is not known, as of data that are
    no longer there or cannot be reached from here."""
    try:
        return manifest.request(source.path, source.split or "train") if source.path else {}
    except Exception:  # file systems have types of their own, and no score hangs on it
        return {}


def _apart(one: Any, other: Any) -> bool:
    """Whether two selections by values of fields have no example in common."""

    def values(given: Any) -> set[str]:
        return {str(v) for v in (given if isinstance(given, (list, tuple)) else [given])}

    one, other = dict(one), dict(other)
    return any(not values(one[key]) & values(other[key]) for key in one.keys() & other.keys())
