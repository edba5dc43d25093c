"""Captions image files and folders.

Prints the caption of each image, then a line with counts. Without a terminal, or with --json, these
are JSON: {"image", "caption", "score"}, score being the caption's log probability in nats. With
--out the JSON lines also go to that file, and images that it already holds are not done again: a
run that was stopped goes on where it was. With another model or other settings than the file was
begun with (FILE.how.json) it does not. Images that cannot be read are named on standard error and
skipped; the exit status is then 1.

Examples:
  coca-jax caption --checkpoint=runs/demo cat.jpg dog.jpg
  coca-jax caption --checkpoint=runs/demo --out=captions.jsonl --num_beams=4 photos/
  coca-jax caption --checkpoint=weights --prompt="a drawing of" https://example.com/cat.jpg
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import posixpath
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tqdm
from absl import flags

from coca_jax.cli import main as cli
from coca_jax.data import image_files
from coca_jax.data.sources import formats
from coca_jax.inference import caption_files
from coca_jax.inference.generation import config
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.runtime import activity, growing_file, lease, storage

OPERANDS = "pictures and folders of them"
SEED = "Of sampling; an image's captions also depend on its path."


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("checkpoint", None, cli.CHECKPOINT)
    flags.DEFINE_string("out", "", "JSONL file to add to; images that it holds are skipped.")
    flags.DEFINE_string("prompt", "", "How every caption begins.")
    flags.DEFINE_integer(
        "num_frames", None, "Frames of each video; 0: images; default: as trained.", lower_bound=0
    )
    flags.DEFINE_integer("batch_size", 32, "Images at a time.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default: the checkpoint's.")
    define: dict[type, Callable[..., Any]] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
    }
    for name, default in config.defaults().items():
        note = SEED if name == "seed" else config.metadata(name)["help"]
        kind = typing.get_args(config.KINDS[name])[:1] or (config.KINDS[name],)  # of Annotated
        if isinstance(config.KINDS[name], types.UnionType):
            kind = (str,)
        define.get(kind[0], flags.DEFINE_string)(
            name, None, f"{note} Default: the model's, usually {json.dumps(default)}."
        )


def _overrides() -> dict[str, Any]:
    """The fields of GenerationConfig that flags give."""
    given = {name: flags.FLAGS[name].value for name in config.defaults()}
    return {
        name: config.parse(name, value) if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }


def summary(result: dict[str, Any]) -> list[str]:
    """How many images were captioned."""
    counts = {
        "captioned": result["captioned"],
        "captioned before": result["already_done"],
        "failed": result["failed"],
    }
    counts_text = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    return [f"{counts_text or 'nothing captioned'}, in {result['seconds']:.1f} s"]


def main(argv: Sequence[str]) -> None:
    """Command-line entry."""
    start, args = time.time(), flags.FLAGS
    if not args.checkpoint or len(argv) < 2:
        raise ValueError("give --checkpoint=DIR IMAGE_OR_FOLDER ...")
    how = _overrides()
    if os.path.isdir(args.checkpoint):  # before anything is loaded
        GenerationConfig.from_pretrained(args.checkpoint).updated(how)
    named = [storage.plain_path(one) for one in argv[1:]]
    for one in named:
        if formats.is_archive_or_list(one) and not os.path.isdir(one):
            raise ValueError(
                f"{one}: caption takes pictures and folders of them; for tars, parquet and lists "
                f"there is `coca-jax recaption --input={one}`"
            )
    paths: dict[str, str] = {}
    # Without --num_frames the model tells, once it is loaded, whether it takes videos.
    with activity.announce(f"looking for pictures in {', '.join(named)}"):
        found = image_files.find(named, video=args.num_frames != 0)
    image_files.refuse_others(found)
    for path in found:
        paths.setdefault(storage.whole_path(path), path)  # one image, however it is spelled
    owned: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if args.out:
        caption_files.check_name(args.out)
        storage.check_writable(posixpath.dirname(args.out) or ".", make=False)
        owned = lease.alone(args.out, use="writes to it", flag="--out", beside=True)
    with owned:
        counts = _caption(paths, named, how)
    result = counts | dict(seconds=round(time.time() - start, 2))
    cli.show(result, summary(result))
    if counts["failed"]:
        raise SystemExit(1)


def _caption(paths: dict[str, str], named: list[str], how: dict[str, Any]) -> dict[str, Any]:
    """Captions the images that --out does not hold; how many those are, and how many failed.

    paths: of all images, by their whole paths; named: what the command line names; how: fields of
    GenerationConfig.
    """
    args = flags.FLAGS
    how_made = dict(
        config.defaults() | how, prompt=args.prompt, num_frames=args.num_frames, dtype=args.dtype
    )
    done, size, before = _there(how_made)
    base = caption_files.base(before)
    left = [path for whole, path in paths.items() if whole not in done]
    already_done, failed = len(paths) - len(left), 0
    with contextlib.ExitStack() as stack:
        results: Iterator[dict[str, Any]] = iter(())
        if left or _is_elsewhere(before):
            model = _model(before)
            if not model.num_frames:
                left = _images(left, named, bool(already_done))
            if base != os.getcwd():  # names in the file begin there
                left = [storage.whole_path(path) for path in left]
            _warn_room(model)
        if left:
            results = caption_files.caption_files(
                model, left, batch_size=args.batch_size, prompt=args.prompt, **how
            )
            with cli.waiting("compiling, and writing the first captions"):
                results = itertools.chain([next(results)], results)
        out = None
        if args.out:
            growing = growing_file.Growing(args.out, keep=size)
            out = stack.enter_context(contextlib.closing(growing))
            if left and not size:
                caption_files.remember(args.out, args.checkpoint, model.checksum(), how_made)
        bar = stack.enter_context(
            tqdm.tqdm(total=len(left), unit="image", disable=not sys.stderr.isatty())
        )
        for result in results:
            bar.update()
            if "error" in result:
                failed += 1
                bar.write(f"skipped {result['error']}", file=sys.stderr)
                continue
            cli.show_one(result, f"{result['image']}: {result['caption']}")
            if out:  # whatever the terminal can show
                _add(out, f"{cli.json_line(result, 'utf-8')}\n".encode())
    return dict(captioned=len(left) - failed, already_done=already_done, failed=failed)


def _add(out: growing_file.Growing, line: bytes) -> None:
    """Adds a line to --out. Raises OSError where that local file takes no more: what was captioned
    behind it would be lost with the end."""
    try:
        out.write(line, patient=False)
    except OSError as error:
        raise OSError(
            f"--out={flags.FLAGS.out} cannot be written ({error}); what it holds stays: make room, "
            "and the same command goes on"
        ) from error


def _warn_room(model: Any) -> None:
    """Says where --max_new_tokens asks for more than a caption can have."""
    args = flags.FLAGS
    room = model.max_len - 1 - len(model.vocabulary.encode(args.prompt))
    if args["max_new_tokens"].present and args.max_new_tokens > room:
        behind = " behind this prompt" if args.prompt else ""
        cli.say(
            f"--max_new_tokens={args.max_new_tokens}: captions of this model end after {room} tokens"
            f"{behind}, its texts being of {model.max_len} (model.text.max_len)"
        )


def _images(paths: list[str], named: list[str], may_be_none: bool) -> list[str]:
    """Those paths that are no videos in folders, which this model does not take. Raises ValueError
    where none is left and some must be."""
    images = image_files.without_videos(paths, named)
    what = f"{len(paths) - len(images)} videos, which this model takes with --num_frames alone"
    if not images and not may_be_none:
        raise ValueError(f"no image in {', '.join(named)}, but {what}")
    if len(images) < len(paths):
        cli.say(f"left out: {what}")
    return images


def _there(header: dict[str, Any]) -> tuple[set[str], int, dict[str, Any] | None]:
    """The whole paths of the images that --out holds, its bytes, and what it was begun with, None
    where it does not say. Raises ValueError where it was begun with other settings than `how_made`."""
    out = flags.FLAGS.out
    if not out:
        return set(), 0, None
    done, size = caption_files.read_done(out)
    before = caption_files.begun_with(out) if size else None
    if before:
        caption_files.check_settings(out, before, header)
    base = caption_files.base(before)
    return {storage.whole_path(name, base) for name in done}, size, before


def _is_elsewhere(before: dict[str, Any] | None) -> bool:
    """Whether --checkpoint names another place than the one that captions were begun with."""
    if before is None:
        return False
    old = storage.whole_path(before["checkpoint"], before["made_in"])
    return old != storage.whole_path(flags.FLAGS.checkpoint)


def _model(before: dict[str, Any] | None) -> Any:
    """The model that the flags name. Raises ValueError for one without a decoder, and for another
    than the one that captions were begun with."""
    args = flags.FLAGS
    cli.say(f"loading {args.checkpoint}")
    import coca_jax
    from coca_jax.inference import model as two_towers

    model = coca_jax.load(
        args.checkpoint, dtype=args.dtype, batch_size=args.batch_size, num_frames=args.num_frames
    )
    two_towers.refuse(model, args.checkpoint)
    if before:
        caption_files.check_model(args.out, before, args.checkpoint, model.checksum())
    return model


if __name__ == "__main__":
    cli.command("caption")
