"""Where a captioner says things are: boxes that it writes, and what it says of boxes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from coca_jax.data.dedup import content_digest, numbered
from coca_jax.data.sources import regions
from coca_jax.data.sources.regions import Region
from coca_jax.evaluation.evaluators import Predictor, Record, in_batches, stack_images, warn
from coca_jax.evaluation.evaluators.base import Metric, Pictured, Setting
from coca_jax.evaluation.evaluators.caption_match import canonical_text
from coca_jax.evaluation.evaluators.results import Spread, encode_png, picture
from coca_jax.evaluation.metrics.intervals import with_interval

RIGHT = 0.5  # overlap from which on a box is right, as in referring expressions (RefCOCO)


class Grounding(Pictured):
    """Scores the regions of data: the place that a model writes for each one's text, and the text
    that it writes for each one's place, greedy.
    """

    kind, order, title = "grounding", 45, "Places"
    needs, programs = "region", ("caption",)
    metrics = {
        "accuracy_50": Metric("Boxes that overlap by half"),
        "overlap": Metric("Mean overlap of boxes"),
        "boxes": Metric("Answers that are boxes"),
        "named": Metric("Boxes named exactly"),
    }
    headlines = ("accuracy_50",)

    @classmethod
    def from_task(cls, task: Mapping[str, Any], setting: Setting) -> Grounding:
        """Takes nothing of the task."""
        return cls(task["name"], **setting.common(several=False))

    def run(self, predict: Predictor, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields accuracy_50 (boxes whose intersection over union with the right one is at least a
        half), overlap (the mean of that; 0 where no box is written), boxes (the share of answers
        that are any) and named (places whose text is written exactly, but for case and
        punctuation), each of all regions, with intervals that draw images with all their regions;
        and left_out, the number of regions whose text leaves the model no room for a place, which
        are not asked for.

        A record needs `image` and `extra` with regions (data/sources/regions.py); what has none is passed
        over. Afterwards `examples` holds pictures with what was written. Raises ValueError where no
        record has a region, or none that leaves room.
        """
        left: list[Region] = []
        found: list[tuple[float, bool, bool]] = []
        image_of: list[bytes] = []  # the digest of each region's
        last: Record | None = None
        shown = Spread(self.num_examples)
        pairs = _with_room(predict, records, left)
        show = f"{self.name} regions" if self.progress else ""
        for batch in in_batches(pairs, self.batch_size, show=show):
            images = stack_images([record for record, _ in batch])
            asked = [regions.find(region.text) for _, region in batch]
            places = predict.caption(images, prompt=asked)
            given = [regions.at(region.box) for _, region in batch]
            names = predict.caption(images, prompt=given)
            for (record, region), *written in zip(batch, asked, places, given, names):
                ask, place, give, name = written
                box = regions.read(after(place, ask))
                score = 0.0 if box is None else regions.overlap(box, region.box)
                right = canonical_text(after(name, give)) == canonical_text(region.text)
                found.append((score, box is not None, right))
                same = record is last  # else a list may name an image once a region
                image_of.append(image_of[-1] if same else content_digest(record["image"]))
                last = record
                shown.offer(functools.partial(_item, record, region, place, score))
        why = "no record has a region; check the data and its split"
        if left:
            why = (
                f"{len(left)} of {len(left) + len(found)} regions left out, whose "
                f"texts leave no room for a place within model.text.max_len={predict.max_len}; "
                f"the first is {left[0].text[:60]!r}"
            )
            warn(self.name, why)
        if not found:
            raise ValueError(f"{self.name}: {why}")
        overlap, boxes, named = (np.asarray(column, np.float64) for column in zip(*found))
        shares = dict(accuracy_50=overlap >= RIGHT, overlap=overlap, boxes=boxes, named=named)
        owners = numbered(image_of)
        for name, share in shares.items():
            yield from with_interval(f"{self.name}/{name}", share, owners=owners)
        yield f"{self.name}/left_out", float(len(left))
        self.examples = dict(kind="captioning", items=shown.items(), worst=[])


def _with_room(
    predict: Predictor, records: Iterable[Record], left: list[Region]
) -> Iterator[tuple[Record, Region]]:
    """The regions whose text leaves a model more than one token to write; the others go to
    `left`."""
    for record in records:
        for region in regions_of(record):
            tokens = int(predict.num_tokens([regions.find(region.text)])[0])
            if tokens < predict.max_len - 1:
                yield record, region
            else:
                left.append(region)


def regions_of(record: Record) -> list[Region]:
    """The regions of a record."""
    extra = record.get("extra") or {}
    return regions.regions_of(extra if isinstance(extra, str) else json.dumps(extra))


def after(text: str, prompt: str) -> str:
    """What a caption says behind its prompt, however its vocabulary spells that."""
    if text.startswith(prompt):
        return text[len(prompt) :]
    colons = prompt.count(":")  # kept where letters and spaces are not
    parts = text.split(":", colons)
    return parts[colons] if len(parts) > colons else ""


def _item(record: Record, region: Region, place: str, score: float) -> dict[str, Any]:
    """One picture of the report."""
    image = encode_png(picture(record["image"]))
    wanted = [f"{regions.numbers(region.box)} (overlap {score:.2f})"]
    return dict(image=image, caption=place, references=wanted, exact=score >= RIGHT, f1=score)
