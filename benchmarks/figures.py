"""Measures the figures of README.md and docs/*.md, keeps them, and writes them into the pages.

    python benchmarks/figures.py list
    python benchmarks/figures.py measure --quick
    python benchmarks/figures.py measure --only=demo,losses --folder=. --runs=runs/figures
    python benchmarks/figures.py measure --quick --clock --minutes=25   # in a quiet hour
    python benchmarks/figures.py changes        # before and after, and what got worse
    python benchmarks/figures.py write          # the numbers behind the marks of the pages
    python benchmarks/figures.py check          # says whether they are another

`measure` takes row by row and keeps each as it comes, so that a stopped one goes on: rows of the
commit that is checked out are done (--again measures them once more), with files that differ from
it those of the very same files. What was measured while the program changed is not kept. It says
what was there and what came. `--quick` leaves out what takes more than three minutes of two cores;
without it and --only it takes hours. What the clock measures is left out while the machine has
other work, unless --busy; --clock takes such rows alone. With --minutes it begins nothing that
would not be done by then, and the next call goes on.

docs/results.json has a line a row: `values` (with `low` and `high` where there is an interval),
`unit`, `how` (measured, or estimated: `command` says how), `seeds`, `commit` of the program (null:
it was not written down), `date`, `machine`, `command`, `peer`, `note` and `reason` by hand, which
stay where the row is measured again on its commit, and, once it was measured on another, `before`:
values, commit, date and note of the last other commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import signal
import sys
import time
from typing import Any

import changes
import marks
from figure_rows import MEASUREMENTS, of_row
from machine import busy, commit, machine, versions
from measuring import ROOT, Given, Measurement

RESULTS = ROOT / "docs/results.json"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
QUIET = 0.3  # cores that may be busy with other work when the clock measures
BY_HAND = ("note", "reason")


def read() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text())


def keep(rows: dict[str, dict[str, Any]]) -> None:
    """A line a row; whole or not at all."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    new = RESULTS.with_suffix(".new")
    new.write_text(f"{{\n{lines}\n}}\n")
    new.replace(RESULTS)


def entry(
    one: Measurement, values: dict[str, float], old: dict[str, Any], now: str | None
) -> dict[str, Any]:
    """The line of a row that was just measured, on commit `now`."""
    busy = f"load {os.getloadavg()[0]:.1f}"
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    known = list(old.get("values", {}))  # pages go by the order
    order = [key for key in known if key in values] + [key for key in values if key not in known]
    row: dict[str, Any] = dict(values={key: rounded(values[key]) for key in order})
    row |= {"unit": old["unit"]} if "unit" in old else {}
    row |= dict(how=one.how) | one.more
    row |= dict(commit=now, date=datetime.date.today().isoformat())
    row |= dict(machine=f"{machine()}, {busy}; {packages}", command=one.command)
    if "values" in old and old["commit"] == row["commit"]:
        return {key: old[key] for key in ("before", *BY_HAND) if key in old} | row
    if "values" in old:
        row["before"] = {key: old.get(key) for key in ("values", "commit", "date")}
        row["before"] |= {"note": old["note"]} if "note" in old else {}
    return row


def rounded(value: float) -> float:
    """Four digits say more than any page shows, but for counts."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def measure(
    chosen: list[Measurement],
    given: Given,
    again: bool,
    beside: bool = False,
    minutes: float = float("inf"),
) -> list[str]:
    """Measures and keeps, one after the other; the rows that failed or were left out. given.runs:
    where the runs of all commits stay. beside: what the clock measures is measured beside other
    work, too. minutes: what would not be done by then is left out."""
    failed, end = [], time.monotonic() + 60 * minutes
    for one in chosen:
        rows = read()
        now = commit()
        if not again and all(name in rows and rows[name]["commit"] == now for name in one.rows):
            continue
        if one.clock and not beside and (others := busy()) > QUIET:
            why = f"left out, {others:.1f} cores are busy; --busy measures beside them"
            print(f"{one.rows[0]}: {why}", file=sys.stderr)
            failed += one.rows
            continue
        if time.monotonic() + 60 * one.minutes > end:
            print(f"{one.rows[0]}: left for the next call, --minutes are over", file=sys.stderr)
            failed += one.rows
            continue
        print(f"{one.rows[0]}{' ...' * (len(one.rows) > 1)}: {one.command}", file=sys.stderr)
        try:
            take(one, dataclasses.replace(given, runs=given.runs / (now or "unknown")), now)
        except Exception as error:  # whatever it is, the others are measured
            print(f"  failed: {error!r}", file=sys.stderr)
            failed += one.rows
    return failed


def take(one: Measurement, given: Given, now: str | None) -> None:
    """Measures and keeps the rows of one measurement, all or none, as those of commit `now`.

    Raises RuntimeError where the program has changed meanwhile, or where a row did not come.
    """
    found = one.run(given)
    if commit() != now:
        raise RuntimeError(
            f"the program was {now} when it began and is {commit()} now; measure it once more, and "
            f"remove what it trained in {given.runs} before that commit is measured again"
        )
    if lacking := [name for name in one.rows if name not in found]:
        raise RuntimeError(f"it measured {', '.join(found)}, and not {', '.join(lacking)}")
    rows = read()  # others may have measured meanwhile
    for name in one.rows:
        old = rows.get(name, {})
        for key, value in found[name].items():
            print(f"  {name}:{key} {told(old.get('values', {}).get(key), value)}")
        rows[name] = entry(one, found[name], old, now)
        if kept := [key for key in BY_HAND if key in rows[name] and key not in one.more]:
            print(f"  {name}: see whether its {' and '.join(kept)} still holds")
    keep(rows)


def told(before: float | None, now: float) -> str:
    """'1.25 -> 1.3 (+4.0%)'."""
    if before is None:
        return f"{now:.6g}"
    change = f" ({now / before - 1:+.1%})" if before else ""
    return f"{before:.6g} -> {now:.6g}{change}"


def fill(check: bool) -> bool:
    """Writes the numbers into the pages, or only says which pages have others; whether any had."""
    rows, others = read(), False
    for page in PAGES:
        text = page.read_text()
        try:
            new = marks.filled(text, rows)
        except ValueError as error:
            raise SystemExit(f"{page.relative_to(ROOT)}: {error}") from None
        if new == text:
            continue
        others = True
        print(f"{page.relative_to(ROOT)} {'has other numbers' if check else 'written'}")
        if not check:
            page.write_text(new)
    return others


def show() -> None:
    """Each row: how it came about, when, at which commit, where it stands, how it comes again."""
    places = {page.name: marks.named(page.read_text()) for page in PAGES}
    rows = read()
    for name, row in rows.items():
        one = of_row(name)
        again = f"{'quick' if one.quick else 'long'}: {one.command}"
        on = " ".join(page for page, names in places.items() if name in names)
        origin = f"{row['how']} {row['date']} {row['commit'] or 'commit unknown'}"
        print(f"{name:34} {row.get('unit', ''):8} {origin:36} {on}\n    {again}")
    print(f"{len(rows)} rows")


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("act", choices=("list", "measure", "changes", "write", "check"))
    parser.add_argument("--quick", action="store_true", help="only what takes minutes")
    parser.add_argument("--clock", action="store_true", help="only what the clock measures")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="that it may take")
    parser.add_argument("--only", default="", help="rows or their beginnings, by commas")
    parser.add_argument("--again", action="store_true", help="also what this commit has")
    parser.add_argument("--busy", action="store_true", help="the clock's rows, beside other work")
    parser.add_argument("--folder", default=".", help="where the recipes find data/")
    parser.add_argument("--runs", default="runs/figures", help="where runs stay, by commit")
    args = parser.parse_args()
    begin = tuple(filter(None, args.only.split(",")))
    if args.act == "list":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # list | head
        show()
    elif args.act == "changes":
        rows = {k: row for k, row in read().items() if not begin or k.startswith(begin)}
        found = changes.compared(rows, of_row)
        print(changes.table(found))
        raise SystemExit(int(any(mark == "worse" for *_, mark in found)))
    elif args.act == "measure":
        chosen = [
            one
            for one in MEASUREMENTS
            if (not begin or any(row.startswith(begin) for row in one.rows))
            and (one.quick or not args.quick)
            and (one.clock or not args.clock)
        ]
        if not chosen:
            raise SystemExit(f"--only={args.only}: nothing measures such a row; see `list`")
        folder, runs = (pathlib.Path(path).absolute() for path in (args.folder, args.runs))
        failed = measure(chosen, Given(folder, runs), args.again, args.busy, args.minutes)
        raise SystemExit(f"not measured: {', '.join(failed)}" if failed else 0)
    elif fill(args.act == "check") and args.act == "check":
        raise SystemExit("run python benchmarks/figures.py write")


if __name__ == "__main__":
    main()
