"""Prints the tables of README.md from results.json, to paste in.

python benchmarks/table.py
"""

from __future__ import annotations

import json
import pathlib
import statistics

from settings import DATA, ROWS

HERE = pathlib.Path(__file__).resolve().parent


def table(lines: list[dict]) -> str:
    """A table a data set: a row each row, minutes and machine, the mean over its seeds and their
    range; the seeds' cell says where they are of several commits."""
    parts = []
    for name, data in DATA.items():
        found: dict[tuple, list[dict]] = {}
        for line in lines:
            if line["data"] == name and line["minutes"]:
                key = (line["row"], line["minutes"], line["machine"])
                found.setdefault(key, []).append(line)
        heads = ["row", "CPU minutes", "spent", "seeds", "pairs", *data.shown, "machine"]
        parts.append(f"### {name}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for (row, minutes, machine), of in sorted(found.items()):
            spent = statistics.mean(line["cpu_minutes"] for line in of)
            commits = len({line.get("commit") for line in of})  # older lines do not say theirs
            seeds = f"{len(of)} of {commits} commits" if commits > 1 else str(len(of))
            cells = [row, f"{minutes:g}", f"{spent:.1f}", seeds]
            cells.append(f"{statistics.mean(line['pairs'] for line in of):,.0f}")
            cells += [shown([line["scores"].get(key) for line in of]) for key in data.shown]
            parts[-1] += f"\n| {' | '.join([*cells, machine])} |"
        if not found:
            parts[-1] = f"### {name}\n\nNo run yet."
    about = "\n".join(f"- `{name}`: {row.about}." for name, row in ROWS.items())
    return f"{about}\n\n" + "\n\n".join(parts) + "\n"


def shown(values: list[float | None]) -> str:
    """'38.9 (38.4 to 39.4)' of shares; '-' where a row has no such score."""
    known = [100 * v for v in values if v is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.1f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.1f} to {max(known):.1f})"


if __name__ == "__main__":
    print(table(json.loads((HERE / "results.json").read_text())), end="")
