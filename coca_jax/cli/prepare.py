"""Imports any image-text data into the training format.

Formats: imagefolder, sidecars, webdataset, csv, jsonl, json, parquet, arrow, tfds; without
--format the files tell.
--holdout keeps a share of the images apart as a split 'test'. The result is ArrayRecord shards
with a manifest, which tensorflow-datasets reads as well, or with --in_place an index, by which the
images are read where they lie. Run the same command again after a kill:
finished shards stay, and the result is the same to the byte. With --shard=i/n each of n jobs
writes a share of the shards, and the same command without --shard joins them. What cannot be used
is listed, with the reason, in DIR/SPLIT-quarantine.jsonl; read = written + quarantined + filtered
is checked.

Examples:
  coca-jax prepare --input=photos/ --out=data/mine --holdout=0.1
  coca-jax prepare --format=csv --input=list.csv --text_field=description --out=data/mine
  coca-jax prepare vocabulary --input=data/a,data/b --size=64000 --out=words.model
  coca-jax prepare inspect --config=coca_224 --step=1000
  coca-jax prepare inspect --workdir=runs/mine --step=1000

The last three train a SentencePiece vocabulary on prepared data, and print which examples a step
trains on, by a recipe or in a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from coca_jax.cli import main as cli
from coca_jax.config import Config, Recipe, typed
from coca_jax.data import (
    batch_schedule,
    filters,
    holdout,
    order,
    source_index,
    vocabulary,
)
from coca_jax.data import prepare as asked
from coca_jax.data import prepare as splits
from coca_jax.data.mixture import Mixture
from coca_jax.data.prepare import prepare, prepare_with_holdout
from coca_jax.data.sources import files, formats, manifest, registry
from coca_jax.data.sources.fields import read_class_names
from coca_jax.data.sources.items import Options
from coca_jax.data.sources.source import read_whole_texts
from coca_jax.runtime import lease, storage, text_tables, workers
from coca_jax.training import recipes
from coca_jax.training.skipped_batches import number_of

_ALONE = ("size", "sentences", "vocabulary_kind", "step", "workdir", "config")  # of other uses
_OF_VOCABULARY = (*_ALONE[:3], "input", "out", "split", "overwrite")
_READ = {"vocabulary": _OF_VOCABULARY, "inspect": _ALONE[3:]}


def _refuse_unread(use: str = "") -> None:
    """Raises ValueError for a flag that is given and that a use does not read; '': an import."""
    modules = (__name__, workers.__name__)
    own = [flag.name for one in modules for flag in flags.FLAGS.get_flags_for_module(one)]
    unread = [name for name in own if name not in _READ[use]] if use else _ALONE
    cli.refuse_given(unread, f"`{f'prepare {use}'.strip()}` does not read it")


def _options() -> Options:
    where = cli.where_of(flags.FLAGS.where)
    names: tuple[str, ...] = ()
    if flags.FLAGS.class_names:
        given = flags.FLAGS.class_names
        names = read_class_names(given, f"--class_names={given}")
    if not 0 < flags.FLAGS.sample <= 1:
        raise ValueError(f"--sample={flags.FLAGS.sample}: give a share above 0, at most 1")
    if flags.FLAGS.dedup != "perceptual" and not flags.FLAGS.exclude:
        cli.refuse_given(["distance"], "it is of --dedup=perceptual and --exclude")
    most = files.MAX_PIXELS
    if flags.FLAGS.max_pixels > most and not 0 < flags.FLAGS.max_side**2 <= most:
        raise ValueError(
            f"--max_pixels={flags.FLAGS.max_pixels}: training reads images of at most {most} "
            "pixels. Add --max_side=2048, which shrinks larger images."
        )
    if flags.FLAGS.sample == 1:
        cli.refuse_given(["seed"], "it is of --sample")
    return Options(
        text_field=flags.FLAGS.text_field,
        label_field=flags.FLAGS.label_field,
        image_field=flags.FLAGS.image_field,
        class_names=names,
        where=tuple(where),
        check=flags.FLAGS.check,
        min_side=flags.FLAGS.min_side,
        max_aspect=flags.FLAGS.max_aspect,
        max_pixels=flags.FLAGS.max_pixels,
        min_text=flags.FLAGS.min_text,
        max_text=flags.FLAGS.max_text,
        require=flags.FLAGS.require,
        max_side=flags.FLAGS.max_side,
        sample=flags.FLAGS.sample,
        seed=flags.FLAGS.seed,
        dedup=flags.FLAGS.dedup,
        distance=flags.FLAGS.distance,
        exclude=tuple(flags.FLAGS.exclude),
        allow_paths=tuple(flags.FLAGS.allow_paths),
        in_place=flags.FLAGS.in_place,
    )


def train_vocabulary(
    paths: Sequence[str],
    size: int,
    out: str,
    sentences: int,
    kind: str = "auto",
    split: str = "train",
) -> dict[str, Any]:
    """Trains a vocabulary on captions and label names of a split of prepared folders.

    Returns:
        pieces, sentences, sha256, out.

    Raises:
        FileNotFoundError, ValueError: a folder is missing or not prepared, or has no text.
    """
    texts: list[str] = []
    for number, path in enumerate(paths):
        source = filters.open_source(path, split)
        count = min(len(source), -(-sentences // len(paths)))
        picked = order.indices(np.arange(count), len(source), 0, number)
        for _, record in read_whole_texts(source, picked):
            texts.extend(record.texts or [", ".join(record.labels)])
    trained = vocabulary.train(texts, size, out, kind=kind)
    return dict(pieces=trained.size, sentences=len(texts), sha256=trained.checksum, out=out)


def inspect(config: Recipe, step: int) -> dict[str, Any]:
    """Prints the examples of one step: row, source, epoch, index, key and text.

    Images that do not decode are listed as well; training takes the next good one in their place.

    Args:
        step: as logs, metrics and checkpoints count, from 1.

    Returns:
        step, examples: a list of {row, source, epoch, index, key, text}.

    Raises:
        ValueError: the run has no such step; or what is wrong with the data.
    """
    config = typed(config)
    config.check_sources()
    return _inspect(config, Mixture(config), step)


def inspect_run(workdir: str, step: int) -> dict[str, Any]:
    """`inspect` of a run, by its own config, indexes and batches that it left out after spikes.

    Raises:
        FileNotFoundError: no run there.
        ValueError: besides, a source has other data than the run was trained on.
    """
    from coca_jax.checkpoints import (
        config_file,  # JAX takes seconds to import
        manager,  # JAX takes seconds to import
    )
    from coca_jax.training import bad_steps, setup

    config, old = manager.read_config(workdir), manager.read_run(workdir)
    before = str(old.get("workdir", workdir))
    moved = [
        dataclasses.replace(one, path=config_file.within(one.path, before, workdir))
        for one in config.data.sources
    ]
    config = config.change({"data.sources": tuple(one.to_dict() for one in moved)})
    setup.check_seen(config.data.sources, workdir)
    mixture = Mixture(config, workdir)
    config_file.check_data(mixture.data_digests, config, old, workdir)
    left_out = bad_steps.LossSpikes(workdir, config.faults, write=False).left_out
    return _inspect(config, mixture, step, left_out)


def _inspect(
    config: Config, mixture: Mixture, step: int, left_out: Sequence[tuple[int, int]] = ()
) -> dict[str, Any]:
    if step < 1:
        raise ValueError(f"--step={step}: steps count from 1")
    steps = batch_schedule.steps_of(config, mixture.num_examples)
    if steps and step > steps:  # a recipe may leave its length to flags
        raise ValueError(f"--step={step}: the run has {steps} steps")
    examples = mixture.step_examples(number_of(step - 1, tuple(left_out)))
    for example in examples:
        print("{row:6d}  {source}  epoch {epoch}  index {index}  {key}  {text!r}".format(**example))
    return dict(step=step, examples=examples)


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    names = list(registry.formats())
    flags.DEFINE_enum("format", None, names, "Format of the input; default: as its files tell.")
    flags.DEFINE_string("input", None, "File, folder, glob or URL of the input.")
    flags.DEFINE_string("out", None, "Folder to write; several splits may share it.")
    flags.DEFINE_string(
        "split", "train", "Name of the split that is written; a field 'split' tells several."
    )
    flags.DEFINE_float(
        "holdout", 0.0, "Share of the images to write as split 'test' instead.", 0, 1
    )
    flags.DEFINE_multi_string(
        "where",
        [],
        "Keep only examples whose field has one of these values: field=a,b. Repeatable.",
    )
    flags.DEFINE_string("text_field", "", "Field of the captions.")
    flags.DEFINE_string("label_field", "", "Field of the class names or numbers.")
    flags.DEFINE_string("image_field", "", "Field of the image, or of its path.")
    flags.DEFINE_string("class_names", "", "Text file with the names of numbered classes.")
    flags.DEFINE_integer("processes", 0, "Parallel processes; 0: one per core.", 0)
    workers.define_flags()
    flags.DEFINE_integer("shards", 0, "Shards to write, at most; 0: by the size of the data.", 0)
    flags.DEFINE_bool(
        "check",
        True,
        "Decode every image. --nocheck: read only headers; with --in_place read no image.",
    )
    flags.DEFINE_integer("min_side", 1, "Quarantine images with a smaller side.", 0)
    flags.DEFINE_float("max_aspect", 0.0, "Quarantine longer images; 0: keep.", 0)
    flags.DEFINE_integer(
        "max_pixels",
        files.MAX_PIXELS,
        "Quarantine images with more pixels; above 120 million with --max_side.",
        1,
    )
    flags.DEFINE_integer("min_text", 1, "Drop captions with fewer characters.", 0)
    flags.DEFINE_integer("max_text", 10_000, "Quarantine longer captions.", 0)
    flags.DEFINE_enum(
        "require",
        "any",
        ["any", "text", "label"],
        "What every example must have besides its image.",
    )
    flags.DEFINE_integer("max_side", 0, "Shrink larger images; 0: copy all bytes.", 0)
    flags.DEFINE_float("sample", 1.0, "Share of the examples to keep.")
    flags.DEFINE_integer("seed", 0, "Of the sample.")
    flags.DEFINE_enum(
        "dedup", "none", ["none", "content", "perceptual"], "Which images count as the same."
    )
    flags.DEFINE_integer("distance", 6, "Bits of 256 in which equal looks may differ.", 0, 256)
    flags.DEFINE_multi_string(
        "exclude", [], "Prepared folder or image files of evaluation data to keep out. Repeatable."
    )
    flags.DEFINE_multi_string(
        "allow_paths",
        [],
        "Folder or URL from which rows may name image files, besides the input's own. Repeatable.",
    )
    flags.DEFINE_bool(
        "in_place",
        False,
        "Write an index, by which training reads the images where they lie, not a copy.",
    )
    _define_other_uses()


def _define_other_uses() -> None:
    """The flags of `prepare vocabulary` and `prepare inspect`, and --overwrite."""
    flags.DEFINE_integer("size", 64_000, "vocabulary: number of pieces.", 1)
    flags.DEFINE_integer("sentences", 2_000_000, "vocabulary: texts to learn from.", 1)
    flags.DEFINE_enum(
        "vocabulary_kind",
        "auto",
        vocabulary.KINDS,
        "vocabulary: 'auto' is unigram, and of texts too few for it what leaves fewer tokens.",
    )
    flags.DEFINE_integer("step", 1, "inspect: which step, counted from 1 as in the logs.")
    flags.DEFINE_string("workdir", "", "inspect: a run, in place of --config.")
    recipes.define_flag("inspect: ")
    flags.DEFINE_bool("overwrite", False, "Replace a split, or a vocabulary, that is there.")


def summary(result: dict[str, Any]) -> list[str]:
    """What was written, and how to train on it."""
    if "examples" in result:  # of `inspect`, which has printed them
        return []
    if "pieces" in result:
        return [f"{result['pieces']} pieces from {result['sentences']} texts -> {result['out']}"]
    if "waiting" in result:
        return []
    out = result["out"]
    if "splits" in result:
        each = result["splits"].items()
        written = ", ".join(f"{one['written']:,} -> [{split}]" for split, one in each)
        lines = [f"{result['read']:,} examples, by the field 'split': {written}; {out}"]
    else:
        line = f"{result['written']:,} of {result['read']:,} examples -> {out}"
        if held := result.get("held_out"):
            line += f" [{result['split']}], {held['written']:,} -> [{held['split']}]"
        lines = [line]
    data = shlex.quote(out)
    return lines + text_tables.next_commands(
        f"coca-jax fit {data} --workdir=FOLDER",
        f"coca-jax train --config=NAME --data={data} --workdir=FOLDER",
    )


def main(argv: Sequence[str]) -> dict[str, Any]:
    """The command."""
    if argv[1:] == ["vocabulary"]:
        if not flags.FLAGS.input or not flags.FLAGS.out:
            raise ValueError("prepare vocabulary needs --input and --out")
        cli.check_once("input", "separate them by commas, as --input=data/a,data/b")
        _refuse_unread("vocabulary")
        given = flags.FLAGS
        if files.exists(given.out) and not given.overwrite:
            raise ValueError(f"--out={given.out} is there already; give --overwrite, or another")
        how = (given.size, given.out, given.sentences, given.vocabulary_kind, given.split)
        return train_vocabulary(given.input.split(","), *how)
    if argv[1:] == ["inspect"]:
        workdir, config = flags.FLAGS.workdir, flags.FLAGS.config
        if bool(workdir) == (config is not None):
            raise ValueError("prepare inspect needs --config=NAME or --workdir=RUN, one of them")
        _refuse_unread("inspect")
        step = flags.FLAGS.step
        return inspect_run(workdir, step) if workdir else inspect(config, step)
    if len(argv) > 1:
        raise ValueError(
            f"unexpected argument {argv[1]!r}; give --input={argv[1]}, or 'vocabulary' or 'inspect'"
        )
    for name in ("input", "out"):
        if not flags.FLAGS[name].value:
            raise ValueError(f"--{name} is missing")
    _refuse_unread()
    asked.check_folder(flags.FLAGS.out)
    cli.check_once(
        "input", "put a pattern in quotes, as --input='laion/{00000..00999}.tar', or give a folder"
    )
    return _import()


def _import() -> dict[str, Any]:
    """Writes what the flags ask for, or finds it there."""
    flags.FLAGS["input"].value = formats.from_hub(flags.FLAGS.input)
    format, input, out = flags.FLAGS.format, flags.FLAGS.input, flags.FLAGS.out
    if not format:
        format = formats.guess(input)
        cli.say(f"{input}: read as --format={format}")
    options = _options()
    keywords: dict[str, Any] = dict(
        split=flags.FLAGS.split,
        options=options,
        processes=flags.FLAGS.processes,
        shard_count=flags.FLAGS.shards,
        overwrite=flags.FLAGS.overwrite,
        engine=workers.of_flags(),
        state=functools.partial(source_index.state, format, out, options),
    )
    where, by_field = (format, input, out), _by_field(format, options)
    held = ["test"] if flags.FLAGS.holdout else []
    names = list(by_field.values) if by_field else list(dict.fromkeys([flags.FLAGS.split, *held]))
    there = manifest.read_manifest(out)["splits"]
    if flags.FLAGS.overwrite or not {*names} <= {*there}:
        cli.say(f"reading {input}")
        with _alone(input, out, names):
            result = _write(where, by_field, keywords)
    else:  # which is refused where it is of another request
        result = _write(where, by_field, keywords)
        now = source_index.state_of_input(format, input, out, options, names[0])
        before = there[names[0]].get("state", now)
        changed = now and manifest.have_changed(before, now, times=True)
        why = f"{input} has changed since" if changed else "nothing was read"
        cli.say(
            f"{out} holds {', '.join(names)} of it already, and {why}; --overwrite reads it anew"
        )
    return result


@contextlib.contextmanager
def _alone(input: str, out: str, names: Sequence[str]) -> Iterator[None]:
    """Inside, no other process writes these splits of a local folder, but for those that do a share
    of the shards. Raises Held where one does, and ValueError for a place that cannot be."""
    out = storage.plain_path(out)
    with contextlib.ExitStack() as stack:
        for name in () if flags.FLAGS.shard or files.is_remote(out) else names:
            splits.check_place(input, out, name)
            storage.check_writable(out, make=False)
            place = asked.unfinished(out, name)
            stack.enter_context(lease.alone(place, use="writes it", flag="--out", beside=True))
        yield


def _write(
    where: tuple[str, str, str], by_field: holdout.SplitField | None, keywords: dict[str, Any]
) -> dict[str, Any]:
    """Writes one split, the two of a holdout, or those that a field tells; says how many."""
    if by_field:
        return _write_results(by_field, where, keywords)
    if not flags.FLAGS.holdout:
        result = prepare(*where, **keywords)
        if "waiting" in result:
            return _printed_result(result)
        return result
    result, held = prepare_with_holdout(*where, flags.FLAGS.holdout, **keywords)
    if "waiting" in result:
        return _printed_result(result)
    return result | {"held_out": held}


def _by_field(format: str, options: Options) -> holdout.SplitField | None:
    """The splits that the field `split` tells, where neither flags nor names say others."""
    given = flags.FLAGS["split"].present or flags.FLAGS.holdout
    if given or any(name == holdout.FIELD for name, _ in options.where):
        return None
    return holdout.of_data(format, flags.FLAGS.input, options)[1]


def _write_results(
    by_field: holdout.SplitField, where: tuple[str, str, str], keywords: dict[str, Any]
) -> dict[str, Any]:
    """Writes each split that the field `split` tells; what is returned is that of the first, which
    is 'train' unless nothing is left of it, with all of them as 'splits'."""
    if line := by_field.unused(list(by_field.values)):
        cli.say(f"{where[1]}: {line}")
    results = holdout.prepare_each(by_field, where, keywords, cli.say)
    printed = next(iter(results.values())) | {"splits": results}
    if any("waiting" in result for result in results.values()):
        counts = {k: sum(result[k] for result in results.values()) for k in ("waiting", "shards")}
        return _printed_result(printed | counts)
    return printed


def _printed_result(result: dict[str, Any]) -> dict[str, Any]:
    """Says what a job of several leaves to do."""
    left, count = result["waiting"], result["shards"]
    what = (
        f"{left} of {count} shards are not there yet" if left else f"all {count} shards are there"
    )
    cli.say(f"{what}; the same command without --shard joins them")
    return result


if __name__ == "__main__":
    cli.command("prepare")
