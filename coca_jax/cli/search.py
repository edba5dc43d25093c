"""Searches pictures by text, by picture or by both; finds duplicates and clusters.

  index INPUT ...     embeds the pictures of folders, tars, parquet and lists into --out. Run it
                      again and only new files are embedded; ended anywhere, it goes on.
  query WHAT ...      the most similar pictures. Each WHAT is a text, or the path or URL of a
                      picture; several are looked for together.
  duplicates          groups of pictures that look alike, with their similarities
  clusters            groups of pictures of a kind, named by the nearest of --labels

--html=sheet.html writes the pictures that were found as one page, and opens it.

Every result is a line, and the last line gives counts; without a terminal, or with --json, all of
them are JSON.

Examples:
  coca-jax search index photos/ --checkpoint=runs/demo --out=photos.index
  coca-jax search query "a red car" --index=photos.index
  coca-jax search query "at night" car.jpg --weights=0.5,1 --index=photos.index
  coca-jax search duplicates --threshold=0.97 --index=photos.index
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from coca_jax.cli import main as cli
from coca_jax.data.sources import files, formats
from coca_jax.runtime import activity, extras, storage, workers

SHOWN = 3  # images of a cluster that a terminal shows
MAX_LABELS = 1000  # captions that may name clusters
OPERANDS = "pictures, folders and texts"
# Flags that some of the commands have alone.
_OF = (
    dict.fromkeys(("out", "engine", "workers", "shard", "allow_paths", "parquet"), ("index",))
    | dict.fromkeys(("k", "weights"), ("query",))
    | dict.fromkeys(("checkpoint", "dtype", "batch_size"), ("index", "query", "clusters"))
    | dict.fromkeys(("index",), ("query", "duplicates", "clusters"))
    | dict.fromkeys(("threshold",), ("duplicates",))
    | dict.fromkeys(("clusters", "seed", "labels"), ("clusters",))
    | dict.fromkeys(("html",), ("query", "duplicates", "clusters"))
)


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string(
        "checkpoint", "", "A run, an export or open_clip weights. Default: the index's."
    )
    flags.DEFINE_string("out", "", "index: folder to write or to add to.")
    flags.DEFINE_string("index", "", "query, duplicates, clusters: a folder of `index`.")
    flags.DEFINE_integer("batch_size", 64, "index, query: pictures at a time.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default: the checkpoint's.")
    flags.DEFINE_multi_string(
        "allow_paths", [], "index: folder or URL from which lists may name pictures. Repeatable."
    )
    flags.DEFINE_bool("parquet", False, "index: also write the names for clip-retrieval's tools.")
    workers.define_flags()
    flags.DEFINE_integer("k", 10, "query: pictures to find.", lower_bound=1)
    flags.DEFINE_list("weights", [], "query: weight of each WHAT; default: all 1.")
    flags.DEFINE_float("threshold", 0.95, "duplicates: least cosine similarity of a pair.")
    flags.DEFINE_integer("clusters", 20, "clusters: how many.", 1)
    flags.DEFINE_string(
        "labels",
        "",
        "clusters: labels that name them, a,b,c or a file with one per line. "
        "Default: the captions of the index.",
    )
    flags.DEFINE_string(
        "html", "", "query, duplicates, clusters: write a contact sheet here and open it."
    )
    flags.DEFINE_integer("seed", 0, "clusters: of where they begin.", 0, 2**32 - 1)


def main(argv: Sequence[str]) -> dict[str, Any]:
    """The command."""
    work: dict[str, Callable[[list[str]], dict[str, Any]]] = dict(
        index=_index, query=_query, duplicates=_duplicates, clusters=_clusters
    )
    if len(argv) < 2 or argv[1] not in work:
        given = f"{argv[1]!r} is none of them" if len(argv) > 1 else "none is given"
        raise ValueError(f"search index|query|duplicates|clusters ...: {given}")
    for name, commands in _OF.items():
        flag = flags.FLAGS[name]
        if flag.value != flag.default and argv[1] not in commands:
            raise ValueError(f"search {argv[1]}: --{name} is a flag of {', '.join(commands)}")
    start = time.time()
    result = work[argv[1]](list(argv[2:]))
    return result | dict(seconds=round(time.time() - start, 2))


def _need(**given: Any) -> None:
    for name, value in given.items():
        if not value:
            raise ValueError(f"--{name} is missing; `coca-jax search --help` shows examples")


def _loader(checkpoint: str) -> Callable[[], Any]:
    import coca_jax

    how = dict(dtype=flags.FLAGS.dtype, batch_size=flags.FLAGS.batch_size)
    return functools.partial(coca_jax.load, checkpoint, num_frames=0, **how)


def _load(checkpoint: str) -> Any:
    with cli.waiting(f"loading {checkpoint}"):
        return _loader(checkpoint)()


def _index(inputs: list[str]) -> dict[str, Any]:
    from coca_jax.apps.search.parts import Parts

    args, engine = flags.FLAGS, workers.of_flags()
    _need(out=args.out)
    if not inputs:
        raise ValueError("search index: give what to index, a folder of pictures or tars")
    if args.parquet:
        extras.check("pyarrow", "parquet", "--parquet")
    parts, inputs = Parts(args.out), [storage.plain_path(formats.from_hub(one)) for one in inputs]
    parts.check()
    given = args.checkpoint
    checkpoint: Any = given or parts.checkpoint
    args.checkpoint = checkpoint
    _need(checkpoint=checkpoint)
    for input in inputs:
        if not input.lower().endswith(formats.MEDIA):
            cli.say(f"{input}: {_describe_input(input, parts)}")
    storage.check_writable(args.out, make=False)
    apart = engine.name != "local" or engine.share
    cli.say(f"loading {checkpoint}")
    load = _loader(checkpoint)
    with _where_it_was(given, parts.about, f"--out={args.out}"):
        model = None if apart else load()
    if apart:
        from coca_jax.apps.search import index

        with activity.announce(f"looking for pictures in {', '.join(inputs)}"):
            groups = index.groups(inputs, parts, allow_paths=args.allow_paths)
        waiting = index.stage(load, groups, parts, engine, **_how())
        if engine.share:  # of which others do theirs at the same time
            return _apart(args.out, len(groups), waiting)
    from coca_jax.runtime import lease

    with lease.alone(args.out, use="indexes into it", flag="--out"):
        return _join(model, inputs)


def _describe_input(input: str, parts: Any) -> str:
    """How an input is read. Raises what `formats.guess` raises."""
    from coca_jax.apps.search import index

    try:
        return f"read as {formats.guess(input)}"
    except ValueError:
        if not index.emptied(input, parts):
            raise
        return "no picture is left in it"


def _how() -> dict[str, Any]:
    args = flags.FLAGS
    how = dict(checkpoint=args.checkpoint, batch_size=args.batch_size)
    return how | dict(progress=True)


def _join(model: Any, inputs: list[str]) -> dict[str, Any]:
    """Adds to the index, which nobody else writes to meanwhile; model: None where all is staged."""
    from coca_jax.apps.search import index
    from coca_jax.apps.search.parts import Parts

    out, allow = flags.FLAGS.out, flags.FLAGS.allow_paths
    parts = Parts(out)  # as it is now: another process may have written to it
    with activity.announce(f"looking for pictures in {', '.join(inputs)}"):
        groups = index.groups(inputs, parts, allow_paths=allow)
        gone = index.gone(inputs, parts, allow)
    done = index.add(model, groups, parts, gone=gone, say=cli.say, **_how())
    other = done["new"] + done["changed"] + done["gone"]
    if other and done["pictures"] >= index.nearest.EXACT_BELOW:
        cli.say(
            f"--out={out} is in a bucket and gets no graph: each picture is compared with a query; "
            "for a graph copy it to a local folder and run the same there"
            if storage.is_remote(out)
            else f"building the graph of {done['pictures']} pictures"
        )
    result = dict(out=out) | {key: done[key] for key in done if key != "already_there"}
    return result | dict(search=index.finish(parts, parquet=flags.FLAGS.parquet, progress=True))


def _apart(out: str, shards: int, waiting: int) -> dict[str, Any]:
    """What a job of several did."""
    left = f"{waiting} of {shards} shards are not there yet" if waiting else "all shards are there"
    cli.say(f"{left}; the same command without --shard joins them")
    return dict(out=out, shards=shards, waiting=waiting)


def _open() -> Any:
    _need(index=flags.FLAGS.index)
    with cli.waiting(f"reading {flags.FLAGS.index}"):
        from coca_jax.apps.search.index import Index

        return Index(flags.FLAGS.index)


def _query(wanted: list[str]) -> dict[str, Any]:
    if not wanted:
        raise ValueError("search query: give what to look for, a text in quotes or a picture")
    if not all(one.strip() for one in wanted):
        raise ValueError("search query: one of the texts is empty; give words, or leave it out")
    try:
        weights = [float(text) for text in flags.FLAGS.weights]
    except ValueError:
        raise ValueError(f"--weights={','.join(flags.FLAGS.weights)}: give numbers") from None
    if weights and len(weights) != len(wanted):
        raise ValueError(f"{len(weights)} weights for {len(wanted)} texts and pictures")
    wanted = [storage.plain_path(one) for one in wanted]
    images = [one for one in wanted if _is_picture(one)]
    index = _open()
    model = _model_of(index)
    index.check(model)
    texts = [one for one in wanted if one not in images]
    pairs = sorted(zip(wanted, weights), key=lambda pair: pair[0] in images)  # texts first
    ordered = [weight for _, weight in pairs]
    found = index.search(index.query(model, texts, images, ordered), flags.FLAGS.k)
    for one in found:
        caption = f"  {one['caption']}" if one["caption"] else ""
        cli.show_one(one, f"{one['rank']:3d}  {one['score']:.4f}  {one['image']}{caption}")
    shown = [(index.place(one["row"]), f"{one['score']:.4f}") for one in found]
    _sheet(index, " + ".join(wanted), [(f"{len(found)} pictures", shown)])
    return dict(texts=texts, images=images, found=len(found), pictures=len(index.names))


def _model_of(index: Any) -> Any:
    """The model of --checkpoint, else the one that the index names."""
    given = flags.FLAGS.checkpoint
    with _where_it_was(given, index.about, f"--index={flags.FLAGS.index}"):
        return _load(given or index.checkpoint)


@contextlib.contextmanager
def _where_it_was(given: str, about: dict[str, Any], index: str) -> Iterator[None]:
    """Says, of a model that is not there, that it is the index that names it, unless --checkpoint
    was `given`. about: contents of index.json; index: its flag."""
    try:
        yield
    except FileNotFoundError as error:
        if given:
            raise
        made = about.get("made_in", "")
        where = f", made in {made}," if made else ""
        raise FileNotFoundError(
            f"{str(error).partition(';')[0]}: {index}{where} names that model; --checkpoint= gives "
            "the place where it is now"
        ) from None


def _is_picture(text: str) -> bool:
    if os.path.isfile(text) or storage.is_remote(text):
        return True
    if text.lower().endswith(formats.MEDIA) and " " not in text:
        raise FileNotFoundError(f"{text}: no such picture")
    if os.path.isdir(text):
        cli.say(f"{text}: taken as a text; to look for the pictures of that folder name them")
    return False


def _sheet(index: Any, title: str, groups: list[tuple[str, list[tuple[int, str]]]]) -> None:
    """Writes and opens the contact sheet of --html."""
    if path := flags.FLAGS.html:
        from coca_jax.apps.search import sheet

        with cli.waiting(f"writing {path}"):
            sheet.write(path, title, groups, index)
        sheet.show(path)


def _duplicates(rest: list[str]) -> dict[str, Any]:
    index = _open()
    from coca_jax.apps.search import groups as alike

    found = alike.duplicates(index, flags.FLAGS.threshold, progress=True)
    shown = []
    for number, rows in enumerate(found, 1):
        names, scores = [index.names[row] for row in rows], alike.similarities(index, rows)
        texts = [f"{score:.4f}" for score in scores]
        line = "  ".join(f"{text} {name}" for text, name in zip(texts, names))
        cli.show_one(dict(images=names, scores=scores), line)
        shown.append((f"Group {number}: {len(rows)} pictures", list(zip(rows, texts))))
    _sheet(index, f"Duplicates above {flags.FLAGS.threshold:g}", shown)
    extra = sum(len(rows) - 1 for rows in found)
    return dict(groups=len(found), duplicates=extra, pictures=len(index.names))


def _clusters(rest: list[str]) -> dict[str, Any]:
    index = _open()
    labels = _labels(index)
    from coca_jax.apps.search import groups

    count = flags.FLAGS.clusters
    with cli.waiting(f"grouping {len(index.names)} pictures into {count} clusters"):
        found = groups.clusters(index, count, flags.FLAGS.seed)
    titles = [""] * len(found)
    if labels:
        model = _model_of(index)
        index.check(model)
        titles = groups.name_clusters(index, found, model, labels)
    else:
        cli.say("no captions in this index; --labels=FILE names the clusters")
    shown = []
    for title, one in zip(titles, found):
        names = [index.names[row] for row in one["rows"]]
        more = f"  and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
        head = f"{title or 'cluster'}: {len(names):,} images"
        cli.show_one(
            dict(label=title, size=len(names), images=names),
            f"{head}: {'  '.join(names[:SHOWN])}{more}",
        )
        shown.append((head, [(row, "") for row in one["rows"]]))
    _sheet(index, f"{len(found)} clusters", shown)
    return dict(clusters=len(found), pictures=len(index.names))


def _labels(index: Any) -> list[str]:
    """Labels that may name clusters: of --labels, else the most frequent captions."""
    given = flags.FLAGS.labels
    if not given:
        counts = collections.Counter(text for text in index.captions if text)
        return [text for text, _ in counts.most_common(MAX_LABELS)]
    is_file = os.path.isfile(given)
    text = files.read_bounded(given, 1 << 20).decode() if is_file else given.replace(",", "\n")
    labels = [line.strip() for line in text.splitlines() if line.strip()]
    if len(labels) < 2:
        raise ValueError(f"--labels={given}: {len(labels)} labels. Give two or more.")
    return labels


if __name__ == "__main__":
    cli.command("search")
