"""Input speed of training from tars in place, compared with a prepared copy (docs/data.md).

    python benchmarks/in_place.py DIR                  # 20,000 pairs in 10 tars, about 1.2 GB
    python benchmarks/in_place.py DIR --pairs=200 --tars=2 --seconds=2

Writes DIR/tars, an index and an ArrayRecord copy of them, reads batches of each in turn and prints
a line of JSON: images per CPU second, the best of the repeats, and their quotient.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import pictures

from coca_jax.apps import benchmark
from coca_jax.config import Config, typed
from coca_jax.data.prepare import prepare
from coca_jax.data.sources.items import Options
from coca_jax.recipes import base

BATCH, IMAGE = 64, 224


def config(path: str) -> Config:
    """One thread that reads batches of 64 at 224 pixels."""
    found = base.get_config()
    found.batch_size = BATCH
    found.model.image_size, found.model.patch_size = IMAGE, 16
    found.model.text.vocab_size, found.model.text.max_len = 400, 32
    found.data.sources = (dict(path=path),)
    found.data.num_threads = 1
    return typed(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--tars", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    tars = args.folder / "tars"
    for number in range(args.tars):
        pictures.write(tars / f"{number:05d}.tar", args.pairs // args.tars, seed=number)
    places = {"copy": str(args.folder / "copy"), "in_place": str(args.folder / "index")}
    for name, place in places.items():
        options = Options(in_place=name == "in_place", check=False)
        prepare("webdataset", str(tars), place, options=options, processes=1, progress=False)
    best = dict.fromkeys(places, 0.0)
    for _ in range(args.repeats):  # in turn, so that both meet the same load of the machine
        for name, place in places.items():
            found = benchmark.measure_input(config(place), args.seconds)
            best[name] = max(best[name], found["images_per_second_per_core"])
    print(json.dumps(best | dict(quotient=best["in_place"] / best["copy"])))


if __name__ == "__main__":
    main()
