"""Captions image files and folders.

python -m coca_jax.caption --checkpoint=DIR [--out=captions.jsonl] IMAGE_OR_FOLDER ...

Prints {"image", "caption", "score"} for each image, score being the caption's log probability in
nats, then one line that sums up. With --out the lines also go to that file, and images that it
already holds are not done again: a run that was stopped goes on where it was. Images that cannot
be read are named on standard error and skipped; the exit status is then 1.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags

from coca_jax import cli, inference
from coca_jax.data import images, videos
from coca_jax.decoding import Settings

NOTES = dict(
    max_tokens="New tokens at most.",
    min_tokens="New tokens before the caption may end.",
    num_captions="Captions per image; needs beams or a temperature.",
    num_beams="Beams of beam search; 1: none.",
    temperature="0 takes the most probable token, more samples.",
    top_k="Sample among this many tokens; 0: all.",
    top_p="Sample among the fewest tokens with this probability.",
    length_penalty="Beams rank by log probability / tokens^this.",
    early_stop="Stop beams when none ranks above the finished captions as it stands.",
    repetition_penalty="Above 1: discourages tokens already there.",
    no_repeat_ngram="N-grams of this size appear at most once; 0: no rule.",
    seed="Of sampling; an image's captions also depend on its path.",
)


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("checkpoint", None, "A run, an export or open_clip weights.")
    flags.DEFINE_string("out", "", "JSONL file to add to; images that it holds are skipped.")
    flags.DEFINE_string("prompt", "", "How every caption begins.")
    flags.DEFINE_integer(
        "num_frames", None, "Frames of each video; 0: images; default: as trained."
    )
    flags.DEFINE_integer("batch_size", 32, "Images at a time.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default: the checkpoint's.")
    define: dict[type, Callable[..., Any]] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
    }
    for field in dataclasses.fields(Settings):
        define[type(field.default)](field.name, field.default, NOTES[field.name])


def find_images(paths: Sequence[str], video: bool = False) -> list[str]:
    """Image files: those named, and those in folders and below, sorted, by their extensions.

    video: video files as well.

    Raises FileNotFoundError for a path that does not exist, ValueError when there is no image.
    """
    extensions = set(images.extensions())
    if video:
        extensions |= {f".{suffix}" for suffix in videos.SUFFIXES}
    found: dict[str, None] = {}
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} does not exist; give images or folders of them")
        if not os.path.isdir(path):
            found[path] = None
            continue
        for folder, subfolders, names in os.walk(path):
            subfolders.sort()
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in extensions:
                    found[os.path.join(folder, name)] = None
    if not found:
        raise ValueError(f"no image in {', '.join(paths) or 'no path'}; give images or folders")
    return list(found)


def read_done(path: str) -> set[str]:
    """Images that a JSONL file already holds. A last line cut short by a stop is removed.

    Raises ValueError for any other line that is not one of ours.
    """
    if not os.path.exists(path):
        return set()
    done = set()
    with open(path, "rb+") as file:
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                done.add(json.loads(line)["image"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"--out={path}: line {number} is not a caption; give another file"
                ) from None
            whole += len(line)
        file.truncate(whole)
    return done


def read_batches(
    model: inference.CoCaModel, paths: Sequence[str], size: int
) -> Iterator[list[tuple[str, np.ndarray | ValueError | OSError]]]:
    """Yields lists of (path, uint8 [S, S, 3], of videos [T, S, S, 3], or why it cannot be read),
    two batches read ahead."""

    def read(path: str) -> np.ndarray | ValueError | OSError:
        try:
            return model.preprocess(path)
        except (ValueError, OSError) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead: collections.deque = collections.deque()
        for start in range(0, len(paths) + 2 * size, size):
            batch = paths[start : start + size]
            ahead.append([(path, pool.submit(read, path)) for path in batch])
            if len(ahead) > 2:
                items = ahead.popleft()
                if items:
                    yield [(path, item.result()) for path, item in items]


def caption_files(
    model: inference.CoCaModel,
    paths: Sequence[str],
    *,
    batch_size: int = 32,
    prompt: str = "",
    **how: Any,
) -> Iterator[dict[str, Any]]:
    """Yields {"image", "caption", "score"} or {"image", "error"} for each path, in order.

    With several captions per image also "captions": all of them, as {"caption", "score"}. An
    image's random numbers come from its path: what else is captioned does not change its captions.
    """
    for batch in read_batches(model, paths, batch_size):
        good = [(path, pixels) for path, pixels in batch if isinstance(pixels, np.ndarray)]
        captions: list[list[inference.Caption]] = []
        if good:
            seeds = [zlib.crc32(os.fsencode(path)) for path, _ in good]
            pixels = np.stack([pixels for _, pixels in good])
            captions = model.captions(pixels, prompt, seeds=seeds, **how)
        by_path = dict(zip((path for path, _ in good), captions))
        for path, found in batch:
            if path not in by_path:
                yield dict(image=path, error=" ".join(str(found).split()))
                continue
            texts = [dict(caption=c.text, score=round(c.log_prob, 4)) for c in by_path[path]]
            yield dict(image=path, **texts[0]) | (dict(captions=texts) if len(texts) > 1 else {})


def main(argv: Sequence[str]) -> None:
    """Command-line entry."""
    start, args = time.time(), flags.FLAGS
    if not args.checkpoint or len(argv) < 2:
        raise ValueError("give --checkpoint=DIR IMAGE_OR_FOLDER ...")
    how = {field.name: args[field.name].value for field in dataclasses.fields(Settings)}
    Settings(**how)  # bad settings are told before anything is loaded
    paths = find_images(argv[1:], video=bool(args.num_frames))
    done = read_done(args.out) if args.out else set()
    left = [path for path in paths if path not in done]
    failed = 0
    with contextlib.ExitStack() as stack:
        results: Iterator[dict[str, Any]] = iter(())
        if left:
            model = inference.load(
                args.checkpoint,
                dtype=args.dtype,
                batch_size=args.batch_size,
                num_frames=args.num_frames,
            )
            results = caption_files(
                model, left, batch_size=args.batch_size, prompt=args.prompt, **how
            )
        out = stack.enter_context(open(args.out, "a", encoding="utf-8")) if args.out else None
        bar = stack.enter_context(
            tqdm.tqdm(total=len(left), unit="image", disable=not sys.stderr.isatty())
        )
        for result in results:
            bar.update()
            if "error" in result:
                failed += 1
                bar.write(f"skipped {result['image']}: {result['error']}", file=sys.stderr)
                continue
            line = json.dumps(result, ensure_ascii=False)
            print(line, flush=True)
            if out:
                out.write(line + "\n")
                out.flush()
    seconds = time.time() - start
    summary = dict(
        captioned=len(left) - failed,
        already_done=len(paths) - len(left),
        failed=failed,
        seconds=round(seconds, 2),
    )
    print(json.dumps(summary), flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    cli.command("caption")
