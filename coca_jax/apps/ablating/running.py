"""The runs of an ablation, one after the other; what is there is not done again.

At equal minutes a few steps of each variant are timed first, and say how many steps its runs have:
learning-rate schedules need that number beforehand. They are timed in turn and once more in the
reverse order, as a processor that is shared, or grows warm, is slower by the end. Both the times
and the minutes that the runs report are of steps and of waiting for data: start, compilation, saves
and evaluation are left out. On a CPU they are minutes of processor time over all cores, which other
programs on the machine change little; elsewhere they are the clock's.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import json
import math
import pathlib
import shutil
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from coca_jax.apps.ablating import outcome
from coca_jax.apps.ablating.table import Table, Variant
from coca_jax.config import Config, checks
from coca_jax.config.fields import dotted, plain
from coca_jax.data import filters, prepare, source_index, supervision
from coca_jax.data.sources import files
from coca_jax.evaluation.evaluators import base
from coca_jax.runtime import json_files, lease, metric_log, out_folder
from coca_jax.training import data_flag, recipes, setup
from coca_jax.training import trainer as training

PACE = 24  # steps that are timed, of which the first twelfth does not count
# Where these are over sooner they are timed again, and more of them: the first steps of a process
# are not as fast as later ones, and the shorter they are the longer that is in steps.
PACE_SECONDS, PACE_MOST = 4.0, 500
# A run of any length can be, before it is known how many steps there will be.
_ANY_LENGTH: dict[str, Any] = {
    "epochs": 0.0,
    "optimizer.warmup_steps": 0,
    "log.profile_steps": (),
}
# Of a run that is only timed: what compares evaluations goes with them, no service lists it, and it
# is the runs themselves that end, and are named, where the loss diverges.
_ALONE: dict[str, Any] = {
    "checkpoint.max_skipped": 0,
    "faults.spike_deviations": 0.0,
    "eval.tasks": (),
    "eval.guard": "",
    "checkpoint.best": "",
    "log.trackers": (),
}
Say = Callable[[str], None]


def ablate(table: Table, out: str, minutes: float, say: Say) -> dict[str, Any]:
    """Trains each variant with each seed in `out`/VARIANT/seedN, or goes on with what is there.

    Args:
        table: what to train.
        out: a local folder; it gets results.json, results.md and report.html after each run.
        minutes: of each run, or 0 for the steps that the configs say.
        say: takes lines for people.

    Returns dict(out, results, runs, failed). Raises ValueError or OSError for configs and data
    that cannot be, before anything is trained, where `out` holds another table, and where another
    process trains in it; Preempted when asked to stop.
    """
    folder = pathlib.Path(out)
    undone = []
    for variant in table.variants:
        places = (folder / variant.name / f"seed{seed}" for seed in table.seeds)
        if not all((place / outcome.DONE).exists() for place in places):
            check(variant, minutes, folder)
            undone.append(variant)
    folder.mkdir(parents=True, exist_ok=True)
    with lease.held(out, "--out"):  # whoever else began would throw away what this one times
        plan = Plan(folder / out_folder.PLAN, minutes)
        plan.check(table.variants)
        if minutes:
            plan.time(undone, folder, say)
        failed = _all_runs(table, folder, plan, minutes, say)
        results = outcome.write(table, folder, minutes, failed)
    total = len(table.seeds) * len(table.variants)
    return dict(out=str(folder), results=str(results), runs=total - len(failed), failed=failed)


def _all_runs(
    table: Table, folder: pathlib.Path, plan: Plan, minutes: float, say: Say
) -> dict[str, str]:
    """Makes those that are not done. Returns the name of each that failed and why it did."""
    failed: dict[str, str] = {}
    missed: set[str] = set()
    total, number = len(table.seeds) * len(table.variants), 0
    for seed in table.seeds:
        for variant in table.variants:
            number += 1
            place = folder / variant.name / f"seed{seed}"
            if not (place / outcome.DONE).exists():
                steps = plan.steps(variant)
                say(f"run {number} of {total}: {variant.name}, seed {seed}")
                values = dict(seed=seed) | (dict(steps=steps, epochs=0.0) if steps else {})
                try:
                    took = one_run(indexed(variant.config(values), folder), place)
                    if off := outcome.off(took, minutes):
                        say(f"{variant.name}, seed {seed}: {off}")
                except (ValueError, OSError) as error:  # a loss that diverges is a result too
                    failed[f"{variant.name}, seed {seed}"] = " ".join(str(error).split())
                    say(f"{variant.name}, seed {seed}: {error}")
                outcome.write(table, folder, minutes, failed)
            for name, near in outcome.missing(table, folder).items():
                if name not in missed:  # told behind the first run, in case it is misspelt
                    say(
                        f"metrics: no run so far has {name!r}; {near}: where that is meant, mend "
                        "the table and give the command again; what is done stays"
                    )
                missed.add(name)
    if others := outcome.unasked(table, folder):
        say(f"left out of the results, as the table does not ask for them: {', '.join(others)}")
    return failed


def indexed(config: Config, folder: pathlib.Path) -> Config:
    """The config whose sources that are not prepared are indexes of them, made now where they are
    not there: below `folder`/data, one for all variants that read the same. Raises as
    `indexes.of_sources`."""
    read = [source_index.reading(one) for one in config.data.sources if source_index.is_needed(one)]
    if not read:
        return config
    told = json.dumps([[files.absolute(path), *how] for path, *how in read])
    name = hashlib.blake2b(told.encode(), digest_size=4).hexdigest()
    with prepare.within("--out", str(folder)):
        return source_index.of_sources(config, str(folder / "data" / name))


def check(variant: Variant, minutes: float, folder: pathlib.Path) -> None:
    """Raises ValueError or OSError, naming the variant, for a config or data that cannot be. Data
    that are not prepared are indexed, see `indexed`."""
    try:
        config = variant.config(dict(steps=1) | _ANY_LENGTH if minutes else None)
        if not (config.steps or config.epochs):
            raise ValueError("give steps or epochs, or --minutes")
        setup.check_config(config)
        for entry in indexed(config, folder).data.sources:
            filters.open_whole(entry)
            supervision.of(entry).configured(entry, config.data)
        base.check(config.eval.tasks)
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"variant {variant.name}: {error}") from None


def _check_steps(variant: Variant, steps: int) -> None:
    """Raises ValueError, naming the variant, for a warm-up or a profile that does not fit into the
    steps that its minutes are. A recipe's own warm-up, which a change of steps would shorten, too:
    of slow variants alone, and nobody would be told."""
    values: dict[str, Any] = dict(steps=steps, epochs=0.0)
    if "optimizer.warmup_steps" not in variant.values:
        recipe = recipes.typed(recipes.load(variant.recipe))
        values["optimizer.warmup_steps"] = recipe.optimizer.warmup_steps
    try:
        checks.check_length(variant.config(values), steps)
    except ValueError as error:
        raise ValueError(f"variant {variant.name}: {error}") from None


def with_data(table: Table, named: Sequence[str], out: str, fields: Mapping[str, str]) -> Table:
    """The table with the data of `--data` in place of its recipes', indexed in `out`/data where
    they are not prepared; evaluations that the table gives stay. fields: as of
    `own_data.of_command`. Raises as that."""
    if not named and not any(fields.values()):
        return table
    variants = []
    for number, variant in enumerate(table.variants):
        # What is indexed for the first is told once; the others find it.
        with prepare.within("--out", out):
            config = data_flag.of_command(
                variant.config(),
                named,
                out,
                check=setup.check_devices,
                fields=fields,
                keep_tasks="eval.tasks" in variant.values,
                main_process=not number,
            )
        own = {"data.sources": config.data.sources, "eval.tasks": config.eval.tasks}
        values = {**variant.values, **{key: plain(value) for key, value in own.items()}}
        variants.append(dataclasses.replace(variant, values=values))
    return dataclasses.replace(table, variants=tuple(variants))


def one_run(config: Config, place: pathlib.Path) -> float:
    """Trains, notes what came out and returns its minutes. Raises as `training.trainer.train`."""
    summary = training.train(config, str(place))
    rows = metric_log.read_metrics(place)
    scores = {name: value for name, value in summary.items() if "/" in name}
    commit, minutes = outcome.commit(), sum(map(seconds, rows)) / 60
    skipped = summary.get("skipped_steps", 0)
    json_files.write_sealed(
        place / outcome.DONE,
        dict(
            steps=summary["steps"],
            minutes=minutes,
            scores=scores | outcome.last_losses(rows),
            **(dict(commit=commit) if commit else {}),
            **(dict(skipped_steps=skipped) if skipped else {}),
        ),
    )
    gc.collect()  # programs of a run that is over
    return minutes


def seconds(row: Mapping[str, Any]) -> float:
    """Seconds of steps since the row before: see the module."""
    if jax.default_backend() == "cpu":
        return row.get("processor_time") or 0.0
    return (row.get("step_seconds") or 0.0) + (row.get("data_wait_seconds") or 0.0)


def differences(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """In which keys two variants, each dict(recipe, values, config), are not the same, '' where
    they are; long values cut. Keys that only one version of the package has do not count."""
    there, here = (
        dict(recipe=one.get("recipe")) | dict(one.get("values") or {}) for one in (kept, asked)
    )
    keys = [key for key in here | there if there.get(key) != here.get(key)]
    for key, value in asked["config"].items():
        if key not in here | there and kept["config"].get(key, value) != value:
            keys.append(key)
    there, here = kept["config"] | there, asked["config"] | here
    shown = (
        f"{key} is {_short(there.get(key))} there, {_short(here.get(key))} here" for key in keys
    )
    return "; ".join([*itertools.islice(shown, 3), *(["and so on"] if len(keys) > 3 else [])])


def _short(value: Any) -> str:
    return "not set" if value is None else textwrap.shorten(repr(value), 60, placeholder=" ...")


def _timed(minutes: Any) -> str:
    return f"with --minutes={minutes}".removesuffix(".0") if minutes else "without --minutes"


class Plan:
    """What was asked for and, at equal minutes, the steps of each variant: plan.json."""

    def __init__(self, path: pathlib.Path, minutes: float):
        self._path, self._minutes = path, minutes
        self._kept: dict[str, Any] = dict(minutes=minutes, variants={})
        if path.exists():
            self._kept = json_files.read_sealed(path)
        if self._kept.get("minutes") != minutes or not isinstance(self._kept.get("variants"), dict):
            raise ValueError(
                f"{path.parent} holds runs {_timed(self._kept.get('minutes'))}, not "
                f"{_timed(minutes)}; give that, or another --out"
            )

    def check(self, variants: Sequence[Variant]) -> None:
        """Notes variants that are new. Raises ValueError for one that was another before, and has
        begun."""
        for variant in variants:
            # The recipe's file may have been edited.
            config = dotted(Config, variant.config().to_dict())
            asked = json_files.seal(
                dict(recipe=variant.recipe, values=dict(variant.values), config=config)
            )
            del asked[json_files.SEAL_KEY]
            kept = self._kept["variants"].setdefault(variant.name, asked | dict(steps=0))
            kept.setdefault("config", asked["config"])  # older plans have none
            if differences(kept, asked):
                if not (self._path.parent / variant.name).exists():
                    self._kept["variants"][variant.name] = asked | dict(steps=0)
                    continue
                raise ValueError(
                    f"{self._path.parent} holds another variant {variant.name!r}: "
                    f"{differences(kept, asked)}; give this one another name, or give another --out"
                )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        json_files.write_sealed(self._path, self._kept)

    def steps(self, variant: Variant) -> int:
        """The steps of each run of a variant; 0 for what its config says."""
        return self._kept["variants"][variant.name]["steps"] if self._minutes else 0

    def time(self, variants: Sequence[Variant], folder: pathlib.Path, say: Say) -> None:
        """Finds the steps of those that have none yet, see the module. One alone is timed once:
        there is nothing that it would have to be compared with. Raises as `_check_steps`, as soon
        as it can be told."""
        new = [one for one in variants if not self._kept["variants"][one.name]["steps"]]
        rounds = (new, new[::-1]) if len(variants) > 1 else (new,)
        for number, variant in ((n, one) for n, some in enumerate(rounds) for one in some):
            paces = self._kept["variants"][variant.name].setdefault("paces", [])
            if len(paces) == number:  # else an earlier start timed it
                paces.append(self._pace(variant, folder / ".pace", say))
                json_files.write_sealed(self._path, self._kept)
            _check_steps(variant, self._steps_at(statistics.mean(paces)))
        for variant in new:
            kept = self._kept["variants"][variant.name]
            pace = statistics.mean(kept["paces"])
            kept["steps"] = self._steps_at(pace)
            say(f"{variant.name}: {pace:.3g} s a step, so {kept['steps']:,} steps")
        json_files.write_sealed(self._path, self._kept)

    def _steps_at(self, pace: float) -> int:
        return max(1, round(60 * self._minutes / pace))

    def _pace(self, variant: Variant, place: pathlib.Path, say: Say) -> float:
        """Seconds of a step, over PACE steps or as many as PACE_SECONDS hold, PACE_MOST at most,
        and no more than a run has."""
        pace = self._timed(variant, place, PACE, say)
        enough = math.ceil(min(PACE_SECONDS, 60 * self._minutes) / pace) + 2
        return pace if enough <= PACE else self._timed(variant, place, min(PACE_MOST, enough), say)

    def _timed(self, variant: Variant, place: pathlib.Path, steps: int, say: Say) -> float:
        """Seconds of a step, of a short run that is thrown away."""
        say(f"{variant.name}: {steps} steps, to see how long one takes")
        shutil.rmtree(place, ignore_errors=True)
        every = max(2, steps // 12)
        values = {"steps": steps, "log.every_steps": every} | _ALONE | _ANY_LENGTH
        training.train(indexed(variant.config(values), place.parent), str(place))
        rows = [row for row in metric_log.read_metrics(place) if row["step"] > every]
        shutil.rmtree(place, ignore_errors=True)
        return max(1e-9, sum(map(seconds, rows)) / (steps - every))
