"""What evaluations showed of single pictures: the worst first, and the geometry of a confusion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import logging

from coca_jax.report import maps, numbers

Found = Mapping[str, Any]
CELL = 18  # pixels of a confusion


def sections(examples: Mapping[str, Found], layouts: set[str]) -> list[dict[str, Any]]:
    """dict(id, title, data, layout, found, map) of each evaluation whose layout is known; a warning
    names another."""
    made = []
    for number, (name, found) in enumerate(examples.items()):
        evaluator, _, data = name.partition("/")
        layout = found.get("kind", "") if isinstance(found, Mapping) else ""
        if isinstance(layout, str) and layout in layouts:
            title = numbers.title_of(evaluator)
            try:
                shown = _ORDERS.get(layout, dict)(found)
                drawn = maps.placed(found.get("map"))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                text = f"eval_examples.json is damaged: {name}: {type(error).__name__}: {error}"
                raise ValueError(f"{text}; run evaluate again") from None
            about = dict(id=f"e{number}", title=title, data=data, layout=layout)
            made.append(dict(**about, found=shown, map=drawn))
        elif layout:
            logging.warning(
                "eval_examples.json: the pictures of %s are left out: there is no layout %r among "
                "report/templates/layouts: %s",
                *(name, layout, ", ".join(sorted(layouts))),
            )
    return made


def _worst_first(found: Found, place: Callable[[Found], Any]) -> list[Found]:
    """The worst of all examples, then those spread over all, by `place`."""
    worst = list(found.get("worst", ()))
    return sorted(worst + [one for one in found["items"] if one not in worst], key=place)


def _marks(right: Iterable[bool]) -> list[str]:
    """'yes' for right guesses, 'no' for those that stand before the first of them, '' behind it."""
    marks, found = [], False
    for one in right:
        found = found or one
        marks.append("yes" if one else "" if found else "no")
    return marks


def _by_class(found: Found) -> dict[str, Any]:
    """Wrong guesses first, the surest of them at the top; classes from the hardest on."""
    shown = dict(found)

    def place(item: Found) -> tuple[bool, float]:
        best = item["guesses"][0]
        right = best[0] in item["truth"]
        return right, best[1] if right else -best[1]

    shown["items"] = [
        dict(item, marks=_marks(name in item["truth"] for name, _ in item["guesses"]))
        for item in _worst_first(found, place)
    ]
    classes = sorted(found["per_class"].items(), key=lambda item: item[1]["accuracy"])
    shown["hardest"] = classes[:12]
    shown["all_classes"] = sorted(found["per_class"].items()) if len(classes) > 12 else []
    table = found.get("confusion")  # not there where classes are too many, or none was seen
    shown["grid"] = confusion(table) if table and table["rows"] else None
    return shown


def _captions(found: Found) -> dict[str, Any]:
    """Wrong ones first, the least like their references at the top."""
    shown = dict(found)
    shown["items"] = _worst_first(found, lambda item: (item["exact"], item.get("f1", 0.0)))
    return shown


def _retrieval(found: Found) -> dict[str, Any]:
    """Queries whose match comes late first; files of before ranks stood in them do not say how late
    one comes that is not among the first five."""

    def place(hits: list[Found]) -> int:
        right = [hit.get("rank", n) for n, hit in enumerate(hits, 1) if hit["correct"]]
        return -(right[0] if right else len(hits) + 1)

    shown = dict(found)
    shown["items"] = []
    for item in sorted(found["items"], key=lambda item: place(item["texts"])):
        texts = _with_right(item["texts"], 4)
        marks = _marks(hit["correct"] for hit in texts)
        spare = 2 if marks[2:] == ["no", "yes"] else 3  # left out where there is little room
        shown["items"].append(dict(item, texts=texts, marks=marks, spare=spare))
    shown["text_items"] = sorted(found["text_items"], key=lambda item: place(item["images"]))
    return shown


def _with_right(hits: list[Found], count: int) -> list[Found]:
    """The first hits, of which the last gives its place to a right one that comes later."""
    first = hits[:count]
    later = [hit for hit in hits[count:] if hit["correct"]][:1]
    return first if any(hit["correct"] for hit in first) or not later else first[:-1] + later


_ORDERS = dict(zero_shot=_by_class, captioning=_captions, retrieval=_retrieval)


def confusion(table: Found) -> dict[str, Any]:
    """Places of a confusion's names and cells, in pixels: a row is a true class, a column the
    guess. table: rows, columns (names) and counts."""
    rows, columns, counts = table["rows"], table["columns"], table["counts"]
    left, top = 8 + 7 * max(map(len, rows)), 8 + 6 * max(map(len, columns))
    heads = [dict(x=left + CELL * j + CELL / 2 + 4, name=name) for j, name in enumerate(columns)]
    lines = []
    for i, name in enumerate(rows):
        total, cells = max(sum(counts[i]), 1), []
        for j, guess in enumerate(columns):
            share = counts[i][j] / total
            cells.append(
                dict(
                    x=left + CELL * j,
                    kind="hit" if name == guess else "miss",
                    opacity=f"{0.15 + 0.85 * share:.2f}" if share else "",
                    note=f"{name} taken for {guess}: {counts[i][j]} of {total}",
                )
            )
        lines.append(dict(y=top + CELL * i, name=name, cells=cells))
    return dict(
        width=left + CELL * len(columns) + 4 * top // 5,
        height=top + CELL * len(rows) + 4,
        left=left,
        top=top,
        size=CELL - 1,
        columns=heads,
        rows=lines,
    )
