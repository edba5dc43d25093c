"""Mixes a fine-tuned model with the one that it was tuned from, and keeps apart what changed.

Between both weights, W = base + share x (tuned - base), often lies a model that keeps what the base
could do and does what it was tuned for (WiSE-FT, Wortsman et al. 2022). With --data every share of
--shares is scored, and the curve goes to blend.json and into the report of a run there; without,
one share is written as an export. --rank writes the change alone, as factors of that rank (LoRA's
adapter), and --adapter adds such a change to a base.

Examples:
  coca-jax blend --base=weights --checkpoint=runs/tuned --data=data/probe --out=runs/tuned
  coca-jax blend --base=weights --checkpoint=runs/tuned --shares=0.6 --out=mixed
  coca-jax blend --base=weights --checkpoint=runs/tuned --rank=8 --out=adapter
  coca-jax blend --base=weights --adapter=adapter --out=merged
"""

from __future__ import annotations

import contextlib
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

import coca_jax
from coca_jax.cli import evaluate
from coca_jax.cli import main as cli
from coca_jax.evaluation import evaluators
from coca_jax.evaluation.evaluators import base
from coca_jax.interop import export_format, safetensors
from coca_jax.runtime import json_files, out_folder, storage, text_tables

if TYPE_CHECKING:
    from coca_jax.inference import CoCaModel

SHARES_FLAGS_OF = (evaluate.__name__,)  # for --help
ADAPTER, CURVE = "adapter.safetensors", "blend.json"


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("base", None, "What was tuned: a run, an export or weights.")
    evaluate.define_task_flags()
    flags.DEFINE_string("out", "", "Folder for the curve, the model or the change.")
    flags.DEFINE_list("shares", ["0", "0.25", "0.5", "0.75", "1"], "Of the way to the tuned one.")
    flags.DEFINE_integer("rank", 0, "Writes the change alone, as factors of this rank.")
    flags.DEFINE_string("adapter", "", "A folder that --rank wrote, in place of --checkpoint.")


def summary(result: dict[str, Any]) -> list[str]:
    """What was written; the curve is printed before."""
    return text_tables.fields(result)


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry."""
    args = flags.FLAGS
    if (
        len(argv) > 1
        or not args.base
        or not args.out
        or bool(args.checkpoint) == bool(args.adapter)
    ):
        raise ValueError("give --base=DIR, --checkpoint=DIR or --adapter=DIR, and --out=DIR")
    shares = shares_of(args.shares)
    if args.rank < 0 or (args.rank and args.adapter):
        raise ValueError(f"--rank={args.rank}: a whole number from 1, and not with --adapter")
    if args.rank and (args.data or args["shares"].present):
        raise ValueError(
            f"--rank={args.rank} writes the whole change and scores nothing; leave out --data and "
            "--shares, or --rank"
        )
    if not args.data:
        cli.refuse_given(evaluate.of_scores(), "without --data nothing is scored")
    tasks = evaluate.tasks_of_flags() if args.data else []
    if not tasks and not args.rank and len(shares) > 1:
        shares = [1.0] if not args["shares"].present else shares
        if len(shares) > 1:
            raise ValueError(f"--shares={','.join(args.shares)}: one to write, or give --data")
    if tasks or args.rank:
        out_folder.check(args.out, in_run=bool(tasks))  # the curve belongs to the tuned run
    else:
        out_folder.check_model(args.out)
    cli.say(f"loading {args.base}")
    how: dict[str, Any] = dict(batch_size=args.batch_size) if args.batch_size else {}
    base = coca_jax.load(args.base, dtype="float32", num_frames=args.num_frames, **how)
    first = to_host(base.params)
    if args.adapter:
        factors = read_adapter(args.adapter, base.checksum())
        from coca_jax.models import lora

        def at(share: float) -> dict:
            return lora.apply(first, factors, share)
    else:
        cli.say(f"loading {args.checkpoint}")
        other = coca_jax.load(args.checkpoint, dtype="float32")
        check_alike(base, other)
        tuned = to_host(other.params)
        if args.rank:
            return write_adapter(tuned, first, args.rank, args.out, base.checksum())

        def at(share: float) -> dict:
            return mix(first, tuned, share)

    if tasks:
        return curve(base, at, shares, tasks, args.out)
    from coca_jax.inference import export_folder

    base.set_params(at(shares[0]))
    export_format.refuse_other(args.out, base.params)
    export_folder.write(base, args.out, dtype=base.stored_dtype)
    return dict(out=args.out, share=shares[0])


@contextlib.contextmanager
def _replacement_told(out: str, name: str, what: str) -> Iterator[None]:
    """Says afterwards where `what` was in the folder before, in the file `name`, and is another."""
    there = [name] if (storage.place(out) / name).exists() else []
    before = json_files.describe_files(out, there)
    yield
    if before != json_files.describe_files(out, there):
        cli.say(f"--out={out} held another {what}, which this one replaces")


def shares_of(texts: Sequence[str]) -> list[float]:
    """Shares as numbers. Raises ValueError for one that is none, or outside of [0, 1]."""
    found = []
    for text in texts:
        try:
            found.append(float(text))
        except ValueError:
            found.append(-1.0)
        if not 0 <= found[-1] <= 1:
            raise ValueError(f"--shares={text}: give numbers from 0 (the base) to 1 (the tuned)")
    if not found:
        raise ValueError("--shares is empty: give numbers from 0 to 1")
    return found


def to_host(params: Any) -> dict:
    """The parameters as NumPy arrays."""
    import jax

    return jax.tree.map(np.asarray, params)


def check_alike(base: CoCaModel, tuned: CoCaModel) -> None:
    """Raises ValueError naming what both models have otherwise, beside their weights: what is
    mixed would be read as the base, and be neither."""
    from coca_jax.inference import fingerprint

    if tuned.class_names and not base.class_names:
        raise ValueError(
            f"the tuned model has a task head, of {len(tuned.class_names)} classes, and --base has "
            "none to mix it with; only models with the same head, or without one, are mixed"
        )
    one, other = (
        fingerprint.rest(model.config, model.vocabulary)
        | dict(class_names=model.class_names, head=getattr(model.head_kind, "name", ""))
        for model in (base, tuned)
    )
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            said = [reprlib.repr(x[key]) if key in x else "as by default" for x in (one, other)]
            raise ValueError(
                f"{key} is {said[0]} in --base and {said[1]} in the tuned model; give the base "
                "that it was tuned from"
            )


def mix(base: Mapping[str, Any], tuned: Mapping[str, Any], share: float) -> dict[str, Any]:
    """base + share x (tuned - base). Raises ValueError for models of other parameters; positions
    of other lengths, and heads of which one has none, cannot be mixed."""
    one, other = export_format.flatten(base), export_format.flatten(tuned)
    for name in sorted(one.keys() | other.keys()):
        shapes = [np.shape(x[name]) if name in x else None for x in (one, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in --base and {shapes[1]} in the tuned model")
    flat = {k: (1 - share) * one[k] + share * other[k] for k in one}
    return export_format.unflatten(flat)


def curve(
    model: CoCaModel, at: Any, shares: Sequence[float], tasks: Sequence[dict], out: str
) -> dict[str, Any]:
    """The scores of every share, printed, and written to blend.json in `out`, with the report of a
    run there anew."""
    import tempfile

    from coca_jax.evaluation import runner as evaluation

    rows: list[dict[str, Any]] = []
    with evaluators.each_once():  # what is said of the data and the vocabulary is so at each share
        for share in shares:
            cli.say(f"scoring {share:g} of the way")
            model.set_params(at(share))
            with tempfile.TemporaryDirectory() as scratch:
                scores = evaluation.run_tasks(model, tasks, scratch)
            kept = {k: v for k, v in scores.items() if is_headline(k)}
            rows.append(dict(share=share, scores=kept))
    with _replacement_told(out, CURVE, "curve"):
        storage.write_text(storage.place(out) / CURVE, json.dumps(dict(curve=rows)) + "\n")
    names = list(rows[0]["scores"])
    print("  ".join(["share", *names]))
    for row in rows:
        print(
            "  ".join([f"{row['share']:5g}", *(f"{row['scores'][n]:{len(n)}.4f}" for n in names)])
        )
    summary = dict(out=out, curve=rows)
    place = storage.place(out)
    if (place / "report.html").exists() and (place / "metrics.jsonl").exists():  # a run's own
        from coca_jax.cli import report

        summary["report"] = str(report.write_report(out))
    return summary


def is_headline(name: str) -> bool:
    """Whether a score stands at the top of a report."""
    evaluator, _, rest = name.partition("/")
    known = base.kinds().get(evaluator)
    return known is not None and rest.rpartition("/")[2] in known.headlines


def write_adapter(tuned: dict, base: dict, rank: int, out: str, checksum: str) -> dict[str, Any]:
    """Writes what tuning changed, as factors, and says how much of the change they hold. checksum:
    of the base, which the file tells."""
    from coca_jax.models import lora

    factors = lora.extract(tuned, base, rank)
    if not factors:
        raise ValueError("both models are the same: there is no change to write")
    before = export_format.flatten(base)
    again = export_format.flatten(lora.apply(base, factors))
    whole, left = 0.0, 0.0
    for name, x in export_format.flatten(tuned).items():
        whole += float(np.square(x - np.asarray(before[name], np.float64)).sum())
        left += float(np.square(x - again[name]).sum())
    with _replacement_told(out, ADAPTER, "change"), storage.local_folder(out) as folder:
        blocks = {name: export_format.blocks(name, x) for name, x in factors.items()}
        safetensors.write(f"{folder}/{ADAPTER}", blocks, about=dict(base=checksum))
    numbers = sum(x.size for x in factors.values())
    kept = 1 - left / whole
    return dict(out=out, kernels=len(factors) // 2, numbers=numbers, rank=rank, kept=kept)


def read_adapter(place: str, checksum: str) -> dict[str, np.ndarray]:
    """The factors in a folder. Raises FileNotFoundError where there are none, ValueError for those
    of another base than the one of that checksum."""
    from coca_jax.inference import fingerprint

    file = storage.place(place) / ADAPTER
    if not file.exists():
        raise FileNotFoundError(f"--adapter={place}: no {ADAPTER}; write one with --rank")
    with storage.local_copy(file) as copy:
        base = safetensors.about(copy).get("base")  # older ones do not say it
        if base is not None and not fingerprint.same(base, checksum):
            raise ValueError(
                f"--adapter={place} is the change of another model than --base; give the one that "
                "it was written with"
            )
        return {name: np.array(x) for name, x in safetensors.read(copy).items()}


if __name__ == "__main__":
    cli.command("blend")
