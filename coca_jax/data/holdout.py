"""The field `split` of somebody's examples, where it names the split of each."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from coca_jax.data import dedup, prepare, quarantine
from coca_jax.data.sources import files, manifest, registry
from coca_jax.data.sources.items import Item, Options, Unit, whole_files
from coca_jax.data.sources.registry import Format
from coca_jax.runtime import activity, unreachable

FIELD = "split"
_LOOK_AT = 100  # examples, of which one has the field where it is there at all
_SHOWN = 5  # values in a line


@dataclasses.dataclass(frozen=True)
class SplitField:
    """The splits that the field tells: 'train', and 'test', 'validation' or both.

    Attributes:
        values: of the field, of each split: ('val', 'Val').
        rows: how many examples have each value; '' of those without one.
    """

    values: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, int]

    def options(self, split: str, options: Options) -> Options:
        """The options with which one of the splits, by any of its names, is read. What `dedup`
        finds in several stays in the first that is held out."""
        name = split_of(split)
        where = (*options.where, (FIELD, self.values[name]))
        order = [one for one in self.values if one != "train"] + ["train"]
        before = order[: order.index(name)] if options.dedup != "none" else []
        yields_to = tuple((FIELD, self.values[one]) for one in before)
        return dataclasses.replace(options, where=where, yields_to=yields_to)

    def unused(self, used: Sequence[str]) -> str:
        """A line on the examples that are in none of the used splits; '' where all are."""
        taken = {value for split in used for value in self.values[split]}
        left = [(value, count) for value, count in self.rows.items() if value not in taken]
        if not left:
            return ""
        shown = [f"{count} of {value!r}" for value, count in left if value][:_SHOWN]
        shown += [f"{count} without a value" for value, count in left if not value]
        more = ", ..." if len(shown) < len(left) else ""
        return f"rows not used, by their field {FIELD!r}: {', '.join(shown)}{more}"


def read(stored: Mapping[str, Any] | None) -> SplitField | None:
    """A SplitField from the dict that `dataclasses.asdict` made of one; None from None."""
    if stored is None:
        return None
    return SplitField({k: tuple(values) for k, values in stored["values"].items()}, stored["rows"])


def split_of(value: str) -> str:
    """The split that a value means, in any case: 'restval' of Karpathy's lists is for training, and
    validation has several usual names."""
    name = value.strip().lower()
    return "train" if name == "restval" else files.SPLITS.get(name, name)


def of_data(format: str, input: str, options: Options) -> tuple[list[str], SplitField | None]:
    """(the splits that data tell, what their field tells): by the names of their files or folders,
    else by the field; of names, and where nothing tells a split, ([...], None).

    Raises as `splits.splits_of` and `find_splits`.
    """
    names = prepare.splits_of(format, input)
    found = None if names else find_splits(format, input, options)
    return (list(found.values) if found else names), found


def find_splits(format: str, input: str, options: Options) -> SplitField | None:
    """The splits that the field tells; None where there is no such field, or it has not both
    examples to train on and others.

    The whole input is gone through, as those of one split may come behind all others; of lists and
    tables no image is read.

    Raises:
        FileNotFoundError, ValueError: as the format's `plan`.
    """
    with unreachable.required(), activity.announce(f"looking for splits in {input}"):
        return of_values(_values(format, input, options))


def of_values(values: Iterable[Any]) -> SplitField | None:
    """As `find_splits`, from the value of each example in order; None and NaN count as no value."""
    spelled = ("" if value is None or value != value else str(value) for value in values)
    first = list(itertools.islice(spelled, _LOOK_AT))
    if not any(first):
        return None
    rows = Counter(itertools.chain(first, spelled))
    known: dict[str, list[str]] = {}
    for value in sorted(rows):
        known.setdefault(split_of(value), []).append(value)
    there = [split for split in ("train", "test", "validation") if split in known]
    if "train" not in there or len(there) < 2:
        return None
    return SplitField({split: tuple(known[split]) for split in there}, dict(rows))


def prepare_each(
    by_field: SplitField,
    where: tuple[str, str, str],
    keywords: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """`splits.prepare(*where, **keywords)` of each split that the field tells, its options
    narrowed to that: split -> what it returns. A split that likeness alone leaves nothing of, as
    where all of it is in `exclude`, is said and not written.

    Raises ValueError where nothing is left of any, or for another reason, or of one that is there
    from before; the others are written. And as `splits.prepare`.
    """
    found: dict[str, dict[str, Any]] = {}
    empty: list[prepare.NothingLeft] = []
    filtered: Counter[str] = Counter()
    wrong: list[str] = []
    for split, values in by_field.values.items():
        options = by_field.options(split, keywords["options"])
        try:
            found[split] = prepare.prepare(
                *where, **{**keywords, "split": split, "options": options}
            )
        except prepare.NothingLeft as error:
            left_out = error.left_out(sum(by_field.rows[value] for value in values))
            empty.append(error)
            filtered += left_out
            reasons = left_out + Counter(entry["reason"] for entry in error.listed)
            why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            line = f"{where[1]}: nothing is left of [{split}]: {why}"
            others = [entry for entry in error.listed if entry["reason"] not in dedup.REASONS]
            if others:
                wrong.append(f"{line}; the first: {others[0]['key']}: {others[0]['detail']}")
            elif split in manifest.read_manifest(where[2])["splits"]:
                wrong.append(f"{line}; {where[2]} has that split from before: give another --out")
            else:
                say(line)
    if found and wrong:
        raise ValueError(wrong[0])
    if found:
        return found
    listed = [entry for error in empty for entry in error.listed]
    read = len(listed) + filtered.total()
    raise ValueError(quarantine.nothing_usable(where[1], read, listed, filtered))


def narrowed(path: str, by_field: SplitField | None, split: str, options: Options) -> Options:
    """The options with which a split of the data at a path is read; those given where no field
    tells splits. Raises ValueError for a split that it does not tell."""
    if not by_field:
        return options
    if split_of(split) not in by_field.values:
        there = ", ".join(by_field.values)
        raise ValueError(
            f"data {path} have no split {split!r}; their field {FIELD!r} tells {there}"
        )
    return by_field.options(split, options)


def _values(format: str, input: str, options: Options) -> Iterator[Any]:
    """What the field says of each example that can be read."""
    module = registry.find(format)
    for unit in whole_files(module.plan(input, "", options)):
        yield from _of_unit(module, unit, options)


def _of_unit(module: Format, unit: Unit, options: Options) -> Iterator[Any]:
    if module.column:
        yield from module.column(unit, FIELD)
        return
    items: Iterable[Item]
    if module.located:
        items = (found.item for found in module.located(unit, options))
    else:
        items = module.read(unit, options)
    yield from (item.extra.get(FIELD) for item in items if not item.problem)
