"""Rows of variants that `coca-jax ablate` trains, by the tables beside this file."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from measuring import HERE, ROOT, Given, Rows, Values
from measuring_runs import shown

SCORES = dict(
    zero_shot="zero_shot/scenes_heldout/top1",
    r_1_image_to_text="retrieval/scenes_heldout/image_to_text_r1",
    r_1_text_to_image="retrieval/scenes_heldout/text_to_image_r1",
    exact_captions="captioning/scenes_test/exact_match",
    the_same_held_out="captioning/scenes_heldout/exact_match",
    f1_of_2_to_4_objects="captioning/scenes_heldout_many/attribute_f1",
    perplexity_of_these="captioning/scenes_heldout_many/perplexity",
)
NAMED = dict(
    image_to_text="retrieval/emoji_openmoji/image_to_text_r1",
    text_to_image="retrieval/emoji_openmoji/text_to_image_r1",
    exact="captioning/emoji_openmoji/exact_match",
)
SHAPES = {
    f"{data}_{way}": f"retrieval/{data}_test/{way}_r5"
    for data in ("gimp_help", "stamps")
    for way in ("image_to_text", "text_to_image")
}
OF_OPTIONS = (*tuple(SCORES)[:3], "f1_of_2_to_4_objects")  # in two minutes no caption is exact
OPTIONS = ("recipe", "adamw", "rms_norm", "rope", "geglu", "global", "bag")
RANGED = ("both", "both_10")
ABLATIONS = {row: tuple(SCORES) for row in (*RANGED, "one_query", "negatives")} | {
    "contrastive": tuple(SCORES)[:3],
    "captioning": tuple(SCORES)[3:],
}


def ablations(given: Given) -> Rows:
    """Variants of 0.1's demo by `ablate`, three seeds: means and ranges."""
    return _rows(given, "ablations", RANGED)


def ablations_one_seed(given: Given) -> Rows:
    """The others, seed 0."""
    return _rows(given, "ablations_one_seed", tuple(row for row in ABLATIONS if row not in RANGED))


def _rows(given: Given, table: str, rows: Sequence[str]) -> Rows:
    """They need no data, and the table names its recipe from the clone's folder."""
    runs = _ablated(dataclasses.replace(given, folder=ROOT), table)
    return {
        f"ablations/{row}": _spread(
            runs[row], {name: SCORES[name] for name in ABLATIONS[row]}, row in RANGED
        )
        for row in rows
    }


def options(given: Given) -> Rows:
    """Options alone, in two CPU minutes of emoji's steps, three seeds: means and ranges."""
    return _alone(given, "options", NAMED)


def options_demo(given: Given) -> Rows:
    """The same in two CPU minutes of the demo's steps."""
    return _alone(given, "options_demo", {name: SCORES[name] for name in OF_OPTIONS})


def _alone(given: Given, table: str, names: Mapping[str, str]) -> Rows:
    runs = _ablated(given, table, "--minutes=2")
    return {
        f"{table}/{row}": dict(steps=each[0]["steps"]) | _spread(each, names, True)
        for row, each in runs.items()
    }


def packing(given: Given) -> Rows:
    """Pictures of every shape, squashed and packed, in two CPU minutes of steps, three seeds."""
    data = [f"--data=data/{name}" for name in ("gimp_help", "stamps")]
    runs = _ablated(given, "packing", "--minutes=2", *data)
    rows = {}
    for row, each in runs.items():
        rates = [64 * run["steps"] / (60 * run["minutes"]) for run in each]
        rows[f"packing/{row}"] = dict(
            steps=each[0]["steps"], images=statistics.mean(rates)
        ) | _spread(each, SHAPES, True)
    return rows


def _ablated(given: Given, table: str, *flags: str) -> dict[str, list[dict[str, Any]]]:
    """What `ablate` says of the runs of each variant of a table beside this file."""
    out = given.runs / table
    place = str(HERE / f"{table}.toml")
    given.python("-m", "coca_jax", "ablate", place, f"--out={out}", *flags)
    told = json.loads((out / "results.json").read_text())["variants"]
    return {row: list(found["runs"].values()) for row, found in told.items()}


def _spread(runs: list[dict[str, Any]], names: Mapping[str, str], ranged: bool) -> Values:
    """The mean of each score over the seeds and their range; seed 0's unless `ranged`."""
    values: Values = {}
    for name, key in names.items():
        each = [shown(run["scores"], key) for run in runs]
        values[name] = statistics.mean(each) if ranged else each[0]
        if ranged:
            values |= {f"{name}_low": min(each), f"{name}_high": max(each)}
    return values
