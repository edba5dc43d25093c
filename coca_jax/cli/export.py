"""Writes a run as one folder to use elsewhere, with programs that need none of this package.

The folder is an export (see export_format.py) that `coca_jax.load` reads, and holds under programs/
what `jax.export` made (StableHLO, any batch size):

    encode_image    params, uint8 [b, S, S, 3] -> embedding float32 [b, E], image tokens [b, Q, D]
    encode_text     params, tokens int32 [b, L], valid bool [b, L] -> embedding float32 [b, E]
    decode_weights  params -> weights
    decode_start    weights, image tokens -> state
    decode_step     weights, state, token int32 [b], step int32 -> log probabilities [b, V], state

params is the flat dict of params.safetensors. A caption is decode_step from the begin symbol at
step 0 on, each time with the token that was chosen, until that is the end symbol
(tokenizer.begin_id and tokenizer.end_id in config.json) or L = model.text.max_len steps are made:
from step L on log probabilities are NaN. Ids that no text has, where the softmax layer has more
rows than the vocabulary ids, have -inf. Of a model of clips (preprocess.num_frames there) images
are uint8 [b, T, S, S, 3]. No program computes a task head.

--format=onnx writes onnx/encode_image.onnx and so on, with the weights inside, for batches of
--batch_size rows. They compute in float32, whatever the model does. Inputs are in_0, in_1, ...,
outputs out_0, ..., in the order above. decode_start gives what the decoder reads of the image and
then the state; decode_step takes both, the token and its place, and gives log probabilities and the
state. onnxruntime runs each beside the model.

With --base, the model that the checkpoint was tuned from, the weights are base + share x (tuned -
base) (WiSE-FT).

Examples:
  coca-jax export --checkpoint=runs/demo --out=exported
  coca-jax export --checkpoint=runs/tuned --base=weights --share=0.6 --out=mixed
  coca-jax export --checkpoint=runs/demo --out=exported --platforms=cpu,tpu,cuda
  coca-jax export --checkpoint=runs/demo --out=exported --format=onnx --batch_size=8 --int8
  coca-jax export --checkpoint=runs/demo --out=for_hub --format=hub --push=me/demo
"""

from __future__ import annotations

import os
import posixpath
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

import coca_jax
from coca_jax.cli import main as cli
from coca_jax.interop import export_format, hub
from coca_jax.runtime import json_files, out_folder, storage, text_tables

if TYPE_CHECKING:
    from coca_jax.inference import CoCaModel


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("checkpoint", None, cli.CHECKPOINT)
    flags.DEFINE_string("out", None, "Folder to write.")
    flags.DEFINE_enum(
        "format",
        "folder",
        ["folder", "hub", "onnx"],
        "folder: weights and programs; hub: weights, tokenizer and card as the hub has them; onnx: "
        "weights, and programs for onnxruntime.",
    )
    flags.DEFINE_integer(
        "batch_size", 1, "Rows that the programs of --format=onnx take at a time.", 1
    )
    flags.DEFINE_bool("int8", False, "With --format=onnx: also programs with weights of 8 bits.")
    flags.DEFINE_string("push", "", "org/name on the hub to upload to; with --format=hub.")
    flags.DEFINE_bool("private", False, "Makes a repository that --push creates private.")
    flags.DEFINE_string("base", "", "What the checkpoint was tuned from, to interpolate with.")
    flags.DEFINE_float(
        "share",
        None,
        "With --base: how far from it (0) to the tuned weights (1); default: 0.5.",
        0.0,
        1.0,
    )
    known = ", ".join(export_format.PLATFORMS)
    flags.DEFINE_list("platforms", ["cpu"], f"What the programs run on: {known}.")


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry."""
    args = flags.FLAGS
    if len(argv) > 1 or not args.checkpoint or not args.out:
        raise ValueError(
            "give --checkpoint=DIR --out=DIR2 [--platforms=cpu,tpu,cuda], or --format=hub "
            "[--push=org/name]"
        )
    export_format.check_platforms(args.platforms)
    if args.format != "onnx" and (args.int8 or args.batch_size != 1):
        raise ValueError("--batch_size and --int8 belong to --format=onnx")
    if args.format != "folder" and args.platforms != ["cpu"]:
        raise ValueError(f"--platforms={','.join(args.platforms)}: only with --format=folder")
    if args.push and args.format != "hub":
        raise ValueError(f"--push={args.push}: only with --format=hub")
    if args.private and not args.push:
        raise ValueError("--private: only with --push=org/name")
    if args.share is not None and not args.base:
        raise ValueError(f"--share={args.share:g}: only with --base=DIR")
    if args.format == "onnx":
        _onnx().packages()
    out_folder.check_model(args.out)
    cli.say(f"loading {args.checkpoint}")
    model = coca_jax.load(args.checkpoint, narrow=False)  # its weights are written as they are
    from coca_jax.inference import export_folder, interpolation

    if args.base:
        cli.say(f"loading {args.base}")
        base = coca_jax.load(args.base, narrow=False)
        interpolation.interpolate(base, model, 0.5 if args.share is None else args.share)
    export_folder.check(model)
    export_format.refuse_other(args.out, model.params)
    if args.format == "hub":
        return _to_hub(model)
    if not hasattr(model, "captions"):
        raise ValueError(
            f"--checkpoint={args.checkpoint}: a model without a decoder has no program for "
            "captions; give --format=hub"
        )
    if model.head_kind:
        cli.say(
            "the programs leave out the task head, whose weights are written too: "
            f"coca_jax.load({args.out!r}) has its classify"
        )
    if model.config.model.image.onnx:
        return _with_onnx_encoder(model)
    if args.format == "onnx":
        return _to_onnx(model)
    from coca_jax.inference import export_programs

    with cli.waiting("compiling the programs and comparing them with the model"):
        files, differences = export_programs.export(model, args.out, args.platforms)
    if not differences:
        cli.say(
            f"the programs were not compared with the model: {', '.join(args.platforms)} does not "
            "run here"
        )
    return _sizes(files) | dict(differences=differences)


def summary(result: dict[str, Any]) -> list[str]:
    """Where the model is, and how to use it. The files are printed before."""
    lines = [f"wrote {result['out']} ({result['bytes'] / 2**20:,.1f} MiB)"]
    if "url" in result:
        lines.append(f"uploaded to {result['url']}")
    if flags.FLAGS.format == "folder":
        out = shlex.quote(result["out"])
        lines += text_tables.next_commands(f"coca-jax caption --checkpoint={out} IMAGE_OR_FOLDER")
    return lines


def _scores(model: CoCaModel) -> dict[str, Any]:
    """What eval.json beside the weights says of them: a run's may be of an earlier step."""
    from coca_jax.evaluation.evaluators import results

    place = storage.place(flags.FLAGS.checkpoint)
    found, steps = (
        json_files.read_sealed(place / name) if (place / name).exists() else {}
        for name in ("eval.json", results.STEPS)
    )
    earlier = {k: v for k, v in steps.items() if model.step is not None and v != model.step}
    for task, step in sorted(earlier.items()):
        cli.say(
            f"{task} was scored after step {step}, and the weights are of step {model.step}: its "
            "scores are left out of the card; evaluate anew for them"
        )
    return {key: value for key, value in found.items() if key.rpartition("/")[0] not in earlier}


def _to_hub(model: CoCaModel) -> dict[str, Any]:
    from coca_jax.inference import export_folder

    args = flags.FLAGS
    files = export_folder.write_hub(
        model,
        args.out,
        args.push or f"org/{posixpath.basename(args.out.rstrip('/'))}",
        _scores(model),
    )
    summary = _sizes(files)
    if args.push:
        cli.say(f"uploading to {args.push}")
        with storage.local_copy(args.out) as folder:
            summary["url"] = hub.push(folder, args.push, private=args.private)
    return summary


def _with_onnx_encoder(model: CoCaModel) -> dict[str, Any]:
    """A folder with the encoder's file and no programs: those of JAX cannot contain it."""
    from coca_jax.inference import export_folder

    args = flags.FLAGS
    if args.format == "onnx":
        raise ValueError(
            f"--checkpoint={args.checkpoint}: its image encoder is an ONNX file already, and the "
            "programs are of the entire model. Leave out --format=onnx."
        )
    export_folder.write(model, args.out)
    cli.say("no programs were written: the image encoder is an ONNX file, which coca_jax.load runs")
    names = export_format.files(args.out)
    return _sizes({name: os.path.getsize(os.path.join(args.out, name)) for name in names})


def _onnx() -> Any:
    from coca_jax.inference import export_onnx

    return export_onnx


def _to_onnx(model: CoCaModel) -> dict[str, Any]:
    args = flags.FLAGS
    with cli.waiting("converting the programs and running them beside the model"):
        found = _onnx().export(model, args.out, batch=args.batch_size, int8=args.int8)
    return _sizes(found.pop("files")) | found


def _sizes(files: dict[str, int]) -> dict[str, Any]:
    """Prints the files; the summary of a command."""
    for name, size in files.items():
        print(f"{name:40s} {size:>14,} bytes")
    return dict(out=flags.FLAGS.out, bytes=sum(files.values()))


if __name__ == "__main__":
    cli.command("export")
