"""Rows of `fit`: what a folder of pictures becomes in some minutes, and in which numbers."""

from __future__ import annotations

import json
import time

import pictures
from measuring import Given, Rows, Values, children
from measuring_runs import interval, scores

FITTED = dict(
    captions=dict(
        image_to_text=("retrieval/", "image_to_text_r1"),
        text_to_image=("retrieval/", "text_to_image_r1"),
        word_f1=("captioning/", "word_f1"),
        exact=("captioning/", "exact_match"),
    ),
    labels=dict(top1=("zero_shot/", "top1")),
)
TYPES = dict(
    image_to_text="retrieval/emoji_test/image_to_text_r1",
    text_to_image="retrieval/emoji_test/text_to_image_r1",
    exact="captioning/emoji_test/exact_match",
)


def folders(given: Given) -> Rows:
    """`fit` on drawn pictures of two shapes, with captions and in folders of colours."""
    found: Rows = {}
    for kind in ("captions", "labels"):
        place = pictures.drawn(kind, given.drawn / kind, 500)
        run = given.runs / f"fit_{kind}_{time.time_ns()}"
        start, spent = time.perf_counter(), children()
        given.coca("fit", str(place), "--minutes=5", f"--workdir={run}")
        took, spent = time.perf_counter() - start, children() - spent
        told, config = scores(run), json.loads((run / "config.json").read_text())
        values: Values = dict(steps=told["step"], batch=config["batch_size"])
        values |= dict(minutes=int(took // 60), seconds=round(took % 60), cpu_seconds=spent)
        for name, (begin, end) in FITTED[kind].items():
            of = (v for key, v in told.items() if key.startswith(begin) and key.endswith(end))
            values[name] = 100 * next(of)
        found[f"fit/{kind}"] = values
    return found


def types(given: Given) -> Rows:
    """`fit` of the emoji in ten minutes of one core, in float32 and in bfloat16: what it learns in
    them of pictures that it holds out."""
    found: Rows = {}
    for dtype in ("float32", "bfloat16"):
        run = given.runs / f"fit_{dtype}_{time.time_ns()}"
        flags = ("--minutes=10", f"--workdir={run}", f"--config.model.dtype={dtype}")
        given.coca("fit", "data/emoji", *flags, one_core=True)
        told = scores(run)
        values: Values = dict(steps=told["step"])
        for name, key in TYPES.items():
            values |= interval(told, key, name)
        found[f"fit_types/{dtype}"] = values
    return found
