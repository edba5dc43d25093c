"""Does the shards of a work, on whichever engine, and writes what there is at the end."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from coca_jax.apps.recaption import shard
from coca_jax.apps.recaption.captioner import Captioner
from coca_jax.apps.recaption.request import Request
from coca_jax.apps.recaption.writers import SUFFIXES
from coca_jax.data import holdout, prepare, quarantine
from coca_jax.data.prepare import Job
from coca_jax.data.sources import files, image_folder, manifest, registry
from coca_jax.data.sources.items import Options, Unit
from coca_jax.inference import fingerprint
from coca_jax.runtime import json_files, out_folder, storage
from coca_jax.runtime import progress as bars
from coca_jax.runtime.workers import Engine, Report

# The files of an input, written down when a work begins, which is made of what was there then.


_FILE = "recaption/input.json"
_ASKED_AT_ONCE = 16  # files: a network's disk takes half a millisecond to answer for each


def refuse_inside(request: Request) -> None:
    """Raises ValueError for an output in its own input, of which the next run would read it."""
    places = [storage.whole_path(one) for one in (request.out, request.input)]
    out, input = (one if "://" in one else os.path.realpath(one) for one in places)
    if out == input or out.startswith(posixpath.join(input, "")):
        raise ValueError(
            f"--out={request.out} lies in --input={request.input}: the next run would read what "
            "this one writes; give a folder beside it"
        )


def of_split(request: Request) -> tuple[str, Options]:
    """What is read: the split that names of files or folders tell ('': all of them), and the
    options, which select the rows of a split that a field tells.

    Raises:
        FileNotFoundError, ValueError: nothing to read; the input tells other splits than 'train'
            and none is asked for, or it does not tell the one that is.
    """
    input, split = request.input, request.split
    names, by_field = holdout.of_data(request.format, input, request.options)
    of_what = f"{', '.join(names)} by the field 'split'" if by_field else ", ".join(names)
    if not split and names not in ([], ["train"]):
        raise ValueError(
            f"--input={input} tells the splits {of_what}; give --split=NAME, the one to caption"
        )
    if by_field:
        return "", holdout.narrowed(input, by_field, split, request.options)
    if split and holdout.split_of(split) not in map(holdout.split_of, names):
        splits = f"the splits {of_what}; give one of them" if names else "no splits; drop --split"
        raise ValueError(f"--split={split}: --input={input} tells {splits}")
    return split or "".join(names), request.options


def recorded_split(request: Request) -> tuple[str, Options]:
    """What `of_split` gave when the work began."""
    before = json_files.read_sealed(files.join(request.out, _FILE))
    where = tuple((field, tuple(values)) for field, values in before["where"])
    return before["split"], dataclasses.replace(request.options, where=where)


def write(request: Request, units: Iterable[Unit], split: str, options: Options) -> None:
    """Writes down the files of the units of a plan, and what `of_split` gave."""
    query = dict(files=_input_stamps(request.format, units), split=split, where=options.where)
    json_files.write_sealed(files.join(request.out, _FILE), query)


def check(request: Request, done: bool) -> None:
    """Compares an input with its state when the job began.

    done: the work is, and its input may be gone.

    Raises:
        FileNotFoundError: the input is not there.
        ValueError: it has other files than when the work began, or files of another size.
    """
    before = json_files.read_sealed(files.join(request.out, _FILE))["files"]
    try:
        units = registry.find(request.format).plan(request.input, *recorded_split(request))
    except FileNotFoundError:
        if not done:
            raise
        return
    now = json.loads(json.dumps(_input_stamps(request.format, units)))
    found = []
    for names, more, one in (
        (now.keys() - before.keys(), "more ", ("file", "files")),
        (before.keys() - now.keys(), "fewer ", ("file", "files")),
        ({n for n in before.keys() & now.keys() if before[n] != now[n]}, "", ("",)),
    ):
        if names:
            first = posixpath.basename(min(names).rstrip("/")) + (", ..." if len(names) > 1 else "")
            kind = f"{more}{one[len(names) > 1]}" if more else "changed"
            found.append(f"{len(names)} {kind} ({first})")
    if found:
        raise ValueError(
            f"--input={request.input} has {' and '.join(found)} since --out={request.out} was "
            "begun; give another --out"
        )


def _input_stamps(format: str, units: Iterable[Unit]) -> dict[str, Any]:
    """{file: its size in bytes and what is read of it}. Of a folder of pictures, which has no size,
    also a digest of what is read: of names, and here of sizes; a bucket would be asked once a
    file."""
    found: dict[str, Any] = {}
    for unit in units:
        stamp = None if os.path.isdir(unit.path) else storage.stamp(unit.path)
        stamp_of = found.setdefault(unit.path, dict(size=stamp and stamp[0], read=[]))
        inside = [_digest(format, unit)] if unit.names else []
        stamp_of["read"].append([unit.start, unit.stop, unit.rows, *inside])
    return found


def _digest(format: str, unit: Unit) -> str:
    """Of the names of a unit of a folder; of a local one with the texts beside them, and sizes."""
    digest = hashlib.blake2b(digest_size=16)
    here = not files.is_remote(unit.path)
    names = image_folder.with_texts(unit) if here and format == "sidecars" else unit.names
    names = list(names)
    stamps = (
        _stamps([files.join(unit.path, name) for name in names]) if here else [None] * len(names)
    )
    for name, stamp in zip(names, stamps):
        digest.update(f"{name!r} {stamp and stamp[0]}\n".encode())
    return digest.hexdigest()


def _stamps(paths: list[str]) -> list[tuple[int, int] | None]:
    """`local_files.stamp` of each; all files of an input are asked for at every start of a work."""
    size = -(-len(paths) // _ASKED_AT_ONCE) or 1
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    with concurrent.futures.ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        found = pool.map(lambda part: [storage.stamp(path) for path in part], parts)
        return [stamp for part in found for stamp in part]


# The whole of a work: the plan of its shards, the threshold over all of them, the end.
#
# OUT/recaption/request.json   what was asked for, and the weights
# OUT/recaption/plan.json      the shards
# OUT/recaption/input.json     the files of the input
# OUT/recaption/part-N/        the parts of a shard while it is made
# OUT/recaption/part-N.json    the account of a shard
# OUT/recaption/lease.json     who works at it; of --shard=i/n shard-i-of-n.lease.json
# OUT/recaption.json           what there is, written last
# OUT/quarantine.jsonl         images that could not be used, and why


MANIFEST, QUARANTINE = "recaption.json", "quarantine.jsonl"


def as_begun(request: Request) -> Request:
    """A request whose input and checkpoints are spelled as when its work began, where they are the
    same: './a', 'a/' and '/here/a' are."""
    path = files.join(request.out, "recaption/request.json")
    before = json_files.read_sealed(path) if files.exists(path) else {}
    spelled: dict[str, Any] = {}
    for name in ("input", "checkpoints"):
        old, new = before.get(name), getattr(request, name)
        if old is not None and _whole_paths(old) == _whole_paths(new):
            spelled[name] = old if isinstance(old, str) else tuple(old)
    return dataclasses.replace(request, **spelled)


def _whole_paths(names: str | Sequence[str]) -> list[str]:
    return [storage.whole_path(one) for one in ([names] if isinstance(names, str) else names)]


def plan(request: Request) -> list[Job]:
    """The shards; the same as before where an earlier run began.

    Raises:
        FileNotFoundError, ValueError: nothing to read; or splits of which `request` names none; or
            `out` holds something else, or what was made with other options or of other files, or
            lies in the input.
    """
    work = files.join(request.out, "recaption")
    path = files.join(work, "request.json")
    fields = json.loads(json.dumps(request.to_dict()))
    if files.exists(path):
        _refuse_other(request.out, _flat(json_files.read_sealed(path)), _flat(fields))
        check(request, done=finished(request) is not None)
    elif files.exists(request.out):
        for found in files.listing(request.out):
            if found != "recaption" and not found.startswith("."):
                raise out_folder.something_else(request.out, found)
    if begins := not files.exists(path):
        refuse_inside(request)
    wanted = {key: fields[key] for key in ("format", "input", "options", "split")}
    split, options = of_split(request) if begins else recorded_split(request)
    where = request.format, request.input, split, options, work
    # A plan without a request is of a start that came no further, or of another job of this one,
    # which reads it now: it is not removed but written again.
    jobs = prepare.plan(*where, 0, wanted, anew=begins)
    if begins:
        write(request, [unit for job in jobs for unit in job.units], split, options)
    return jobs


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """What a request says, with its options one by one."""
    return {key: value for key, value in fields.items() if key != "options"} | fields["options"]


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
        json_files.write_sealed(path, request.to_dict() | dict(weights=list(checksums)))
    else:
        before = json_files.read_sealed(path)["weights"]
        if len(before) != len(checksums) or not all(map(fingerprint.same, before, checksums)):
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
        found = json_files.read_sealed(path)["threshold"]
        return float("-inf") if found is None else found
    if not all(prepare.of_each(shard.is_captioned, jobs)):
        return None
    value = shard.threshold(list(jobs), request)
    json_files.write_sealed(path, dict(threshold=shard.as_number(value)))
    return value


def finish(request: Request, jobs: Sequence[Job], least: float) -> dict[str, Any] | None:
    """Writes what stands beside the shards and returns it; None while shards are missing.

    Raises ValueError where no image was written: why. `out` may then be begun anew, otherwise too.
    """
    accounts = prepare.of_each(shard.account, jobs)
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
        raise ValueError(quarantine.nothing_usable(request.input, read, listed, why) + highest)
    lines = "".join(json.dumps(one, ensure_ascii=False, sort_keys=True) + "\n" for one in listed)
    storage.write_bytes(files.join(request.out, QUARANTINE), lines.encode())
    entries = [
        {key: account[key] for key in ("file", "count", "bytes", "sha256")}
        for account in known
        if account["count"]
    ]
    totals = {
        key: sum(account[key] for account in known)
        for key in (
            *("read", "count", "with_text", "replaced", "kept_by_alarm", "filtered"),
            "with_original",
        )
    }
    result = dict(
        totals,
        quarantined=dict(Counter(one["reason"] for one in listed)),
        threshold=shard.as_number(least),
        collapse=_collapse(known),
        shards=entries,
        request=request.to_dict(),
    )
    if request.to == "array_record" and entries:
        _manifest(request, jobs, known, entries)
    json_files.write_sealed(files.join(request.out, MANIFEST), result)
    return result


def _manifest(
    request: Request,
    jobs: Sequence[Job],
    accounts: Sequence[dict[str, Any]],
    entries: list[dict[str, Any]],
) -> None:
    """Writes the manifest, as `prepare` does; entries: of its shards."""
    counts = ("read", "count", "with_text", "with_label")
    split: dict[str, Any] = {key: sum(one[key] for one in accounts) for key in counts}
    split |= dict(shards=entries, filtered={}, quarantined={})
    split["drawn"] = dataclasses.asdict(prepare.drawn_before(jobs[0]))
    classes = prepare.declared_classes(request.format, jobs[0].units[0], jobs[0].options)
    classes = classes or sorted({name for one in accounts for name in one.get("classes", ())})
    written = dict(format="coca_jax-1", class_names=classes, splits={_split(request): split})
    manifest.write(request.out, written)


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
    prepare.of_each(shard.clear, jobs)
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
    result = json_files.read_sealed(path)
    system, plain = files.filesystem(request.out)
    there = {posixpath.basename(one["name"]): one["size"] for one in system.ls(plain, detail=True)}
    sizes = {one["file"]: one["bytes"] for one in result["shards"]}
    beside = [QUARANTINE, *([manifest.MANIFEST] if request.to == "array_record" and sizes else [])]
    whole = all(there.get(file) == size for file, size in sizes.items())
    return result if whole and all(name in there for name in beside) else None


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


def run(
    request: Request,
    jobs: Sequence[Job],
    engine: Engine,
    *,
    say: Callable[[str], None],
    progress: bool,
) -> dict[str, Any]:
    """Does the engine's share of all `jobs`; returns what is there afterwards.

    Returns:
        What `whole.finish` does, or {"waiting": shards that others have still to do}; spent: the
        seconds of the workers by what they went to.
    """
    own = engine.own(jobs)
    spent: Counter[str] = Counter()
    left = _without(own, shard.is_captioned)
    if left:
        if lost := list(filter(None, prepare.of_each(shard.lost, left))):
            say(
                f"{request.out}: {len(lost)} of its files are gone or have another size, and are "
                f"written again: {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}"
            )
        field = request.options.text_field
        if field and not shard.first_have_texts(left[0]):  # the end says what all of them have
            say(
                f"warning: {request.input}: --text_field={field}: none of the first "
                f"{shard.LOOKED_AT} images has a text in it"
            )
        say(f"loading {', '.join(request.checkpoints)}")
        known = [unit.rows for job in left for unit in job.units]
        with bars.Bar(sum(known) if all(known) else None, "images", shown=progress) as bar:
            try:
                for seconds in engine.run(Work(request, jobs), left, bar.update, models=True):
                    spent.update(seconds)
            except shard.Untrustworthy:
                # --out may be used again, unless shards are there or other jobs make them.
                if not engine.share and not any(prepare.of_each(shard.account, jobs)):
                    remove(request, jobs)
                raise
    waiting = _write(request, jobs, own)
    result = waiting or _end(request, jobs)
    return result | dict(spent={what: round(took, 2) for what, took in spent.items()})


class Work:
    """Captions a shard; loads the models of a request at the first one."""

    def __init__(self, request: Request, jobs: Sequence[Job]) -> None:
        self._request, self._jobs = request, list(jobs)
        self._captioner: Captioner | None = None

    def __call__(self, job: Job, report: Report) -> dict[str, float]:
        """Returns seconds by what they went to."""
        if self._captioner is None:
            self._captioner = Captioner(self._request)
            begin(self._request, self._captioner.checksums())
        before = dict(self._captioner.seconds)
        shard.caption(job, self._captioner, report)
        if not self._request.quantile:  # which only all captions together tell
            _write(self._request, self._jobs, [job])
        return {
            what: took - before.get(what, 0.0) for what, took in self._captioner.seconds.items()
        }


def _write(request: Request, jobs: Sequence[Job], own: Sequence[Job]) -> dict[str, Any]:
    """Writes shards; what they wait for, or {}."""
    least = threshold(request, jobs)
    if least is None:
        return dict(waiting=len(_without(jobs, shard.is_captioned)))
    for job in _without(own, shard.account):
        shard.write(job, request, least, name(request, jobs, job))
    return {}


def _end(request: Request, jobs: Sequence[Job]) -> dict[str, Any]:
    least = threshold(request, jobs)
    result = None if least is None else finish(request, jobs, least)
    if result is None:
        return dict(waiting=len(_without(jobs, shard.account)))
    return result


def _without(jobs: Sequence[Job], there: Callable[[Job], Any]) -> list[Job]:
    """Those of which what is asked for is not there."""
    return [job for job, found in zip(jobs, prepare.of_each(there, jobs)) if not found]
