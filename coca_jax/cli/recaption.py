"""Captions, scores and embeds the images of a data set; writes a data set of them.

Reads folders, tars ('data/{000..999}.tar', what img2dataset wrote), parquet, lists and prepared
data; writes tars, parquet or ArrayRecord. Each image gets captions of each --checkpoint, --prompt
and --how, with their log probabilities, contrastive scores and flags; the first checkpoint scores
the original texts too. A caption replaces the original text only if it scores higher by --margin,
and never where captions collapse or scores hardly match the original texts (--text).
Run the same command again after a kill: it resumes, and the output is the same to the byte. With
--captioner, a chat API writes the captions in place of the checkpoint.
Images that cannot be read are listed in OUT/quarantine.jsonl.

Examples:
  coca-jax recaption --checkpoint=runs/a --input='tars/{000..099}.tar' --out=better
  coca-jax recaption --checkpoint=runs/a,runs/b --input=photos/ --out=p --to=parquet \\
      --how=beams,num_return_sequences=2 --how=nucleus,top_p=0.9,num_return_sequences=3 --embeddings
  coca-jax recaption --checkpoint=runs/a --input=tars/ --out=half --text=all --quantile=0.5
  coca-jax recaption --captioner=http://localhost:8000/v1 --checkpoint=ViT-B-32:openai \\
      --prompt='Describe the image in one sentence.' --input=photos/ --out=described
  coca-jax recaption ... --shard=$SLURM_ARRAY_TASK_ID/16
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from coca_jax.apps.recaption import request as requests
from coca_jax.apps.recaption.request import Request
from coca_jax.cli import main as cli
from coca_jax.data.sources import files, formats, registry
from coca_jax.data.sources.items import Options
from coca_jax.runtime import activity, lease, storage, workers


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_list("checkpoint", [], cli.CHECKPOINT + " Several, by commas: each captions.")
    flags.DEFINE_string(
        "captioner",
        "",
        "URL of an OpenAI-compatible chat API (vLLM, SGLang, Ollama) that captions; --checkpoint "
        "then only scores. The key is taken from OPENAI_API_KEY.",
    )
    flags.DEFINE_string("captioner_model", "", "Its model; default: the first that it lists.")
    flags.DEFINE_integer("concurrency", 16, "Requests of --captioner at a time.", lower_bound=1)
    flags.DEFINE_float("rate", 0.0, "Requests a second at most; 0: any number.", lower_bound=0)
    flags.DEFINE_string("input", "", "File, folder, glob, {000..999} or URL of the input.")
    flags.DEFINE_string("out", "", "Folder to write.")
    names = list(registry.formats())
    flags.DEFINE_enum("format", None, names, "Format of the input; default: as its files tell.")
    flags.DEFINE_string("split", "", "Split to read, where the input tells several.")
    flags.DEFINE_enum("to", "tar", requests.FORMATS, "Format of the output.")
    flags.DEFINE_multi_string(
        "how", ["greedy"], "greedy, beams or nucleus, with settings as in `caption`. Repeatable."
    )
    flags.DEFINE_multi_string("prompt", [""], "How captions begin. Repeatable.")
    flags.DEFINE_enum(
        "text", "better", requests.TEXTS, "Which texts an image keeps, by score; all: any."
    )
    flags.DEFINE_float(
        "margin",
        Request.margin,
        "With --text=better, how much higher a caption must score than the text it replaces.",
        lower_bound=0,
    )
    flags.DEFINE_float("min_score", None, "Leave out texts of a lower cosine similarity.")
    flags.DEFINE_float("quantile", 0.0, "Leave out this share of what --text chooses, by score.")
    flags.DEFINE_bool("embeddings", False, "Write embeddings of images and texts, float16.")
    flags.DEFINE_integer("batch_size", 16, "Images encoded at a time.", lower_bound=1)
    flags.DEFINE_integer("rows", 0, "Images captioned at a time; 0: 4 x batch_size.", lower_bound=0)
    flags.DEFINE_integer("part", 512, "Images between two savings.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default: the checkpoint's.")
    workers.define_flags()
    flags.DEFINE_string("text_field", "", "Field of the original texts.")
    flags.DEFINE_string("image_field", "", "Field of the image, or of its path.")
    flags.DEFINE_multi_string(
        "allow_paths", [], "Folder or URL from which rows may name images. Repeatable."
    )


def _request() -> Request:
    args = flags.FLAGS
    for name in ("checkpoint", "input", "out"):
        if not args[name].value:
            raise ValueError(f"--{name} is missing; `coca-jax recaption --help` shows examples")
    cli.check_once(
        "input", "put a pattern in quotes, as --input='tars/{000..099}.tar', or give a folder"
    )
    args["input"].value = formats.from_hub(args.input)
    format = args.format
    if not format:
        format = formats.guess(args.input)
        cli.say(f"{args.input}: read as --format={format}")
    size = args.batch_size
    return Request(
        input=args.input,
        format=format,
        out=args.out,
        to=args.to,
        checkpoints=tuple(args.checkpoint),
        captioner=args.captioner.rstrip("/"),
        captioner_model=args.captioner_model,
        concurrency=args.concurrency,
        rate=args.rate,
        ways=tuple(args.how),
        prompts=tuple(args.prompt),
        text=args.text,
        margin=args.margin,
        min_score=args.min_score,
        quantile=args.quantile,
        embeddings=args.embeddings,
        batch_size=size,
        rows=args.rows or 4 * size,
        part=-(-args.part // size) * size,
        dtype=args.dtype or "",
        options=Options(
            text_field=args.text_field,
            image_field=args.image_field,
            check=False,
            allow_paths=tuple(args.allow_paths),
        ),
        split=args.split,
    )


def _leases_of_others(work: str, own: str) -> list[str]:
    """The leases, by their names in the folder of a work, of who may do the same shards: not those
    of jobs that do as many shares. own: the job's, such as 'shard-0-of-4'; '': it does them all."""
    mine = f"{own[own.index('-of-') :]}.{lease.FILE}" if own else lease.FILE
    names = [name for name in files.listing(work) if name.endswith(lease.FILE)]
    return [name for name in names if not (name.endswith(mine) if own else name == mine)]


def main(argv: Sequence[str]) -> dict[str, Any]:
    """The command."""
    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}; give --input={argv[1]}")
    start, request = time.time(), _request()
    cli.say(f"reading {request.input}")
    from coca_jax.apps.recaption import job

    engine = workers.of_flags()  # a wrong --shard is told before anything is written
    storage.check_writable(request.out, make=False)
    work, hint = files.join(request.out, "recaption"), dict(use="captions into it", flag="--out")
    own = f"shard-{engine.share.replace('/', '-of-')}" if engine.share else ""
    with lease.alone(files.join(work, own) if own else work, beside=bool(own), **hint):
        lease.refuse_held(work, _leases_of_others(work, own), **hint)
        request = job.as_begun(request)
        with activity.announce(f"looking through {request.input}"):
            jobs = job.plan(request)
        result = job.finished(request) or job.run(request, jobs, engine, say=cli.say, progress=True)
    seconds = round(time.time() - start, 2)
    if "waiting" in result:
        cli.say(f"{result['waiting']} of {len(jobs)} shards are not there yet")
        return dict(out=request.out, shards=len(jobs), **result, seconds=seconds)
    if result["collapse"]["warning"]:
        cli.say(f"warning: {result['collapse']['warning']}")
    if result.get("kept_by_alarm"):
        cli.say(
            f"warning: {result['kept_by_alarm']} of {result['with_original']} images keep their "
            "original texts, as the model's captions or scores in their shards raise the alarm. "
            "Use a model trained on images like these, or --text=synthetic."
        )
    if result.get("with_original") == 0 and (field := request.options.text_field):
        cli.say(f"warning: {request.input}: --text_field={field}: no image has a text in it")
    result = {key: value for key, value in result.items() if key != "request"}
    return dict(out=request.out, **result | dict(shards=len(result["shards"])), seconds=seconds)


if __name__ == "__main__":
    cli.command("recaption")
