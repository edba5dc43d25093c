"""A shard: its captions, kept in parts while they are made, then written whole or not at all.

A part is a JSON file of results that appears whole; a shard goes on after its last part. A shard
is finished when its account is there, which is written after its file, and that file as well.
"""

from __future__ import annotations

import itertools
import os
import posixpath
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from coca_jax.apps.recaption import selection, writers
from coca_jax.apps.recaption.captioner import Captioner, Picture
from coca_jax.apps.recaption.request import Request
from coca_jax.data import prepare, quarantine
from coca_jax.data.dedup import content_digest
from coca_jax.data.prepare import Job
from coca_jax.data.sources import files
from coca_jax.data.sources.fields import printable
from coca_jax.data.sources.items import Item
from coca_jax.evaluation.evaluators import collapse
from coca_jax.inference import prefetch
from coca_jax.runtime import json_files, storage


class Untrustworthy(ValueError):
    """A model whose captions or scores raise the alarm at the first images of a work."""


LOOKED_AT = 64  # images, before any is captioned
_DETAIL = 300  # characters of what is said of an image that cannot be used


def parts(job: Job) -> list[str]:
    """The files of the parts that are there, in order."""
    found: list[str] = []
    while files.exists(path := f"{job.part}/part-{len(found):05d}.json"):
        found.append(path)
    return found


def read_parts(job: Job) -> list[dict[str, Any]]:
    """What the parts hold that are there, in order."""
    return [json_files.read_sealed(path) for path in parts(job)]


def is_captioned(job: Job) -> bool:
    """Whether its captions, or its account, are all there."""
    found = parts(job)
    return bool(found and json_files.read_sealed(found[-1])["last"]) or account(job) is not None


def account(job: Job) -> dict[str, Any] | None:
    """What was written of a finished shard; None of another, also where its file is lost."""
    found = _noted(job)
    return found if found and not _is_lost(job, found) else None


def lost(job: Job) -> str:
    """The file of a shard that was finished, where it is no longer there or of another size than it
    had; '' of any other shard."""
    found = _noted(job)
    return found["file"] if found and _is_lost(job, found) else ""


def _noted(job: Job) -> dict[str, Any] | None:
    path = f"{job.part}.json"
    return json_files.read_sealed(path) if files.exists(path) else None


def _is_lost(job: Job, noted: dict[str, Any]) -> bool:
    if not noted["count"]:  # it had nothing to write
        return False
    path = files.join(posixpath.dirname(job.work), noted["file"])
    return not files.exists(path) or files.size(path) != noted["bytes"]


def selected(job: Job) -> Iterator[tuple[int, Item]]:
    """(number, item) of what the options select of a shard; items with a problem are kept."""
    items = enumerate(prepare.read_items(job))
    return (pair for pair in items if not quarantine.wanted(pair[1], job.options))


def first_have_texts(job: Job) -> bool:
    """Whether any of the first LOOKED_AT images has an original text."""
    return any(item.texts for _, item in itertools.islice(selected(job), LOOKED_AT))


def caption(job: Job, captioner: Captioner, report: Callable[[int], None]) -> None:
    """Makes the parts of a shard that are not there; `report` gets the numbers of items done."""
    if is_captioned(job):
        return
    request, known = captioner.request, parts(job)
    done = sum(json_files.read_sealed(path)["read"] for path in known)
    report(done)
    items = itertools.islice(selected(job), done, None)
    batches = prefetch.batches(
        items,
        lambda pair: captioner.read(pair[1]),
        request.batch_size,
        ahead=max(request.part // request.batch_size, prefetch.AHEAD),
    )
    number, per_part = len(known), request.part // request.batch_size
    if number:
        _check_first(job, request)
    while True:
        with captioner.timed("input"):
            taken = list(itertools.islice(batches, per_part))
        last = sum(map(len, taken)) < request.part
        _make(f"{job.part}/part-{number:05d}.json", taken, number, last, captioner)
        report(sum(map(len, taken)))
        if not number:
            _check_first(job, request)
        number += 1
        if last:
            return


def _check_first(job: Job, request: Request) -> None:
    """Raises Untrustworthy where the first part of a work raises the alarm and its captions would
    replace original texts: all shards would keep theirs, after hours of captioning."""
    if job.number or request.text != "better":
        return
    figures = _figures(read_parts(job)[:1])
    if figures["with_original"] and (why := alarm(figures)):
        raise Untrustworthy(
            f"{request.out}: stopped after {figures['count']} images, as captions would replace "
            f"original texts by worse ones: {why}. Use a model trained on images like these, or "
            "--text=original (adds scores and embeddings) or --text=synthetic (takes the captions "
            "anyway)."
        )


def _make(path: str, taken: list, number: int, last: bool, captioner: Captioner) -> None:
    """Writes a part; its first captions are what is looked at of a model that collapsed."""
    good: list[Picture] = []
    quarantined = []
    for (place, item), pixels in itertools.chain.from_iterable(taken):
        if isinstance(pixels, tuple):
            texts = [" ".join(text.split()) for text in map(printable, item.texts)]
            texts = [text for text in texts if text]
            good.append(Picture(place, item.key, texts, pixels, item.image))
        else:
            reason, _, detail = " ".join(str(pixels).split()).partition(": ")
            quarantined.append(
                dict(key=item.key, reason=reason, detail=printable(detail)[:_DETAIL])
            )
    asked = captioner.ask([one.image for one in good], [one.key for one in good])
    answers: list[list[dict[str, Any]]] | None = None
    if asked is not None:
        for one, answer in zip(good, asked):
            if isinstance(answer, str):
                detail = printable(answer)[:_DETAIL]
                quarantined.append(dict(key=one.key, reason="no_caption", detail=detail))
        pairs = [(one, answer) for one, answer in zip(good, asked) if isinstance(answer, list)]
        good, answers = [one for one, _ in pairs], [answer for _, answer in pairs]
    digests = [content_digest(one.image).hex() for one in good]
    found, details = captioner.part(good, look=not number, answers=answers)
    part = dict(results=found, quarantined=quarantined, read=sum(map(len, taken)), last=last)
    json_files.write_sealed(path, part | dict(digests=digests, figures=details))


def write(job: Job, request: Request, threshold: float, name: str) -> None:
    """Writes a captioned shard as file `name` of the output, then its account."""
    if account(job) is not None:
        return
    read = read_parts(job)
    entry: dict[str, Any] = dict(
        read=sum(part["read"] for part in read),
        quarantined=[one for part in read for one in part["quarantined"]],
        with_original=sum(bool(one["originals"]) for part in read for one in part["results"]),
        replaced=0,
        collapse=_figures(read),
    )
    how = _how(read, request)
    by_number = {one["number"]: one for part in read for one in part["results"]}
    scores: list[float] = []

    def examples() -> Iterator[writers.Example]:
        for number, item in selected(job):
            result = by_number.get(number)
            if result is None:
                continue
            if result["key"] != item.key:
                raise ValueError(
                    f"{job.units[0].path}: where {result['key']} was captioned there is now "
                    f"{item.key}: the input has changed; give another --out"
                )
            texts = selection.texts(result, request.text, **how)
            good = [one for one in texts if one[1] >= threshold]
            scores.extend(score for _, score in texts)
            if good or threshold == float("-inf"):
                known = {one["text"] for one in result["originals"]}
                entry["replaced"] += bool(good) and good[0][0] not in known
                several = request.text in selection.SEVERAL
                # As texts are: class folders may have names that are no UTF-8.
                item.labels = list(map(printable, item.labels))
                yield writers.Example(_key(job, number, item), item, good, result, several)

    path = files.join(request.out, name)
    with storage.whole_file(path) as local:
        entry |= writers.write(request.to, local, examples())
        if entry["count"]:
            entry |= dict(file=name, bytes=os.path.getsize(local), sha256=prepare.sha256(local))
        else:
            os.remove(local)
    entry["kept_by_alarm"] = entry["with_original"] if how["keep"] else 0
    entry["filtered"] = entry["read"] - entry["count"] - len(entry["quarantined"])
    entry["highest"] = max(scores, default=None)
    json_files.write_sealed(f"{job.part}.json", entry)
    clear(job)


def clear(job: Job) -> None:
    """Removes the parts of a finished shard."""
    storage.remove(job.part)


def _key(job: Job, number: int, item: Item) -> str:
    """The key in the output: a webdataset keeps its own, others are numbered."""
    if job.format == "webdataset":
        return item.key.removeprefix(posixpath.basename(job.units[0].path) + "/")
    return f"{job.number:05d}{number:06d}"


def _how(read: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    """How `choose.texts` chooses in a shard with these parts."""
    keep = request.text == "better" and bool(alarm(_figures(read)))
    return dict(margin=request.margin, keep=keep)


def alarm(figures: dict[str, Any]) -> str:
    """What is wrong with the captions and scores of a shard, by its `_figures`; '' for nothing."""
    tokens, matched = figures["tokens"], figures["matched"]
    gain = dict(image_gain=figures["gain"] / tokens) if tokens else {}
    message = collapse.warning(
        figures | gain,
        figures["count"],
        figures["of_originals"] or 1.0,
        start=figures["start"],
        start_of_references=figures["start_of_originals"],
    )
    unmatched = selection.warning_of_match(figures["match"] / max(matched, 1), matched)
    return "; ".join(filter(None, (message, unmatched)))


def _figures(read: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the first captions of a shard with these parts, each image once: count, distinct,
    same_start, self_bleu, gain, tokens; how distinct the originals are, how many begin as the
    captions do, and how well the model matches them (the sum over `matched` texts)."""
    once: set[str] = set()  # images, which a list may name several times
    looked = []
    for part in read:
        for one, digest in zip(part["results"], part["digests"]):
            if digest not in once:
                once.add(digest)
                looked.append(one)
    first = [one["captions"][0]["text"] for one in looked][: collapse.MOST]
    originals = [one["originals"][0]["text"] for one in looked if one["originals"]][: collapse.MOST]
    start, begins = collapse.same_start(first)
    figures = [part["figures"] for part in read]
    return dict(
        gain=sum(one.get("gain", 0.0) for one in figures),
        tokens=sum(one.get("tokens", 0) for one in figures),
        match=round(sum(one.get("match", 0.0) for one in figures), 3),
        matched=sum(one.get("matched", 0) for one in figures),
        count=len(first),
        with_original=len(originals),
        distinct=_mean(collapse.distinct(first)),
        start=start,
        same_start=_mean(begins),
        start_of_originals=_mean(
            np.array([collapse.start_of(text) == start for text in originals])
        ),
        self_bleu=_mean(collapse.self_bleu(first)),
        of_originals=_mean(collapse.distinct(originals)),
    )


def _mean(values: np.ndarray) -> float:
    return round(float(values.mean()), 4) if len(values) else 0.0


def threshold(jobs: list[Job], request: Request) -> float:
    """The least score of a text that is kept, over all shards."""
    least = float("-inf") if request.min_score is None else request.min_score
    if not request.quantile:
        return least
    # Of many shards at once: a bucket is asked for each of their parts.
    every = prepare.of_each(lambda job: _scores(job, request), jobs)
    scores = np.concatenate([np.zeros(0), *every])
    return max(least, selection.quantile(scores, request.quantile))


def _scores(job: Job, request: Request) -> np.ndarray:
    """Of the texts that are chosen in a shard."""
    read = read_parts(job)
    every = (one for part in read for one in part["results"])
    return selection.scores(every, request.text, **_how(read, request))


def as_number(value: float) -> float | None:
    """A threshold as JSON has it."""
    return None if np.isinf(value) else value
