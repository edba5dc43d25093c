"""Trains a recipe in a workdir: `coca-jax train --config=NAME --workdir=DIR`.

A run goes through processes, mesh, data, model, checkpoint, steps and evaluation in this order (see
training/trainer.py). Running the same command again resumes where the last whole checkpoint stands,
bit for bit. DIR then holds config.json, metrics.jsonl, checkpoints/, eval.json, report.html and
the vocabulary.

Examples:
  coca-jax train --config=demo --workdir=runs/demo
  coca-jax train --config=coca_224 --data=data/mine --workdir=runs/mine --config.batch_size=32
  coca-jax train --config=finetune_open_clip:weights --data=data/mine --workdir=runs/tuned
  coca-jax train --config=locked_captioner --encoder=dinov2-small --data=data/mine --workdir=runs/mine
  coca-jax train --config=my/recipe.py --workdir=runs/mine

Every value of a recipe can be set, nested keys with dots, tuples in quotes as Python has them:
  --config.steps=10000 --config.optimizer.learning_rate=1e-4 --config.mesh.fsdp=8
  --config.data.flip=true --config.image_sizes="((0.5, 128),)" --config.data.augment=crop
docs/config.md says what each key means; an unknown key is refused with the nearest name.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from coca_jax.cli import data_flags
from coca_jax.cli import main as cli
from coca_jax.config import Recipe
from coca_jax.data.sources import files, formats
from coca_jax.runtime import out_folder, storage, text_tables
from coca_jax.training import recipes


def train(config: Recipe, workdir: str) -> dict[str, Any]:
    """Trains by `config` in `workdir`, as the command does; see `training.trainer.Trainer`."""
    from coca_jax.training import trainer  # JAX and the rest take seconds to import

    return trainer.train(recipes.typed(config, workdir), workdir)


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("workdir", None, "Where the run lives; made when missing.")
    data_flags.define()
    recipes.define_flag()
    flags.DEFINE_string(
        "encoder",
        "",
        "Frozen image encoder: FILE.onnx[:OUTPUT], weights that `convert` reads, a run or an "
        "export. Its tokens are computed once and stored in WORKDIR/features.",
    )
    flags.DEFINE_bool("recipes", False, "List the recipes for --config, and train nothing.")
    flags.DEFINE_string("coordinator", "", "host:port of process 0, for several.")
    flags.DEFINE_integer("num_processes", 0, "Processes of this run.", 0)
    flags.DEFINE_integer("process_id", -1, "This process's number, from 0.", -1)


def refuse_data(workdir: str) -> None:
    """Raises ValueError where a new run would go into a folder of data: what `prepare` wrote, or
    pictures."""
    if storage.is_remote(workdir) or not files.exists(workdir):
        return
    names = files.listing(workdir)
    if "config.json" in names:
        return
    pictures = [name for name in names if name.lower().endswith(formats.MEDIA)]
    what = f"pictures ({pictures[0]})" if pictures else "prepared data"
    if pictures or files.is_prepared(names):
        raise ValueError(
            f"--workdir={workdir} holds {what}; give a folder of the run's own, and "
            f"--data={workdir} to train on them"
        )


def summary(result: dict[str, Any]) -> list[str]:
    """The scores, where the results are, and what may be done next."""
    from coca_jax.evaluation import report_terminal

    run = shlex.quote(result["workdir"])
    page = f"   report: {result['report']}" if "report" in result else ""
    skipped = f", {result['skipped_steps']:,} skipped" if result["skipped_steps"] else ""
    return [
        *report_terminal.score_table(result),
        f"trained {result['steps']:,} steps{skipped} in {result['workdir']}{page}",
        *text_tables.next_commands(
            f"coca-jax caption --checkpoint={run} IMAGE_OR_FOLDER",
            f"coca-jax evaluate --checkpoint={run} --data=DATA",
            f"coca-jax export --checkpoint={run} --out=FOLDER",
        ),
    ]


def main(argv: Sequence[str]) -> dict[str, Any] | None:
    """Command-line entry."""
    if flags.FLAGS.recipes:
        print("\n".join(recipes.listing()))
        return None
    if len(argv) > 1:
        flag = "config" if flags.FLAGS.config is None else "data"
        raise ValueError(f"unexpected argument {argv[1]!r}; give --{flag}={argv[1]}")
    if flags.FLAGS.config is None:
        raise ValueError(
            "give --config=NAME and --workdir=DIR; `coca-jax train --recipes` lists the recipes"
        )
    workdir = flags.FLAGS.workdir or ""
    if flags.FLAGS.encoder and not workdir:
        raise ValueError("--encoder needs a folder for its tokens. Give --workdir.")
    if not flags.FLAGS.encoder:
        recipes.check_weights(flags.FLAGS.config)
    recipes.check_trackers()
    if flags.FLAGS.data and "data.sources" in recipes.changes():
        raise ValueError("--config.data.sources and --data both say what trains; give one of them")
    if workdir:
        storage.check_slashes(workdir)
        refuse_data(workdir)
    if storage.is_remote(workdir):
        storage.check_writable(workdir)  # before JAX starts and data are prepared
    if flags.FLAGS.process_id <= 0:
        cli.say(f"training in {workdir}: starting JAX" if workdir else "starting JAX")
    import jax

    from coca_jax.data import prepare
    from coca_jax.runtime import multihost, signals
    from coca_jax.training import data_flag, exit_codes, multihost_checks, preflight, setup

    multihost.start(flags.FLAGS.coordinator, flags.FLAGS.num_processes, flags.FLAGS.process_id)
    signals.current().joined(jax.process_count())
    with signals.failing_alone(jax.process_count()):
        config = flags.FLAGS.config
        if flags.FLAGS.encoder:
            from coca_jax.training import encoder_flag

            given = flags.FLAGS.encoder, workdir, recipes.changes()
            config = encoder_flag.use(config, *given)
        config = recipes.typed(config)
        first = jax.process_index() == 0
        if not (workdir and files.exists(files.join(workdir, "config.json"))):
            preflight.check(
                config,
                workdir,
                has_data=bool(flags.FLAGS.data),
                recipe=recipes.split(sys.argv)[0] or "",
                command=("coca-jax", "train", *sys.argv[1:]),
                say=setup.say,
            )
        with out_folder.gone_if_refused(workdir):
            multihost_checks.on_command(config.to_dict(), workdir, data_flags.given())
            setup.check_start(config, workdir)
            for text in flags.FLAGS.data:
                out_folder.check_apart(workdir, data_flag.parse(text).path)
            fields = data_flags.fields()
            with prepare.within("--workdir", workdir):
                config = data_flag.of_command(
                    config,
                    flags.FLAGS.data,
                    workdir,
                    check=setup.check_devices,
                    fields=fields,
                    keep_tasks="eval.tasks" in recipes.changes(),
                    main_process=first,
                )
        with exit_codes.exit_on_known_errors():
            summary = train(config, workdir)
        if jax.process_count() > 1:
            # Before the result is told: where a peer fails in its last instants, a launcher starts
            # all again, and the result would be told twice.
            jax.distributed.shutdown()
    return summary if first else None


if __name__ == "__main__":
    cli.command("train")
