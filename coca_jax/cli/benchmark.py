"""Times a train step, image encoding, captions, the input pipeline or the losses.

Medians and spread over --repeats after one warm-up; random weights and inputs at the config's
sizes. `losses` needs no config. A time alone means little: compare two lines of the same session,
or give --peer: `train`, `caption` and `encode` then also run open_clip, call by call in turn with
ours, and `input` its webdataset pipeline over the same records, both in one thread on one core.

Examples:
  coca-jax benchmark train --config=demo
  coca-jax benchmark encode --config=coca_base --batch_size=8 --repeats=3
  coca-jax benchmark caption --config=finetune_open_clip --num_beams=6 --peer
  coca-jax benchmark train --config=finetune_open_clip --config.batch_size=16 --texts=FILE --peer
  coca-jax benchmark input --config=coca_224 --seconds=30
  coca-jax benchmark losses
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags

from coca_jax.cli import main as cli
from coca_jax.config import typed
from coca_jax.training import recipes

KINDS = ("train", "encode", "caption", "input", "losses")
READ_BY = {  # by flag: the benchmarks that it says something to
    "config": ("train", "encode", "caption", "input", "input --peer"),
    "repeats": ("train", "encode", "caption", "input --peer", "losses"),
    "batch_size": ("encode", "caption"),
    "tokens": ("caption",),
    "num_beams": ("caption",),
    "seconds": ("input", "input --peer"),
    "memory_every": ("input",),
    "peer": ("train", "encode", "caption", "input --peer"),
    "texts": ("train",),
}


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    recipes.define_flag()
    flags.DEFINE_integer("repeats", 5, "Timed repetitions.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 0, "Images at a time in encode and caption; 0: 16.", 0)
    flags.DEFINE_integer(
        "tokens", 0, "Tokens a caption, without an end symbol; 0: 60, or the model's most.", 0
    )
    flags.DEFINE_integer("num_beams", 1, "Beams in caption.", lower_bound=1)
    flags.DEFINE_float("seconds", 10.0, "How long `input` reads.", 0.01)
    flags.DEFINE_float(
        "memory_every", 0.0, "Seconds between `input`'s looks at its memory; 0: none.", 0
    )
    flags.DEFINE_boolean("peer", False, "Run open_clip beside ours, in turn.")
    flags.DEFINE_string("texts", "", "Captions of `train`: a file with one a line; '': drawn.")


def _check_flags(kind: str) -> None:
    """Raises ValueError for a flag that is given to a benchmark which does not read it."""
    args = flags.FLAGS
    what = "input --peer" if kind == "input" and args.peer else kind
    for name, of in READ_BY.items():
        if args[name].value == args[name].default or what in of:
            continue
        wanted = " and ".join(f"`{one}`" for one in of)
        instead = "; `train` and `input` read --config.batch_size" if name == "batch_size" else ""
        raise ValueError(f"--{name} is of {wanted}; leave it out of `{what}`{instead}")


def measure(kind: str) -> dict[str, Any]:
    """The numbers of one kind of benchmark but `losses`, by the command's flags."""
    from coca_jax.apps import benchmark

    args = flags.FLAGS
    config, batch = typed(args.config), args.batch_size or 16
    if kind == "input":
        return benchmark.read_input(
            config, args.seconds, args.memory_every, args.repeats, args.peer
        )
    if kind == "train":
        return benchmark.train(config, args.repeats, args.peer, args.texts)
    if kind == "encode":
        return benchmark.encode(config, batch, args.repeats, args.peer)
    return benchmark.caption(config, batch, args.tokens, args.num_beams, args.repeats, args.peer)


def summary(result: dict[str, Any]) -> list[str]:
    """Nothing more than what is printed before."""
    del result
    return []


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry."""
    if len(argv) != 2 or argv[1] not in KINDS:
        raise ValueError(f"give one of {', '.join(KINDS)}, and --config=NAME")
    kind = argv[1]
    if kind != "losses" and flags.FLAGS.config is None:
        raise ValueError(f"benchmark {kind} needs --config=NAME")
    _check_flags(kind)
    cli.say(f"benchmark {kind}: starting JAX")
    import jax

    if kind == "losses":
        from coca_jax.apps import benchmark

        return benchmark.run(flags.FLAGS.repeats)
    result = measure(kind)
    for name, value in result.items():
        many = value if isinstance(value, list) else [value]
        print(f"{name:28s}", *(f"{v:12.4f}" for v in many))
    device = jax.devices()[0]
    devices = 1 if kind in READ_BY["batch_size"] else jax.device_count()  # these split no batch
    return {"benchmark": kind, "device": device.device_kind, "devices": devices} | result


if __name__ == "__main__":
    cli.command("benchmark")
