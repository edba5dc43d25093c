"""Imports any image-text data into the training format.

    python -m coca_jax.prepare --format=imagefolder --input=FOLDER --out=DIR [--split=train]

Formats: imagefolder, webdataset, csv, parquet, tfrecord, tfds. The result is ArrayRecord shards
with a manifest, which tensorflow-datasets reads as well. Run the same command again after a kill:
finished shards stay, and the result is the same to the byte. What cannot be used is listed, with
the reason, in DIR/SPLIT-quarantine.jsonl; read = written + quarantined + filtered is checked.

    python -m coca_jax.prepare vocabulary --input=DIR,DIR --size=64000 --out=FILE
    python -m coca_jax.prepare inspect --config=configs/X.py --step=N

train a SentencePiece vocabulary on prepared data, and print which examples a step trains on.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags
from ml_collections import config_flags

from coca_jax import cli
from coca_jax.data import files, order, pipeline, sources, vocabulary
from coca_jax.importers import dedup, metadata, shards
from coca_jax.importers.items import Options, Unit

_ROWS_PER_SHARD = 16_384


def prepare(
    format: str,
    input: str,
    out: str,
    *,
    split: str = "train",
    options: Options | None = None,
    processes: int = 0,
    shard_count: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Imports one split; see the module's text.

    Returns:
        split, read, written, quarantined (by reason), filtered (by reason), shards, classes,
        images with texts and with labels, bytes, out.

    Raises:
        FileNotFoundError: no input.
        ValueError: the format cannot be read, or nothing of the input can be used; or `out` holds
            this split, or an unfinished import of it, made with other options.
    """
    options = options or Options()
    module = shards.importer(format)
    manifest = metadata.read_manifest(out)
    request = {"format": format, "input": str(input), "options": dataclasses.asdict(options)}
    request = json.loads(json.dumps(request))
    if split in manifest["splits"] and not overwrite:
        if manifest["splits"][split]["request"] == request:
            return _summary(out, split, manifest)
        raise ValueError(
            f"--out={out} already holds a split {split!r} made with other options; give "
            "--overwrite, or another --out or --split"
        )
    work = files.join(out, f".unfinished-{split}")
    jobs = _plan(module, format, str(input), split, options, work, shard_count, request)
    declared = getattr(module, "declared_classes", None)
    classes = declared(jobs[0].units[0], options) if declared else list(options.class_names)
    processes = processes or len(os.sched_getaffinity(0))
    if options.dedup != "none" or options.exclude:
        jobs = _deduplicate(jobs, options, processes, progress)
    accounts = _run(jobs, processes, progress)
    return _finish(out, split, work, jobs, accounts, request, classes)


def _plan(
    module: Any,
    format: str,
    input: str,
    split: str,
    options: Options,
    work: str,
    shard_count: int,
    request: dict[str, Any],
) -> list[shards.Job]:
    """The shards to write; the same as before when an earlier run was cut short."""
    path = files.join(work, "plan.json")
    if files.exists(path):
        plan = json.loads(files.read(path))
        if plan["request"] != request:
            raise ValueError(f"{work} is an unfinished import with other options; remove it")
        groups = [[Unit(**unit) for unit in group] for group in plan["groups"]]
    else:
        units = module.plan(input, split, options)
        if not units:
            raise ValueError(f"--input={input}: it is empty")
        groups = _group(units, shard_count)
        plan = {"request": request}
        plan["groups"] = [[dataclasses.asdict(unit) for unit in group] for group in groups]
        vocabulary.write_bytes(path, json.dumps(plan).encode())
    return [
        shards.Job(number, tuple(group), format, options, work)
        for number, group in enumerate(groups)
    ]


def _group(units: Sequence[Unit], shard_count: int) -> list[list[Unit]]:
    """Units that follow one another, in groups of about equal size."""
    if not shard_count:
        rows = sum(unit.rows for unit in units)
        shard_count = -(-rows // _ROWS_PER_SHARD) if all(u.rows for u in units) else len(units)
    shard_count = max(1, min(shard_count, len(units)))
    edges = [len(units) * i // shard_count for i in range(shard_count + 1)]
    return [list(units[a:b]) for a, b in zip(edges, edges[1:])]


def _deduplicate(
    jobs: list[shards.Job], options: Options, processes: int, progress: bool
) -> list[shards.Job]:
    """Reads everything once for its fingerprints, and tells each job what to leave out."""
    scanned = _parallel(shards.scan, jobs, processes, progress, "fingerprints")
    found = [(job.number, *entry) for job, entries in zip(jobs, scanned) for entry in entries]
    exclude = []
    for path in options.exclude:
        for data in dedup.evaluation_images(path):
            try:
                exclude.append(dedup.fingerprint(data))
            except ValueError:
                continue  # what cannot be decoded cannot be evaluated on
    drop = dedup.decide(found, options.dedup, options.distance, exclude)
    return [
        dataclasses.replace(
            job, drop={number: why for (shard, number), why in drop.items() if shard == job.number}
        )
        for job in jobs
    ]


def _run(jobs: list[shards.Job], processes: int, progress: bool) -> list[dict[str, Any]]:
    """Writes the shards that an earlier run has not finished."""
    accounts = {job.number: shards.finished(job) for job in jobs}
    todo = [job for job in jobs if not accounts[job.number]]
    for job, account in zip(todo, _parallel(shards.write, todo, processes, progress, "prepare")):
        accounts[job.number] = account
    return [account for job in jobs if (account := accounts[job.number])]


_queue: Any = None  # in a worker: where it reports what it has read


def _start_worker(queue: Any) -> None:
    global _queue
    _queue = queue


def _work(function: Callable, job: shards.Job) -> Any:
    return function(job, _queue.put)


def _parallel(
    function: Callable, jobs: list[shards.Job], processes: int, progress: bool, what: str
) -> list[Any]:
    """function(job, report) for each job, in parallel, showing how far it is."""
    known = all(unit.rows for job in jobs for unit in job.units)
    total = sum(unit.rows for job in jobs for unit in job.units) if known else None
    with tqdm.tqdm(
        total=total, desc=what, unit=" examples", file=sys.stderr, disable=not progress
    ) as bar:
        # In-memory files exist in this process only.
        here = any("memory://" in path for j in jobs for path in (j.work, j.units[0].path))
        if min(processes, len(jobs)) <= 1 or here:
            return [function(job, bar.update) for job in jobs]
        context = multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        with concurrent.futures.ProcessPoolExecutor(
            min(processes, len(jobs)), context, _start_worker, (queue,)
        ) as pool:
            futures = [pool.submit(_work, function, job) for job in jobs]
            waiting = set(futures)
            while waiting:
                _, waiting = concurrent.futures.wait(waiting, timeout=0.2)
                while not queue.empty():
                    bar.update(queue.get())
            return [future.result() for future in futures]


def _finish(
    out: str,
    split: str,
    work: str,
    jobs: list[shards.Job],
    accounts: list[dict[str, Any]],
    request: dict[str, Any],
    classes: list[str],
) -> dict[str, Any]:
    """Gives the shards their names and writes the manifest; can itself be cut short and rerun."""
    read = sum(account["read"] for account in accounts)
    written = sum(account["count"] for account in accounts)
    listed = [entry for account in accounts for entry in account["quarantined"]]
    reasons = Counter(entry["reason"] for entry in listed)
    filtered: Counter[str] = Counter()
    for account in accounts:
        filtered.update(account["filtered"])
    if read != written + len(listed) + sum(filtered.values()):
        raise RuntimeError(f"{read} read, but {written} + {len(listed)} + {filtered} accounted for")
    if not written:
        raise ValueError(
            f"--input={request['input']}: none of {read} examples can be used: "
            f"quarantined {dict(reasons)}, filtered {dict(filtered)}"
        )
    system, plain_out = files.filesystem(out)
    plain_work = files.filesystem(work)[1]
    kept = [(job, account) for job, account in zip(jobs, accounts) if account["count"]]
    entries = []
    for number, (job, account) in enumerate(kept):
        name = f"{split}-{number:05d}-of-{len(kept):05d}.array_record"
        part = f"{plain_work}/part-{job.number:05d}.array_record"
        if system.exists(part):
            system.mv(part, f"{plain_out}/{name}")
        entries.append(
            {"file": name, **{key: account[key] for key in ("count", "bytes", "sha256")}}
        )
    lines = "".join(json.dumps(e, ensure_ascii=False, sort_keys=True) + "\n" for e in listed)
    vocabulary.write_bytes(files.join(out, f"{split}-quarantine.jsonl"), lines.encode())
    manifest = metadata.read_manifest(out)
    seen = {label for account in accounts for label in account["classes"]}
    if not classes:
        classes = sorted(seen | set(manifest["class_names"]))
    manifest["class_names"] = classes
    manifest["splits"][split] = dict(
        count=written,
        with_text=sum(account["with_text"] for account in accounts),
        with_label=sum(account["with_label"] for account in accounts),
        read=read,
        quarantined=dict(reasons),
        filtered=dict(filtered),
        shards=entries,
        request=request,
    )
    metadata.write(out, manifest)
    system.rm(plain_work, recursive=True)
    return _summary(out, split, manifest)


def _summary(out: str, split: str, manifest: dict[str, Any]) -> dict[str, Any]:
    found = manifest["splits"][split]
    return dict(
        split=split,
        read=found["read"],
        written=found["count"],
        quarantined=found["quarantined"],
        filtered=found["filtered"],
        with_text=found["with_text"],
        with_label=found["with_label"],
        shards=len(found["shards"]),
        bytes=sum(shard["bytes"] for shard in found["shards"]),
        classes=len(manifest["class_names"]),
        out=str(out),
    )


def _options() -> Options:
    where = []
    for clause in flags.FLAGS.where:
        field, equals, values = clause.partition("=")
        if not equals or not values:
            raise ValueError(f"--where={clause}: write field=value or field=value,value")
        where.append((field, tuple(values.split(","))))
    names: tuple[str, ...] = ()
    if flags.FLAGS.class_names:
        names = tuple(files.read(flags.FLAGS.class_names).decode().split("\n"))
        names = names[:-1] if names and not names[-1] else names
    if not 0 < flags.FLAGS.sample <= 1:
        raise ValueError(f"--sample={flags.FLAGS.sample}: give a share above 0, at most 1")
    return Options(
        text_field=flags.FLAGS.text_field,
        label_field=flags.FLAGS.label_field,
        image_field=flags.FLAGS.image_field,
        class_names=names,
        where=tuple(where),
        verify=flags.FLAGS.verify,
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
    )


def train_vocabulary(paths: Sequence[str], size: int, out: str, sentences: int) -> dict[str, Any]:
    """Trains a vocabulary on captions and label names of prepared folders (split 'train').

    Returns:
        pieces, sentences, sha256, out.

    Raises:
        FileNotFoundError, ValueError: a folder is missing or not prepared, or has no text.
    """
    texts: list[str] = []
    for number, path in enumerate(paths):
        source = sources.open_source(path)
        count = min(len(source), -(-sentences // len(paths)))
        picked = order.indices(np.arange(count), len(source), 0, number)
        for start in range(0, count, 1024):
            for record in source.read_texts(picked[start : start + 1024]):
                texts.extend(record.texts or [", ".join(record.labels)])
    trained = vocabulary.train(texts, size, out)
    print(f"{trained.size} pieces from {len(texts)} texts -> {out}")
    return dict(pieces=trained.size, sentences=len(texts), sha256=trained.checksum, out=out)


def inspect(config: Any, step: int) -> dict[str, Any]:
    """Prints the examples of one step: row, source, epoch, index, key and text.

    Images that do not decode are listed as well; training takes the next good one in their place.

    Returns:
        step, examples: a list of {row, source, epoch, index, key, text}.
    """
    if step < 0:
        raise ValueError(f"--step={step}: steps count from 0")
    examples = pipeline.step_examples(config, step)
    for example in examples:
        print("{row:6d}  {source}  epoch {epoch}  index {index}  {key}  {text!r}".format(**example))
    return dict(step=step, examples=examples)


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_enum("format", None, list(shards.MODULES), "Format of the input.")
    flags.DEFINE_string("input", None, "File, folder, glob or URL of the input.")
    flags.DEFINE_string("out", None, "Folder to write; several splits may share it.")
    flags.DEFINE_string("split", "train", "Name of the split that is written.")
    flags.DEFINE_multi_string(
        "where",
        [],
        "Keep only examples whose field has one of these values: field=a,b. Repeatable.",
    )
    flags.DEFINE_string("text_field", "", "Field of the captions.")
    flags.DEFINE_string("label_field", "", "Field of the class names or numbers.")
    flags.DEFINE_string("image_field", "", "Field of the image, or of its path.")
    flags.DEFINE_string("class_names", "", "Text file with the names of numbered classes.")
    flags.DEFINE_integer("processes", 0, "Parallel processes; 0: one per core.")
    flags.DEFINE_integer("shards", 0, "Shards to write, at most; 0: by the size of the data.")
    flags.DEFINE_bool("verify", True, "Decode every image, not only its header.")
    flags.DEFINE_integer("min_side", 1, "Quarantine images with a smaller side.")
    flags.DEFINE_float("max_aspect", 0.0, "Quarantine longer images; 0: keep.")
    flags.DEFINE_integer("max_pixels", 178_956_970, "Quarantine larger images.")
    flags.DEFINE_integer("min_text", 1, "Drop captions with fewer characters.")
    flags.DEFINE_integer("max_text", 10_000, "Quarantine longer captions.")
    flags.DEFINE_enum(
        "require",
        "any",
        ["any", "text", "label"],
        "What every example must have besides its image.",
    )
    flags.DEFINE_integer("max_side", 0, "Shrink larger images; 0: copy all bytes.")
    flags.DEFINE_float("sample", 1.0, "Share of the examples to keep.")
    flags.DEFINE_integer("seed", 0, "Of the sample.")
    flags.DEFINE_enum(
        "dedup", "none", ["none", "content", "perceptual"], "Which images count as the same."
    )
    flags.DEFINE_integer("distance", 6, "Bits of 256 in which equal looks may differ.")
    flags.DEFINE_multi_string(
        "exclude", [], "Prepared folder or image files of evaluation data to keep out. Repeatable."
    )
    flags.DEFINE_integer("size", 64_000, "vocabulary: number of pieces.")
    flags.DEFINE_integer("sentences", 2_000_000, "vocabulary: texts to learn from.")
    flags.DEFINE_integer("step", 0, "inspect: which step.")
    config_flags.DEFINE_config_file("config", None, "inspect: the recipe.")
    flags.DEFINE_bool("overwrite", False, "Replace a split that is already there.")


def main(argv: Sequence[str]) -> dict[str, Any]:
    """The command."""
    if argv[1:] == ["vocabulary"]:
        if not flags.FLAGS.input or not flags.FLAGS.out:
            raise ValueError("prepare vocabulary needs --input and --out")
        paths = flags.FLAGS.input.split(",")
        return train_vocabulary(paths, flags.FLAGS.size, flags.FLAGS.out, flags.FLAGS.sentences)
    if argv[1:] == ["inspect"]:
        if flags.FLAGS.config is None:
            raise ValueError("prepare inspect needs --config=configs/X.py")
        return inspect(flags.FLAGS.config, flags.FLAGS.step)
    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}; use 'vocabulary', 'inspect' or flags")
    for name in ("format", "input", "out"):
        if not flags.FLAGS[name].value:
            raise ValueError(f"--{name} is missing")
    result = prepare(
        flags.FLAGS.format,
        flags.FLAGS.input,
        flags.FLAGS.out,
        split=flags.FLAGS.split,
        options=_options(),
        processes=flags.FLAGS.processes,
        shard_count=flags.FLAGS.shards,
        overwrite=flags.FLAGS.overwrite,
    )
    print(f"{result['written']} of {result['read']} examples -> {result['out']}")
    return result


if __name__ == "__main__":
    define_flags()
    cli.run(main)
