"""Serves a model: a page for the browser, and a JSON API.

The page shows captions word by word, how probable each was and where the model looked; labels that
you type; questions, if the model was trained on them; and with --index=DIR, which `coca-jax search
index` makes, a folder to search by words and pictures. /openapi.json describes the API.

It answers to this machine alone unless --host says differently; then every request needs a key,
which is read from a file (--key_file) or from the environment (COCA_JAX_SERVE_KEY).

Ctrl-C or SIGTERM: open requests are answered, then it ends with status 0. A second one ends it at
once, 130.

Examples:
  coca-jax serve --checkpoint=runs/demo
  coca-jax serve --checkpoint=runs/demo --index=photos.index --port=8100
  COCA_JAX_SERVE_KEY=... coca-jax serve --checkpoint=runs/demo --host=0.0.0.0
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from coca_jax.cli import main as cli
from coca_jax.config import shapes
from coca_jax.data.sources import files
from coca_jax.runtime import extras, text_tables

SHORTEST_KEY = 16  # letters


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("checkpoint", "", f"{cli.CHECKPOINT} Default: the index's.")
    flags.DEFINE_string(
        "index", "", "Index to search, a folder that `coca-jax search index` wrote."
    )
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; any but loopback needs a key.")
    flags.DEFINE_string("public_name", "", "Name of a proxy in front of it; needs a key.")
    flags.DEFINE_integer(
        "port", 8000, "Port to listen on (0 = any free one).", lower_bound=0, upper_bound=65535
    )
    flags.DEFINE_string("key_file", "", "File with the key that requests must bring.")
    flags.DEFINE_integer("batch_size", 16, "Largest number of requests in a batch.", lower_bound=1)
    flags.DEFINE_float(
        "wait_ms",
        5.0,
        "Milliseconds that a batch waits for more requests while they overlap.",
        0,
        1000,
    )
    flags.DEFINE_integer(
        "queue",
        1024,
        "Largest number of pictures and texts that wait or run; more get 503.",
        lower_bound=1,
    )
    flags.DEFINE_integer("max_megabytes", 32, "Largest request.", 1, 1024)
    flags.DEFINE_integer("max_pixels", 50_000_000, "Largest picture or frame.", 1, 120_000_000)
    flags.DEFINE_integer("max_images", 16, "Largest number of pictures in a request.", 1, 1024)
    flags.DEFINE_integer("grace", 10, "Seconds to finish open requests after Ctrl-C.", 0, 600)
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "Default: the dtype of the checkpoint."
    )
    flags.DEFINE_integer(
        "num_frames", None, "Frames of a clip (0 = pictures). Default: as trained.", lower_bound=0
    )


def main(argv: Sequence[str]) -> dict[str, Any]:
    """The command."""
    args = flags.FLAGS
    if len(argv) > 1:
        raise ValueError(f"{argv[1]}: serve takes flags alone; give --checkpoint=DIR")
    if not args.checkpoint and not args.index:
        raise ValueError("--checkpoint is missing; `coca-jax serve --help` shows examples")
    for module in ("fastapi", "uvicorn", "multipart", "prometheus_client"):
        extras.check(module, "serve", "serve")
    from coca_jax.apps.serve import server

    loopback = args.host in server.LOOPBACK
    key = _key(loopback)
    listening = server.listen(args.host, args.port)
    model, index = _load()
    from coca_jax.apps.serve import app

    state = app.Server(
        model,
        name=os.path.basename(args.checkpoint.rstrip("/")) or args.checkpoint,
        index=index,
        batch_size=args.batch_size,
        wait=args.wait_ms / 1000,
        depth=args.queue,
        limits=app.Limits(args.max_megabytes, args.max_pixels, args.max_images),
        folder=args.checkpoint if os.path.isdir(args.checkpoint) else "",
    )
    guard = app.build(state, key=key, loopback=loopback, public_name=args.public_name)
    start = time.time()
    address = server.url(listening)
    left = server.serve(
        guard,
        listening,
        grace=args.grace,
        ready=lambda: cli.say(f"serving at {address} (Ctrl-C ends it)"),
    )
    result = dict(requests=guard.answered, seconds=round(time.time() - start, 2))
    if not state.batcher.close(left):  # Python crashes if it ends while a thread compiles
        cli.show(result, text_tables.fields(result))
        os._exit(0)
    return result


def _key(loopback: bool) -> str:
    """The key, from where it stands; '' for none. Raises ValueError for an empty one."""
    given, public = os.environ.get("COCA_JAX_SERVE_KEY"), flags.FLAGS.public_name
    where = "COCA_JAX_SERVE_KEY"
    if path := flags.FLAGS.key_file:
        where = f"--key_file={path}"
        try:
            given = files.read_bounded(path, 4096).decode("utf-8", "replace")
        except (OSError, ValueError) as error:
            raise ValueError(f"{where} cannot be read: {error}") from None
    key = (given or "").strip()
    if given is not None and not key:  # who names a key would not serve without one
        raise ValueError(f"{where} is empty; put a key there, or leave it out to serve without one")
    if set(public) & set("/:@[] "):
        raise ValueError(f"--public_name={public}: give the name alone, such as coca.example.org")
    if not key and (public or not loopback):
        given = f"--public_name={public}" if public else f"--host={flags.FLAGS.host}"
        raise ValueError(
            f"{given} is more than this machine: that needs a key, in a file (--key_file) or in "
            "COCA_JAX_SERVE_KEY"
        )
    if key and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable()):
        raise ValueError(f"the key has {len(key)} letters; give {SHORTEST_KEY} or more of ASCII")
    return key


def _load() -> tuple[Any, Any]:
    """The model, its first programs compiled, and the index or None."""
    args, index = flags.FLAGS, None
    if args.index:
        with cli.waiting(f"reading {args.index}"):
            from coca_jax.apps.search.index import Index

            index = Index(args.index)
        args.checkpoint = args.checkpoint or index.checkpoint
    with cli.waiting(f"loading {args.checkpoint}"):
        import coca_jax

        model = coca_jax.load(
            args.checkpoint,
            dtype=args.dtype,
            num_frames=args.num_frames,
        )
        model.set_batch_size(args.batch_size * max(model.num_frames, 1))
        if index:
            index.check(model)
    import numpy as np

    size, frames = shapes.pair(model.image_size), model.num_frames
    picture = np.zeros((1, *([frames] * bool(frames)), *size, 3), np.uint8)
    if not model.writes_captions:  # weights that only embed
        cli.say("this model has no decoder: no captions, the rest of the page and the API")
        with cli.waiting("compiling what scores labels"):
            model.zero_shot(picture, ["a label", "another label"], ["{}"])
        return model, index
    with cli.waiting(f"compiling what writes captions (1 of {1 + model.explains})"):
        *_, last = model.stream_captions(picture)
    if model.explains:
        with cli.waiting("compiling what explains them (2 of 2)"):
            model.explain(picture, last[0])
    return model, index


if __name__ == "__main__":
    cli.command("serve")
