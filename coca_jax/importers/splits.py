"""Writes one split of a data set as ArrayRecord shards with a manifest, whatever it comes from.

Shards are written in parallel and appear whole or not at all; after a kill the same call goes on,
and the result is the same to the byte.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from coca_jax.console import activity
from coca_jax.data import files, unreachable
from coca_jax.engines import Engine
from coca_jax.files import local_files, storage
from coca_jax.importers import asked, dedup, in_place, metadata, nothing_left, remarks, shards
from coca_jax.importers.items import Options, Unit, named_classes, printable
from coca_jax.importers.work import Hands, written

_ROWS_PER_SHARD = 16_384
_HARDLY = 1e-3  # a chance
State = Callable[[list[Unit]], str]


class EmptySide(ValueError):
    """A holdout that leaves none of `read` images for `split`; `why` says what that comes from
    where it is hardly chance, else ''."""

    def __init__(self, request: dict[str, Any], read: int, split: str, filtered: Mapping[str, int]):
        share, held = request["options"]["holdout"], request["options"]["held_out"]
        by_hash = filtered == {"not_held_out" if held else "held_out": read}
        self.read, self.split, self.why = read, split, ""
        if by_hash and (1 - share if held else share) ** read < _HARDLY:
            side, fix = ("left", "larger") if held else ("took", "smaller")
            self.why = f", as they are equal or what an earlier holdout {side} (try a {fix} share)"
        super().__init__(
            f"--input={request['input']}: a holdout of {share:.3g} leaves none of {read} images "
            f"for the split {split!r}{self.why}; give another share"
        )


def splits_of(format: str, input: str) -> list[str]:
    """The splits that an input tells by the names of its files or folders; [] when it tells none.

    Raises ValueError for an unknown format or data that it cannot open.
    """
    module = shards.importer(format)
    if hasattr(module, "splits"):
        return module.splits(input)
    return files.splits_told(input, module.PATTERNS)


def tell_of_no_split(module: Any, input: str, there: Mapping[str, Any]) -> None:
    """Says which files of an input no split has: once, with the first of the splits."""
    if there or hasattr(module, "splits"):  # the latter have no files that belong to none
        return
    with unreachable.required():
        line = remarks.of_no_split(input, module.PATTERNS)
    if line:
        print(line, file=sys.stderr)


def prepare_with_holdout(
    format: str, input: str, out: str, share: float, *, held_split: str = "test", **keywords: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Imports one split as two: about a `share` of its images apart, chosen by their bytes.

    Images of equal bytes go to the same side, on every machine and in every order.

    Args:
        share: above 0, below 1.
        held_split: the split of those that are kept apart.
        keywords: of `prepare`.

    Returns:
        What `prepare` returns, of the others and of those kept apart.

    Raises:
        FileNotFoundError, ValueError: as `prepare`; pairs of images.
        EmptySide: no image falls to one of the sides.
    """
    if not 0 < share < 1:
        raise ValueError(f"--holdout={share}: give a share of the images, above 0 and below 1")
    out, split = local_files.plain(str(out)), keywords.pop("split", "train")
    if split == held_split:
        raise ValueError(f"--split={split} is what --holdout writes; give another --split")
    options = dataclasses.replace(keywords.pop("options", None) or Options(), holdout=share)
    keywords.setdefault("read_split", split)
    request = asked.request(format, str(input), options)
    # Asked before the one is written that others must go with.
    if keywords.get("overwrite") or not asked.is_there(out, split, request):
        asked.refuse_pairs(format, str(input), keywords["read_split"], options)
    apart = dataclasses.replace(options, held_out=True)
    beside, work = (split, options), asked.unfinished(out, split)
    known = files.exists(work)
    try:
        keywords_here = keywords | dict(split=held_split, options=apart, beside=beside)
        held = prepare(format, input, out, **keywords_here)
    except ValueError:  # another share is another import
        if known or not files.exists(work):
            raise
        why = nothing_left.why(work, input)
        system, plain_work = files.filesystem(work)
        system.rm(plain_work, recursive=True)
        if why:  # and not the share
            raise ValueError(why) from None
        raise
    return prepare(format, input, out, split=split, options=options, **keywords), held


def prepare(
    format: str,
    input: str,
    out: str,
    *,
    split: str = "train",
    read_split: str = "",
    options: Options | None = None,
    processes: int = 0,
    shard_count: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    engine: Engine | None = None,
    beside: tuple[str, Options] | None = None,
    state: State = lambda units: "",
) -> dict[str, Any]:
    """Imports one split; see the module's text.

    Args:
        split: the name that it gets.
        read_split: the one that is read, where the input tells several; '': `split`.
        engine: who does the shards; None: `processes` of this machine, 0: one per core.
        beside: another split of the same examples, and its options: its shards are written in the
            same pass, for a call for that split to take.
        state: tells of units whether their files have changed; kept in the manifest where it is.

    Returns:
        split, read, written, quarantined (by reason), filtered (by reason), shards, classes,
        images with texts and with labels, bytes, out. Of an engine with a share: split, out,
        shards, and waiting, the number of those that are not there; a call without a share then
        joins them.

    Raises:
        FileNotFoundError: no input.
        ValueError: the format cannot be read, or no item can be used (NothingLeft); or `out` holds
            this split, or an unfinished import of it, of other options or of files changed since.
    """
    module, options = shards.importer(format), options or Options()
    out = local_files.plain(str(out))
    check_place(str(input), out, split)
    if engine and engine.share and overwrite:  # a job that starts late would begin once more
        raise ValueError("--overwrite and --shard exclude each other; give another --out")
    manifest = metadata.read_manifest(out)
    request = asked.request(format, str(input), options)
    if not overwrite and asked.is_there(out, split, request):
        return _summary(out, split, manifest)
    asked.refuse_held_out(out, request, {split, beside[0] if beside else split})
    dedup.check_excluded(options.exclude)
    work = asked.unfinished(out, split)
    tell_of_no_split(module, str(input), manifest["splits"])
    begun = (work, shard_count, request, state)
    jobs = plan(module, format, str(input), read_split or split, options, *begun, replace=overwrite)
    classes = declared_classes(module, jobs[0].units[0], options)
    if beside and (overwrite or beside[0] not in manifest["splits"]):
        jobs = _with_twins(jobs, str(input), asked.unfinished(out, beside[0]), beside[1])
    found = written(jobs, options, Hands(engine or Engine(), processes, progress))
    if engine and engine.share:
        waiting = sum(account is None for account in found)
        return dict(split=split, out=str(out), shards=len(jobs), waiting=waiting)
    return _finish(out, split, work, jobs, [one for one in found if one], request, classes)


def declared_classes(module: Any, unit: Unit, options: Options) -> list[str]:
    """The class names that data or options give, in order; [] where the labels tell them."""
    of_data = getattr(module, "declared_classes", None)
    found = of_data(unit, options) if of_data else options.class_names
    return named_classes(tuple(found))[0]


def check_place(input: str, out: str, split: str) -> None:
    """Raises ValueError for a folder that cannot be written to, or a split that names no file."""
    if not split or "/" in split or split.startswith("."):
        raise ValueError(f"--split={split}: files begin with its name; give one without '/'")
    if files.filesystem(files.real(input)) == files.filesystem(files.real(out)):
        raise ValueError(f"--out={out} is --input; give a folder of its own")
    if not out.isascii() and printable(out) != out:
        raise ValueError(f"--out={printable(out)}: the name of the folder is not UTF-8")


def _with_twins(
    jobs: list[shards.Job], input: str, work: str, options: Options
) -> list[shards.Job]:
    """The jobs, each with that of its units for another split, in `work`, where it is not done and
    what is left out does not depend on other shards."""
    if options.dedup != "none" or options.exclude:
        return jobs
    path = files.join(work, "plan.json")
    groups = [[dataclasses.asdict(unit) for unit in job.units] for job in jobs]
    groups = json.loads(json.dumps(groups))  # as they are read again, without tuples
    request = asked.request(jobs[0].format, input, options)
    if not files.exists(path):
        plan = json.loads(files.read(files.join(jobs[0].work, "plan.json"))) | {"request": request}
        storage.write_bytes(path, json.dumps(plan).encode())
    plan = json.loads(files.read(path))
    if asked.whole(plan["request"]) != request or plan["groups"] != groups:
        return jobs  # the call for that split says what is wrong
    twins = [dataclasses.replace(job, options=options, work=work) for job in jobs]
    return [
        job if done else dataclasses.replace(job, twin=twin)
        for job, twin, done in zip(jobs, twins, shards.of_each(shards.finished, twins))
    ]


def plan(
    module: Any,
    format: str,
    input: str,
    split: str,
    options: Options,
    work: str,
    shard_count: int,
    request: dict[str, Any],
    state: State = lambda units: "",
    *,
    anew: bool = False,
    replace: bool = False,
) -> list[shards.Job]:
    """The shards to write; the same as before when an earlier run was cut short, unless `anew`.
    replace: one of other options or of files that have changed is removed, not refused."""
    path = files.join(work, "plan.json")
    groups: list[list[Unit]] | None = None
    if not anew and files.exists(path):
        try:
            groups = asked.begun(input, work, request, state)
        except ValueError:
            if not replace:
                raise
            system, plain_work = files.filesystem(work)
            system.rm(plain_work, recursive=True)
    if groups is None:
        with activity.saying(f"looking through {input}"):
            with unreachable.required():
                units = module.plan(input, split, options)
            if not units:
                raise ValueError(f"{input}: no rows in it, as --format={format} reads it")
            in_place.check(format, units, options)
            groups = _group(units, shard_count)
            kept: dict[str, Any] = {"request": request, "state": state(units)}
        kept["groups"] = [[dataclasses.asdict(unit) for unit in group] for group in groups]
        try:
            storage.write_bytes(path, json.dumps(kept).encode())
        except OSError as error:
            raise OSError(
                f"--out: {path} cannot be written ({error}); give another folder"
            ) from None
    root = in_place.root_of(input) if options.in_place else ""
    return [
        shards.Job(number, tuple(group), format, options, work, root)
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
    said = remarks.of_encoding((unit.path for job in jobs for unit in job.units), listed)
    if not written:
        _refuse_empty(work, split, request, read, listed, filtered, said)
    entries = _named(out, split, work, jobs, accounts)
    lines = "".join(json.dumps(e, ensure_ascii=False, sort_keys=True) + "\n" for e in listed)
    storage.write_bytes(files.join(out, f"{split}-quarantine.jsonl"), lines.encode())
    seen = {label for account in accounts for label in account["classes"]}
    if request["options"]["class_names"] and seen and not seen & set(classes):
        print(remarks.of_no_class(seen, classes), file=sys.stderr)
        classes = []
    drawn = metadata.with_drawn(shards.drawn_before(jobs[0]), request["options"])
    told = dict(
        count=written,
        with_text=sum(account["with_text"] for account in accounts),
        with_label=sum(account["with_label"] for account in accounts),
        read=read,
        quarantined=dict(reasons),
        filtered=dict(filtered),
        shards=entries,
        request=request,
        classes=classes or sorted(seen),
        drawn=dataclasses.asdict(drawn),
    )
    if state := json.loads(files.read(files.join(work, "plan.json"))).get("state"):
        told["state"] = state
    if jobs[0].root:
        told["root"] = in_place.told_root(jobs[0].root, out)
    with metadata.changing(out) as manifest:
        manifest["class_names"] = classes or metadata.class_names(manifest, split, seen)
        manifest["splits"][split] = told
    shard = re.compile(rf"{re.escape(split)}-\d{{5,}}-of-\d{{5,}}\.array_record")
    kept = {entry["file"] for entry in entries}
    for name in files.listing(out):  # of the split that was there before
        if shard.fullmatch(name) and name not in kept:
            storage.remove(files.join(out, name))
    system, plain_work = files.filesystem(work)
    system.rm(plain_work, recursive=True)
    with activity.saying(f"looking for what is not read in {request['input']}"):
        said = remarks.of_split(out, split, manifest, accounts) + said
    print(*said, sep="\n", end="\n" * bool(said), file=sys.stderr)
    return _summary(out, split, manifest)


def _refuse_empty(
    work: str,
    split: str,
    request: dict[str, Any],
    read: int,
    listed: list[dict[str, str]],
    filtered: Mapping[str, int],
    said: Sequence[str],
) -> NoReturn:
    """Raises nothing_left.NothingLeft: why nothing of `read` items is in the split, and what else
    is `said`."""
    of_where = nothing_left.of_where(work, listed, filtered)
    system, plain_work = files.filesystem(work)
    system.rm(plain_work, recursive=True)  # nothing in it is worth going on with
    if set(filtered) & {"held_out", "not_held_out"} and not listed:
        raise EmptySide(request, read, split, filtered)
    input = request["input"]
    more = of_where + remarks.pictures_beside(input, request["format"])
    more += "".join(f"; {line}" for line in said)
    raise nothing_left.NothingLeft(request, read, listed, filtered, more)


def _named(
    out: str, split: str, work: str, jobs: list[shards.Job], accounts: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Moves the shards that hold something to their names; what the manifest says of each."""
    system, plain_out = files.filesystem(out)
    plain_work = files.filesystem(work)[1]
    kept = [(job, account) for job, account in zip(jobs, accounts) if account["count"]]
    names = {
        job.number: f"{split}-{number:05d}-of-{len(kept):05d}.array_record"
        for number, (job, _) in enumerate(kept)
    }

    def move(job: shards.Job) -> None:
        part = f"{plain_work}/part-{job.number:05d}.array_record"
        if system.exists(part):
            system.mv(part, f"{plain_out}/{names[job.number]}")

    shards.of_each(move, [job for job, _ in kept])  # a bucket copies each
    told = ("count", "bytes", "sha256")
    return [
        {"file": names[job.number], **{key: account[key] for key in told}} for job, account in kept
    ]


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
        classes=len(found.get("classes", manifest["class_names"] if found["with_label"] else ())),
        out=str(out),
    )
