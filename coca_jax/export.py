"""Writes a run as one folder to use elsewhere, with programs that need none of this package.

The folder is an export (see export_format.py) that `coca_jax.load` reads, and holds under programs/
what `jax.export` made (StableHLO, any batch size):

    encode_image    params, uint8 [b, S, S, 3] -> embedding float32 [b, E], image tokens [b, Q, D]
    encode_text     params, tokens int32 [b, L], valid bool [b, L] -> embedding float32 [b, E]
    decode_weights  params -> weights
    decode_start    weights, image tokens -> state
    decode_step     weights, state, token int32 [b], step int32 -> log probabilities [b, V], state

params is the flat dict of params.safetensors. A caption is decode_step from the begin symbol at
step 0 on, each time with the token that was chosen.

Examples:
  coca-jax export --checkpoint=runs/demo --out=exported
  coca-jax export --checkpoint=runs/demo --out=exported --platforms=cpu,tpu,cuda
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags

import coca_jax
from coca_jax import cli, export_format, storage


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("checkpoint", None, "A run, an export or open_clip weights.")
    flags.DEFINE_string("out", None, "Folder to write.")
    known = ", ".join(export_format.PLATFORMS)
    flags.DEFINE_list("platforms", ["cpu"], f"What the programs run on: {known}.")


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry."""
    args = flags.FLAGS
    if len(argv) > 1 or not args.checkpoint or not args.out:
        raise ValueError("give --checkpoint=DIR --out=DIR2 [--platforms=cpu,tpu,cuda]")
    export_format.check_platforms(args.platforms)
    if storage.is_remote(args.out):
        storage.check_writable(args.out)
    cli.say(f"loading {args.checkpoint}")
    model = coca_jax.load(args.checkpoint)
    import jax

    from coca_jax.inference import export_programs

    cli.say("compiling the programs")
    files = export_programs.export(model, args.out, args.platforms)
    for name, size in files.items():
        print(f"{name:40s} {size:>14,} bytes")
    summary: dict[str, Any] = dict(out=args.out, bytes=sum(files.values()))
    if jax.default_backend() in args.platforms:
        cli.say("running the written programs beside the model")
        summary["differences"] = export_programs.check(model, args.out)
    return summary


if __name__ == "__main__":
    cli.command("export")
