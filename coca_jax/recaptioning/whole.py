"""The whole of a work: the plan of its shards, the threshold over all of them, the end.

OUT/recaption/request.json   what was asked for, and the weights
OUT/recaption/plan.json      the shards
OUT/recaption/input.json     the files of the input
OUT/recaption/part-N/        the parts of a shard while it is made
OUT/recaption/part-N.json    the account of a shard
OUT/recaption/lease.json     who works at it; of --shard=i/n shard-i-of-n.lease.json
OUT/recaption.json           what there is, written last
OUT/quarantine.jsonl         images that could not be used, and why
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
from collections import Counter
from collections.abc import Sequence
from typing import Any

from coca_jax.data import files
from coca_jax.files import local_files, out_folder, sealed_json, storage
from coca_jax.importers import asked, metadata, remarks, shards, splits
from coca_jax.importers.shards import Job
from coca_jax.inference import model_checksum
from coca_jax.recaptioning import inputs, shard
from coca_jax.recaptioning.request import Request
from coca_jax.recaptioning.writers import SUFFIXES

MANIFEST, QUARANTINE = "recaption.json", "quarantine.jsonl"


def as_begun(request: Request) -> Request:
    """A request whose input and checkpoints are spelled as when its work began, where they are the
    same: './a', 'a/' and '/here/a' are."""
    path = files.join(request.out, "recaption/request.json")
    before = sealed_json.read(path) if files.exists(path) else {}
    spelled: dict[str, Any] = {}
    for name in ("input", "checkpoints"):
        old, new = before.get(name), getattr(request, name)
        if old is not None and _whole_paths(old) == _whole_paths(new):
            spelled[name] = old if isinstance(old, str) else tuple(old)
    return dataclasses.replace(request, **spelled)


def _whole_paths(names: str | Sequence[str]) -> list[str]:
    return [local_files.whole_path(one) for one in ([names] if isinstance(names, str) else names)]


def plan(request: Request) -> list[Job]:
    """The shards; the same as before where an earlier run began.

    Raises:
        FileNotFoundError, ValueError: nothing to read; or splits of which `request` names none; or
            `out` holds something else, or what was made with other options or of other files, or
            lies in the input.
    """
    work = files.join(request.out, "recaption")
    path = files.join(work, "request.json")
    told = json.loads(json.dumps(request.told()))
    if files.exists(path):
        _refuse_other(request.out, _flat(sealed_json.read(path)), _flat(told))
        inputs.check(request, done=finished(request) is not None)
    elif files.exists(request.out):
        for found in files.listing(request.out):
            if found != "recaption" and not found.startswith("."):
                raise out_folder.something_else(request.out, found)
    if begins := not files.exists(path):
        inputs.refuse_inside(request)
    module = shards.importer(request.format)
    wanted = {key: told[key] for key in ("format", "input", "options", "split") if key in told}
    split, options = inputs.of_split(request) if begins else inputs.kept_split(request)
    where = request.format, request.input, split, options, work
    # A plan without a request is of a start that came no further, or of another job of this one,
    # which reads it now: it is not removed but written again.
    jobs = splits.plan(module, *where, 0, wanted, anew=begins)
    if begins:
        inputs.write(request, [unit for job in jobs for unit in job.units], split, options)
    return jobs


def _flat(told: dict[str, Any]) -> dict[str, Any]:
    """What a request says, with its options one by one, those included that an older version did
    not know."""
    told = asked.whole(told)
    return {key: value for key, value in told.items() if key != "options"} | told["options"]


def _refuse_other(out: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError, naming the first difference, where a work was begun otherwise."""
    for key in sorted({*now, *before} - {"weights"}):
        old, new = before.get(key), now.get(key)
        if old != new:
            raise ValueError(
                f"--out={out} was begun with {key}={old!r}, not {new!r}; give the same, or another "
                "--out"
            )


def begin(request: Request, checksums: Sequence[str]) -> None:
    """Writes down what is asked for. Raises ValueError where other models than these began."""
    path = files.join(request.out, "recaption/request.json")
    if not files.exists(path):
        sealed_json.write(path, request.told() | dict(weights=list(checksums)))
    else:
        before = sealed_json.read(path)["weights"]
        if len(before) != len(checksums) or not all(map(model_checksum.same, before, checksums)):
            raise ValueError(
                f"--out={request.out} was begun with other weights or preprocessing than "
                "--checkpoint has now; give another --out"
            )


def _split(request: Request) -> str:
    """The split that an output has which tells splits."""
    return request.split or "train"


def name(request: Request, jobs: Sequence[Job], job: Job) -> str:
    """The file of a shard."""
    suffix = SUFFIXES[request.to]
    if request.to == "array_record":
        return f"{_split(request)}-{job.number:05d}-of-{len(jobs):05d}.{suffix}"
    return f"{job.number:05d}.{suffix}"


def threshold(request: Request, jobs: Sequence[Job]) -> float | None:
    """The least score of a text that is kept; None while it takes captions that are not there."""
    path = files.join(request.out, "recaption/threshold.json")
    if not request.quantile:
        return shard.threshold([], request)
    if files.exists(path):
        found = sealed_json.read(path)["threshold"]
        return float("-inf") if found is None else found
    if not all(shards.of_each(shard.is_captioned, jobs)):
        return None
    value = shard.threshold(list(jobs), request)
    sealed_json.write(path, dict(threshold=shard.as_number(value)))
    return value


def finish(request: Request, jobs: Sequence[Job], least: float) -> dict[str, Any] | None:
    """Writes what stands beside the shards and returns it; None while shards are missing.

    Raises ValueError where no image was written: why. `out` may then be begun anew, otherwise too.
    """
    accounts = shards.of_each(shard.account, jobs)
    if not all(accounts):
        return None
    known = [account for account in accounts if account]
    _tidy(request, jobs)
    listed = [one for account in known for one in account["quarantined"]]
    if not any(account["count"] for account in known):
        remove(request, jobs)
        filtered = sum(account["filtered"] for account in known)
        why = {f"below --min_score={request.min_score}": filtered} if filtered else {}
        read = sum(account["read"] for account in known)
        scores = [one["highest"] for one in known if one.get("highest") is not None]
        highest = f"; the highest score of a text is {max(scores)}" if filtered and scores else ""
        raise ValueError(remarks.nothing_usable(request.input, read, listed, why) + highest)
    lines = "".join(json.dumps(one, ensure_ascii=False, sort_keys=True) + "\n" for one in listed)
    storage.write_bytes(files.join(request.out, QUARANTINE), lines.encode())
    entries = [
        {key: account[key] for key in ("file", "count", "bytes", "sha256")}
        for account in known
        if account["count"]
    ]
    totals = {
        key: sum(account[key] for account in known)
        for key in ("read", "count", "with_text", "replaced", "kept_by_alarm", "filtered")
    }
    if all("with_original" in account for account in known):  # those of older versions lack it
        totals["with_original"] = sum(account["with_original"] for account in known)
    told = dict(
        totals,
        quarantined=dict(Counter(one["reason"] for one in listed)),
        threshold=shard.as_number(least),
        collapse=_collapse(known),
        shards=entries,
        request=request.told(),
    )
    if request.to == "array_record" and entries:
        _manifest(request, jobs, known, entries)
    sealed_json.write(files.join(request.out, MANIFEST), told)
    return told


def _manifest(
    request: Request,
    jobs: Sequence[Job],
    accounts: Sequence[dict[str, Any]],
    entries: list[dict[str, Any]],
) -> None:
    """Writes the manifest, as `prepare` does; entries: of its shards."""
    counts = ("read", "count", "with_text", "with_label")  # older accounts lack the last
    split: dict[str, Any] = {key: sum(one.get(key, 0) for one in accounts) for key in counts}
    split |= dict(shards=entries, filtered={}, quarantined={})
    split["drawn"] = dataclasses.asdict(shards.drawn_before(jobs[0]))
    module = shards.importer(request.format)
    classes = splits.declared_classes(module, jobs[0].units[0], jobs[0].options)
    classes = classes or sorted({name for one in accounts for name in one.get("classes", ())})
    told = dict(format="coca_jax-1", class_names=classes, splits={_split(request): split})
    metadata.write(request.out, told)


def remove(request: Request, jobs: Sequence[Job]) -> None:
    """Removes a work without results. What it was asked for goes last: a part of a work without
    that would be taken for one of the next."""
    work = files.join(request.out, "recaption")
    for path in (*(f"{job.part}.json" for job in jobs), files.join(work, "threshold.json")):
        storage.remove(path)
    storage.remove(work)


def _tidy(request: Request, jobs: Sequence[Job]) -> None:
    """Removes what runs that were killed left behind: parts, and files without their names yet.
    Nobody writes such files any more: all accounts are there."""
    shards.of_each(shard.clear, jobs)
    names = {name(request, jobs, job) for job in jobs}
    for folder, ours in ((request.out, names), (files.join(request.out, "recaption"), None)):
        for found in files.listing(folder):
            begun = storage.UNNAMED.fullmatch(found)
            if begun and (ours is None or begun[1] in ours):
                storage.remove(files.join(folder, found))


def finished(request: Request) -> dict[str, Any] | None:
    """What `finish` wrote; None also where a file beside it is gone or has another size."""
    path = files.join(request.out, MANIFEST)
    if not files.exists(path):
        return None
    told = sealed_json.read(path)
    system, plain = files.filesystem(request.out)
    there = {posixpath.basename(one["name"]): one["size"] for one in system.ls(plain, detail=True)}
    sizes = {one["file"]: one["bytes"] for one in told["shards"]}
    beside = [QUARANTINE, *([metadata.MANIFEST] if request.to == "array_record" and sizes else [])]
    whole = all(there.get(file) == size for file, size in sizes.items())
    return told if whole and all(name in there for name in beside) else None


def _collapse(accounts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all shards, weighted by their captions, and the warning that they give."""
    figures = [account["collapse"] for account in accounts if account["collapse"]["count"]]
    count = sum(one["count"] for one in figures)
    if not count:
        return dict(captions=0, warning="")

    def mean(key: str) -> float:
        return round(sum(one[key] * one["count"] for one in figures) / count, 4)

    found = dict(captions=count)
    found |= {key: mean(key) for key in ("distinct", "same_start", "self_bleu")}
    tokens = sum(one["tokens"] for one in figures)
    if tokens:
        found["image_gain"] = round(sum(one["gain"] for one in figures) / tokens, 4)
    gain = sum(one["gain"] for one in figures)
    most = max(figures, key=lambda one: one["same_start"] * one["count"])
    summed = {key: sum(one[key] for one in figures) for key in ("match", "matched")}
    if summed["matched"]:
        found["original_match"] = round(summed["match"] / summed["matched"], 4)
    whole = dict(found, gain=gain, tokens=tokens, count=count, start=most["start"], **summed)
    whole |= {key: mean(key) for key in ("of_originals", "start_of_originals")}
    return found | dict(distinct_originals=mean("of_originals"), warning=shard.alarm(whole))
