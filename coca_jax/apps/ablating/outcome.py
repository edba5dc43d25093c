"""What came out of an ablation: results.json, results.md and report.html, after each run anew.

The interval of a variant is Student's, at 95%, of the mean over its seeds. Its difference from the
first variant is taken seed by seed, since both then see the same data in the same order.
"""

from __future__ import annotations

import difflib
import json
import math
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

import coca_jax
from coca_jax.apps.ablating.table import Table, Variant
from coca_jax.evaluation import report_ablation, report_data
from coca_jax.evaluation.metrics.intervals import COMPANIONS
from coca_jax.runtime import json_files, storage
from coca_jax.training import bad_steps

DONE = "ablation.json"
MOST_OFF = 0.15  # share of the minutes by which a run may miss them without a word
_LOSSES = ("loss", "contrastive_loss", "captioning_loss")


def last_losses(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{'train/batches/loss': ...}: means over the last tenth of the rows of metrics.jsonl."""
    last = rows[-max(1, len(rows) // 10) :]
    found = {}
    for name in _LOSSES:
        values = [row[name] for row in last if row.get(name) is not None]
        if values:
            found[f"{report_ablation.TRAIN}/batches/{name}"] = sum(values) / len(values)
    return found


def write(
    table: Table, folder: pathlib.Path, minutes: float, failed: Mapping[str, str]
) -> pathlib.Path:
    """Writes the three files from the runs that are done; returns the path of results.json."""
    found = collect(table, folder, minutes, failed)
    storage.write_text(folder / "results.json", json.dumps(found, indent=1) + "\n")
    shown = list(table.metrics) or headlines(found["variants"])
    storage.write_text(folder / "results.md", markdown(found, shown))
    report_ablation.write(found, shown, folder / "report.html")
    return folder / "results.json"


def collect(
    table: Table, folder: pathlib.Path, minutes: float, failed: Mapping[str, str]
) -> dict[str, Any]:
    """All of results.json."""
    done = {variant.name: runs_of(variant, table.seeds, folder) for variant in table.variants}
    first = done[table.variants[0].name]
    return dict(
        version=coca_jax.__version__,
        commit=commit(),
        minutes=minutes or None,
        minutes_are="of steps and waiting for data alone: of processor time on a CPU, of the "
        "clock elsewhere",
        seeds=list(table.seeds),
        failed=dict(failed),
        variants={
            variant.name: dict(
                config=variant.recipe,
                overrides=dict(variant.values),
                runs={str(seed): run for seed, run in done[variant.name].items()},
                metrics=summaries(done[variant.name], first),
            )
            for variant in table.variants
        },
    )


def missing(table: Table, folder: pathlib.Path) -> dict[str, str]:
    """{metric of the table that no run has: what there is in its place}, once there are runs."""
    done = [runs_of(variant, table.seeds, folder) for variant in table.variants]
    names = {name for runs in done for run in runs.values() for name in run["scores"]}
    found = {}
    for name in table.metrics if names else ():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            found[name] = f"there are {', '.join(near or sorted(names)[:3])}"
    return found


def unasked(table: Table, folder: pathlib.Path) -> list[str]:
    """The runs, VARIANT/seedN, that are done in the folder and not of the table, by name."""
    asked = {f"{one.name}/seed{seed}" for one in table.variants for seed in table.seeds}
    there = {path.parent.relative_to(folder).as_posix() for path in folder.glob(f"*/seed*/{DONE}")}
    return sorted(there - asked)


def runs_of(variant: Variant, seeds: Sequence[int], folder: pathlib.Path) -> dict[int, Any]:
    """{seed: dict(steps, minutes, scores, in a checkout commit, and skipped_steps where there are
    any)} of the runs that are done."""
    found = {}
    for seed in seeds:
        path = folder / variant.name / f"seed{seed}" / DONE
        if path.exists():
            found[seed] = json_files.read_sealed(path)
    return found


def summaries(runs: Mapping[int, Any], first: Mapping[int, Any]) -> dict[str, Any]:
    """{metric: dict(values by seed, mean, low, high, difference from the first variant)}."""
    names = dict.fromkeys(name for run in runs.values() for name in run["scores"])
    found = {}
    for name in names:
        if any(name.endswith(end) and name.removesuffix(end) in names for end in COMPANIONS):
            continue
        values = {seed: run["scores"].get(name) for seed, run in runs.items()}
        values = {s: v for s, v in values.items() if v is not None and math.isfinite(v)}
        pairs = {s: first[s]["scores"].get(name) for s in values if s in first}
        apart = [values[s] - v for s, v in pairs.items() if v is not None and math.isfinite(v)]
        found[name] = dict(
            values={str(seed): value for seed, value in values.items()},
            **interval(list(values.values())),
            difference=interval(apart) if runs is not first else None,
        )
    return found


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """dict(mean, low, high); no interval of fewer than two values, nothing of none."""
    if not values:
        return dict(mean=None, low=None, high=None)
    mean = float(np.mean(values))
    if len(values) < 2:
        return dict(mean=mean, low=None, high=None)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return dict(mean=mean, low=mean - half, high=mean + half)


def headlines(variants: Mapping[str, Any]) -> list[str]:
    """The headline metrics of all evaluations; of runs without any, their last losses."""
    names = dict.fromkeys(name for one in variants.values() for name in one["metrics"])
    found = [
        f"{evaluator}/{data}/{metric}"
        for (evaluator, data), there in report_data.tasks_of(names).items()
        if evaluator != report_ablation.TRAIN
        for metric in report_data.headline_metrics(evaluator, there)[:2]
    ]
    return found or list(names)


def markdown(found: Mapping[str, Any], shown: Sequence[str]) -> str:
    """A table with a row a variant: steps, minutes, and each metric with its interval; below it the
    runs that failed, those of other minutes than were asked for, and those with steps that changed
    nothing."""
    rows = report_ablation.rows(found, shown)
    heads = ["variant", "runs", "steps", "minutes", *shown]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"{cell['value']} {cell['interval']}".strip() or "-" for cell in row["cells"]]
        lines.append(f"| {' | '.join([row['name'], *row['counts'], *cells])} |")
    notes = [f"- failed: {name}: {why}" for name, why in found["failed"].items()]
    for name, one in found["variants"].items():
        for seed, run in one["runs"].items():
            if told := off(run["minutes"], found["minutes"] or 0.0):
                notes.append(f"- {name}, seed {seed}: {told}")
            if told := bad_steps.told(run.get("skipped_steps", 0), run["steps"]):
                notes.append(f"- {name}, seed {seed}: {told}")
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def off(took: float, asked: float) -> str:
    """How far the minutes of a run are from those that were asked for, in words; '' where that is
    at most MOST_OFF, or where none were asked for."""
    if not asked or abs(took / asked - 1) <= MOST_OFF:
        return ""
    return f"it took {took:.2g} minutes, {took / asked:.2g} times the {asked:g} asked for"


def commit() -> str:
    """The commit that the package was checked out at, '' for an installed one."""
    place = pathlib.Path(coca_jax.__file__)
    found = ""
    # An environment may lie in a checkout of something else.
    for what in (("ls-files", "--error-unmatch", place.name), ("rev-parse", "--short=12", "HEAD")):
        try:
            done = subprocess.run(
                ["git", "-C", str(place.parent), *what], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
        found = done.stdout.strip()
    return found
