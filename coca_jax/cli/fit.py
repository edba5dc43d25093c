"""From a folder of pictures to a trained model.

FOLDER is an imagefolder (metadata.jsonl or .csv, or one folder a class), webdataset tars, parquet,
a CSV list, or what `prepare` wrote; FOLDER:caption and FOLDER:label take these texts alone. Looks
at the data and the machine, holds some pictures out, chooses a recipe that fits both and the
minutes of training, says why, trains, scores the pictures held out, captions the first of them and
writes DIR/recipe.py, DIR/report.html and DIR/export. After a kill the same command goes on.

--dry_run ends with the recipe: a Python file to keep, change and give to train.

Examples:
  coca-jax fit photos/ --workdir=runs/mine
  coca-jax fit photos/ --workdir=runs/mine --minutes=10 --config.batch_size=64
  coca-jax fit photos/:label --workdir=runs/classes --init_from=runs/mine
  coca-jax fit photos/ --workdir=runs/mine --init_from=coca_ViT-B-32:laion2b_s13b_b90k
  coca-jax fit photos/ --workdir=runs/mine --dry_run
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Any

from absl import flags

from coca_jax.cli import main as cli
from coca_jax.training import recipes

FIELDS = ("text_field", "label_field", "image_field", "class_names")

OPERANDS = "folders of pictures"


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    recipes.define_overrides("fit chooses the recipe; to train one of your own: coca-jax train")
    flags.DEFINE_string("workdir", None, "Where the fit lives; made when missing.")
    flags.DEFINE_float("minutes", 30.0, "Of training; looking, scoring and writing come besides.")
    flags.DEFINE_bool("dry_run", False, "Choose and print the recipe, train nothing.")
    flags.DEFINE_string(
        "init_from",
        "",
        "Pretrained CoCa weights to start from: a model name with its tag "
        "(coca_ViT-B-32:laion2b_s13b_b90k), hf-hub:OWNER/NAME, a run, an export or a file.",
    )
    flags.DEFINE_multi_string(
        "allow_paths", [], "Folder or URL from which rows may name images. Repeatable."
    )
    for field in ("text", "label", "image"):
        note = f"Field of the {field}, where it has an unusual name."
        flags.DEFINE_string(f"{field}_field", "", note)
    flags.DEFINE_string("class_names", "", "Text file with the names of numbered classes.")


def summary(result: dict[str, Any]) -> list[str]:
    """Nothing more than what is printed before."""
    del result
    return []


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry."""
    args = flags.FLAGS
    if len(argv) > 2:
        several = " ".join(f"--data={shlex.quote(one)}" for one in argv[1:])
        raise ValueError(
            f"fit takes one FOLDER, and {len(argv) - 1} were given. Train on several with "
            f"coca-jax train {several} --config=RECIPE --workdir=DIR, or put them into one folder."
        )
    if len(argv) != 2 or not args.workdir:
        raise ValueError("give one FOLDER of pictures and --workdir=DIR")
    if not 0 < args.minutes < float("inf"):
        raise ValueError(f"--minutes={args.minutes:g}: give the minutes of training, above 0")
    if "://" in args.workdir:
        raise ValueError(
            f"--workdir={args.workdir}: fit works in a local folder; give one, with --dry_run "
            "perhaps, and train its recipe.py in the bucket"
        )
    recipes.check_trackers()
    cli.say(f"fitting {argv[1]} in {args.workdir}: starting JAX")
    request = request_of_flags(argv[1])

    from coca_jax.apps import fit
    from coca_jax.training import exit_codes

    with exit_codes.exit_on_known_errors():
        found = fit.fit(
            request, args.workdir, change=recipes.change, dry_run=args.dry_run, say=cli.say
        )
    if args.dry_run:
        with open(found["recipe"]) as file:
            print(file.read())
        recipe, workdir = shlex.quote(found["recipe"]), shlex.quote(args.workdir)
        cli.say(f"to train it: coca-jax train --config={recipe} --workdir={workdir}")
    return found


def request_of_flags(folder: str) -> Any:
    """What the flags ask for. Raises ValueError for a folder that is not one, or a wrong kind."""
    from coca_jax.apps.fit import Request
    from coca_jax.data import supervision
    from coca_jax.training import data_flag

    args, named = flags.FLAGS, None
    able = [name for name, kind in supervision.KINDS.items() if kind.counted]
    try:
        named = data_flag.parse(folder)
    except ValueError:
        if folder.startswith("hf://"):
            raise
        # Else the message is about --data, which takes weights besides.
    if named is None or named.kind not in ("", *able) or named.weight != 1.0:
        takes = " or ".join(f"FOLDER:{name}" for name in able)
        raise ValueError(f"{folder}: fit takes FOLDER, {takes}")
    path = named.path
    if "://" not in path and not path.startswith("tfds:"):
        path = os.path.abspath(path)
    weights = args.init_from
    return Request(
        folder=path,
        kind=named.kind,
        minutes=args.minutes,
        init_from=os.path.abspath(weights) if os.path.exists(weights) else weights,
        fields={name: args[name].value for name in FIELDS if args[name].value},
        allow_paths=tuple(
            one if "://" in one else os.path.abspath(one) for one in args.allow_paths
        ),
        overrides=tuple(f"{key}={value}" for key, value in sorted(recipes.changes().items())),
    )


if __name__ == "__main__":
    cli.command("fit")
