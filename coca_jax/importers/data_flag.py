"""What a --data flag says, PATH[:KIND[:WEIGHT]], and what the data that it names train."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coca_jax.config import Entry
from coca_jax.data import files, kinds, sources
from coca_jax.importers import metadata

_LOOKED_AT = 256  # records, for a field that lists questions
_FAR = 1.5  # times as many rows as were asked for, or as few
_ASKED = ("questions", "answers")  # keys of an entry


@dataclasses.dataclass(frozen=True)
class Named:
    """What one flag says. kind '': as the data tell."""

    path: str
    kind: str = ""
    weight: float = 1.0


def parse(text: str) -> Named:
    """PATH, PATH:KIND or PATH:KIND:WEIGHT; read from the right, as URLs and paths have colons.

    Raises ValueError for an unknown kind behind a path that is there, for several paths with commas
    between them, or a weight that is not above 0, or not finite.
    """
    path, kind, weight = text, "", 1.0
    before, _, last = text.rpartition(":")
    earlier, _, middle = before.rpartition(":")
    if middle in kinds.KINDS and _is_number(last):
        path, kind, weight = earlier, middle, float(last)
    elif last in kinds.KINDS:
        path, kind = before, last
    elif before and files.exists(before) and not files.exists(text):
        raise ValueError(
            f"--data={text}: {last!r} is none of {', '.join(kinds.KINDS)}; write PATH, "
            "PATH:KIND or PATH:KIND:WEIGHT"
        )
    if not path:
        raise ValueError(f"--data={text}: it names no path; write PATH, PATH:KIND:WEIGHT ...")
    several = [one for one in text.split(",") if one]
    if len(several) > 1 and (path.count("://") > 1 or not files.exists(path)):
        if all(files.exists(parse(one).path) for one in several):
            each = " ".join(f"--data={one}" for one in several)
            raise ValueError(f"--data={text}: a flag names one place; write {each}")
    if not 0 < weight < float("inf"):
        raise ValueError(f"--data={text}: the weight is a share of the batch, above 0 and finite")
    return Named(path, kind, weight)


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False


def kind_of(one: Named, path: str, split: str, fields: Mapping[str, str]) -> str:
    """The kind that the flag names; else 'caption' where at least as many examples of a prepared
    split have a text as a label, and 'label' where not.

    fields: of the records, of which texts or labels are taken.

    Raises ValueError where the flag names one of which no example has what trains.
    """
    entry, kind = metadata.read_manifest(path)["splits"][split], kinds.KINDS.get(one.kind)
    if kind and kind.counted and not fields and entry.get(f"with_{kind.wanted}") == 0:
        raise ValueError(
            f"--data={one.path}:{one.kind}: none of its {entry['count']} examples has a "
            f"{kind.wanted}; leave out :{one.kind}, or name the field with --{kind.wanted}_field"
        )
    if one.kind or not fields:
        return one.kind or ("caption" if entry["with_text"] >= entry["with_label"] else "label")
    return "caption" if "text_field" in fields else "label"


@contextlib.contextmanager
def naming_one(fields: Mapping[str, str], count: int) -> Iterator[None]:
    """Adds to an error that names one of the fields, where it goes for `count` data, how it is
    given for some of them."""
    try:
        yield
    except ValueError as error:
        given = [f"--{n}={field}" for n, field in fields.items() if f"{field!r}" in str(error)]
        if count < 2 or not given:
            raise
        raise ValueError(
            f"{error}; {given[0]} goes for every --data: for those that have the field alone leave "
            f"it out, and give --data=DIR that `coca-jax prepare {given[0]} --input=... --out=DIR` "
            "writes"
        ) from error


def entries_of(
    one: Named, path: str, split: str, kind: str, recipe: Sequence[Entry]
) -> list[dict[str, Any]]:
    """dict(kind, weight) of the source that a flag is, with what else its kind says. Questions are
    looked for, and chosen by their answers, as in those sources of the recipe whose field a
    prepared split has: one for each of those, which share the weight.

    Raises ValueError naming a field that lists questions where the recipe has no such source.
    """
    if not kinds.KINDS[kind].asks:
        return [dict(kind=kind, weight=one.weight)]
    fields = _lists_of_questions(path, split)
    like = [e for e in recipe if e.kind == kind and e.questions in (fields or [""])]
    if fields and not like:
        there = f"{{'path': {one.path!r}, 'kind': {kind!r}, 'questions': {fields[0]!r}}}"
        raise ValueError(
            f"--data={one.path}:{kind}: its records list questions and answers in the field "
            f"{fields[0]!r}, which the recipe does not name; in place of --data give "
            f'--config.data.sources="({there},)"'
        )
    whole = sum(entry.weight for entry in like)
    return [
        dict(
            kind=kind,
            weight=one.weight * entry.weight / whole,
            **{key: value for key in _ASKED if (value := getattr(entry, key))},
        )
        for entry in like
    ] or [dict(kind=kind, weight=one.weight)]


def _lists_of_questions(path: str, split: str) -> list[str]:
    """The fields in which records of a prepared split list {question, answer}."""
    source = sources.open_whole(Entry(path=path, split=split))
    found: dict[str, None] = {}
    for record in source.read_texts(range(min(len(source), _LOOKED_AT))):
        for name, value in json.loads(record.extra or "{}").items():
            first = value[0] if isinstance(value, list) and value else None
            if isinstance(first, dict) and {"question", "answer"} <= first.keys():
                found[name] = None
    return list(found)


def classes_of(source: Mapping[str, Any]) -> list[str]:
    """The class names of a prepared source whose kind trains on them; [] of other kinds and
    sources, and where they are not known without a look at the records."""
    kind = kinds.KINDS[source["kind"]]
    by_label = kind.has_classes and kind.declared
    if not by_label or "path" not in source or "label_field" in source:
        return []
    return metadata.read_manifest(source["path"])["class_names"]


def check_classes(texts: Sequence[str], sources: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where all that trains is one class name: no loss learns anything of that,
    and its scores want two.

    texts: of the flags; sources: their entries of path and kind.
    """
    found = [classes_of(source) for source in sources]
    names = {name for classes in found for name in classes}
    if all(found) and len(names) == 1:
        flags = " ".join(f"--data={text}" for text in texts)
        raise ValueError(
            f"{flags}: all labels are {min(names)!r}: with one class there is nothing to tell "
            "apart; give pictures of two classes or more, or captions"
        )


def described(
    one: Named,
    path: str,
    source: Mapping[str, Any],
    train: str,
    held: str,
    left: Mapping[str, str],
    scored: bool = True,
) -> str:
    """A line for people: what trains, as what, and what is held out. source: of `entries_of`;
    left: the fields of the records of which texts or labels are taken, and not counted;
    scored: whether the run has evaluations."""
    entries = metadata.read_manifest(path)["splits"]
    entry, of, field = entries[train], kinds.KINDS[source["kind"]], source.get("questions")
    line = f"{one.path}: {entry['count']} examples of split '{train}' train"
    line += of.counted_as({} if left else entry)
    line += f" with the questions of their field {field!r}" if field else ""
    line += ", of which its `answers` in the recipe choose" if source.get("answers") else ""
    for other in () if one.kind or left else kinds.KINDS.values():
        if other.counted and other is not of and entry[f"with_{other.wanted}"]:
            line += f"; --data={one.path}:{other.name} trains on its {other.name}s"
    if held:
        line += f"; {entries[held]['count']} of '{held}' are held out"
        names = classes_of({**source, **left, "path": path})
        if scored and len(names) == 1:
            line += f", and not scored, as all labels are {names[0]!r}"
        elif scored:
            line += " for the scores"
    else:
        line += (
            "; nothing of it is held out for the scores: `prepare --holdout=SHARE` writes a split "
            "'test' as well"
        )
    bad = sum((Counter(e["quarantined"]) for e in entries.values()), Counter[str]())
    if bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad.most_common())
        line += f"; left out: {reasons}, listed in {path}/*-quarantine.jsonl"
    return line


def check_rows(count: int, batch_size: int) -> None:
    """Raises ValueError where a batch has not a row for each of `count` sources."""
    if count > batch_size:
        raise ValueError(
            f"--data: {count} data sets for a batch of {batch_size} rows, of which each "
            f"takes one at least; give --config.batch_size={count} or more, or fewer data sets: a "
            "glob or a folder above several is one"
        )


def tell_shares(weights: Sequence[float], rows: Sequence[int]) -> None:
    """Says where the rows of a batch are far from the weights that were asked for."""
    exact = [weight / sum(weights) * sum(rows) for weight in weights]
    if any(max(one / all_of, all_of / one) >= _FAR for one, all_of in zip(exact, rows)):
        given, taken = (":".join(f"{one:g}" for one in found) for found in (weights, rows))
        print(
            f"--data: the weights {given} are {taken} rows of a batch of {sum(rows)}, as each has "
            "one at least; a larger batch_size comes nearer",
            file=sys.stderr,
        )
