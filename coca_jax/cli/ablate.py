"""Trains variants of a recipe with several seeds each, and sets what came out side by side.

TABLE is a TOML file: a recipe, the seeds, what all variants have otherwise, and the variants.

  config = "demo"
  seeds = [0, 1, 2]
  [overrides]
  steps = 2600
  [variants.both]
  [variants.contrastive_only]
  loss.captioning_weight = 0.0

The first variant is what the others are compared with; a variant may name its own `config`, and
`metrics` lists the names of eval.json that are shown (by default each evaluator's headlines).
--config.key=value and --data go over all variants. After each run DIR/results.json, DIR/results.md
and DIR/report.html are written anew; the runs are DIR/VARIANT/seedN. After a kill the same command
goes on: runs that are done stay, one that was interrupted goes on at its checkpoint.

With --minutes each variant has the steps that it makes in so many minutes, by a few that are timed
first, in turn and once more in the reverse order. These, and the minutes in the results, are of
steps and waiting for data: start, compilation, saves and evaluations are left out. On a CPU they
are minutes of processor time over all cores.

Examples:
  coca-jax ablate examples/ablations.toml --out=runs/ablations
  coca-jax ablate table.toml --out=runs/table --minutes=10 --config.batch_size=64
  coca-jax ablate table.toml --out=runs/mine --data=data/mine
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags

from coca_jax.apps.ablating import table
from coca_jax.cli import data_flags
from coca_jax.cli import main as cli
from coca_jax.runtime import out_folder
from coca_jax.training import recipes


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("out", None, "A local folder for the runs and the results; made when new.")
    flags.DEFINE_float("minutes", 0.0, "Of each run, in place of its steps.")
    data_flags.define()
    recipes.define_overrides("the table names the recipe: ablate TABLE.toml --out=DIR")


def summary(result: dict[str, Any]) -> list[str]:
    """Nothing more than what is printed before."""
    del result
    return []


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry."""
    args = flags.FLAGS
    if len(argv) != 2 or not args.out:
        raise ValueError("give one TABLE.toml and --out=DIR; --help shows a table")
    if not 0 <= args.minutes < float("inf"):
        raise ValueError(f"--minutes={args.minutes:g}: give the minutes of each run, above 0")
    if "://" in args.out:
        raise ValueError(f"--out={args.out}: the runs go to a local folder; give one")
    recipes.check_trackers()
    cli.say(f"ablating {argv[1]} in {args.out}")
    found = table.read(argv[1], recipes.changes())
    out_folder.check(args.out)  # the page of all runs would take the place of that run's own
    cli.say("starting JAX")

    from coca_jax.apps.ablating import running
    from coca_jax.runtime import signals
    from coca_jax.training import exit_codes

    with exit_codes.exit_on_known_errors():
        found = running.with_data(found, args.data, args.out, data_flags.fields())
        result = running.ablate(found, args.out, args.minutes, cli.say)
    with open(f"{args.out}/results.md") as file:
        print(file.read())
    if result["failed"]:
        names = ", ".join(result["failed"])
        signals.leave(f"error: these runs failed ({args.out}/results.json says why): {names}", 1)
    return result


if __name__ == "__main__":
    cli.command("ablate")
