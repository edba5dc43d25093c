"""Training from tars where they lie, beside a copy, on tars that are drawn for it.

    python benchmarks/in_place.py DIR                  # 100,000 pairs in 10 tars, about 3 GB
    python benchmarks/in_place.py DIR --pairs=2000 --tars=2 --seconds=2

makes DIR/tars (JPEGs of 256 pixels, each a few hundred times, with captions and img2dataset's JSON
of their own), an index and a copy of them, and prints as JSON:

- read, index, copy: bytes and pairs a processor second, tar by tar in turn, from the page cache
- batches: input images a processor second in place and from the copy, in turn, and the quotient
- same: whether batches of the index are those of the copy; after a resume; of 2 and 4 processes
- s3: the first --s3_tars of them behind s3_server.py on this machine, and here: processor seconds
  of this process for an index, input images a processor second here, from there, and again from
  what the disk keeps, their quotients, and whether batches are the same; --s3_only: no more

A benchmark, no test; tests/test_in_place.py holds the same on small data.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import s3_server
from PIL import Image

from coca_jax.apps import benchmark
from coca_jax.config import typed
from coca_jax.data.batches import open_stream
from coca_jax.data.prepare import prepare
from coca_jax.data.sources.items import Options
from coca_jax.recipes import base
from coca_jax.training import run_vocabulary

DRAWN = 250  # pictures; the others are the same again under another name and caption
SIDE = 256
BATCH, IMAGE = 64, 224
READS = 10
STEPS = 4  # whose batches are compared
S3_STEPS = 64  # of batches from a bucket


def jpegs() -> list[bytes]:
    """Pictures of soft shapes with grain, about 25 kB each."""
    found = []
    for seed in range(DRAWN):
        rng = np.random.default_rng(seed)
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(pixels + rng.normal(0, 9, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=85)
        found.append(out.getvalue())
    return found


def make(folder: pathlib.Path, pairs: int, count: int) -> list[pathlib.Path]:
    """Writes the tars that are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.tar" for number in range(count)]
    pictures = [] if all(path.exists() for path in paths) else jpegs()
    for number, path in enumerate(paths):
        if path.exists():
            continue
        new = path.with_suffix(".new")
        with tarfile.open(new, "w", format=tarfile.USTAR_FORMAT) as archive:
            for n in range(number * pairs // count, (number + 1) * pairs // count):
                key, text = f"{n:09d}", f"picture {n % DRAWN} for the {n // DRAWN}th time"
                told = dict(caption=text, url=f"https://example.com/{n}.jpg", key=key)
                told |= dict(status="success", width=SIDE, height=SIDE, original_width=2 * SIDE)
                members = dict(jpg=pictures[n % DRAWN], txt=text.encode())
                members["json"] = json.dumps(told).encode()
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        new.rename(path)
    return paths


def spent(work: Callable[[], Any]) -> float:
    """Processor seconds of this process and of those that it waited for."""
    before = os.times()
    work()
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


def imported(tars: list[pathlib.Path], out: pathlib.Path, check: bool, in_place: bool) -> None:
    options = Options(in_place=in_place, check=check)
    path = str(tars[0]) if len(tars) == 1 else str(tars[0].parent)
    prepare("webdataset", path, str(out), options=options, processes=1, progress=False)


def rates(tars: list[pathlib.Path], pairs: int) -> dict[str, dict[str, float]]:
    """Megabytes and pairs a processor second of reading and importing, tar by tar in turn."""
    for path in tars:
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    seconds = dict(read=0.0, index_noverify=0.0, copy_noverify=0.0, index=0.0, copy=0.0)
    with tempfile.TemporaryDirectory(dir=tars[0].parent.parent) as scratch:
        for path in tars:
            for name in seconds:
                if name == "read":
                    command = ["cat", str(path)]
                    for _ in range(READS):  # the processor's clock counts hundredths
                        seconds[name] += spent(
                            lambda c=command: subprocess.run(
                                c, stdout=subprocess.DEVNULL, check=True
                            )
                        )
                    continue
                out = pathlib.Path(scratch) / name
                how = dict(check="noverify" not in name, in_place=name.startswith("index"))
                seconds[name] += spent(lambda p=path, o=out, h=how: imported([p], o, **h))
                shutil.rmtree(out)
    size = sum(path.stat().st_size for path in tars) / 1e6
    seconds["read"] /= READS
    return {
        name: dict(mb=size / took, pairs=pairs / took, seconds=took)
        for name, took in seconds.items()
    }


def config_of(path: str) -> Any:
    config = base.get_config()
    config.batch_size, config.model.image_size = BATCH, IMAGE
    config.model.text.vocab_size, config.model.text.max_len = 400, 32
    config.data.sources = (dict(path=path),)
    config.data.num_threads = 1
    return typed(config)


def take(batches: Iterator[Any], count: int) -> list[Any]:
    return [next(batches) for _ in range(count)]


def equal(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(
        np.array_equal(one[key], other[key]) for one, other in zip(some, others) for key in one
    )


def same(index: str, copy: str) -> dict[str, bool]:
    """Whether batches are the same in place, after a resume and for several processes."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = run_vocabulary.load_or_train(config_of(copy), folder)
    whole = take(open_stream(config_of(copy), vocabulary), STEPS)
    here = config_of(index)
    found = dict(in_place=equal(whole, take(open_stream(here, vocabulary), STEPS)))
    resumed = take(open_stream(here, vocabulary, start_step=2), STEPS - 2)
    found["resumed"] = equal(whole[2:], resumed)
    for count in (2, 4):
        parts = [
            take(open_stream(here, vocabulary, process_index=p, process_count=count), 2)
            for p in range(count)
        ]
        joined = [
            {key: np.concatenate([part[step][key] for part in parts]) for key in whole[step]}
            for step in range(2)
        ]
        found[f"processes_{count}"] = equal(whole[:2], joined)
    return found


def batches(index: str, copy: str, seconds: float, repeats: int) -> dict[str, float]:
    """Input images a processor second, the best of each in turn, and their quotient."""
    found: dict[str, list[float]] = dict(in_place=[], copy=[])
    for _ in range(repeats):
        for name, path in (("copy", copy), ("in_place", index)):
            told = benchmark.measure_input(config_of(path), seconds)
            found[name].append(told["images_per_second_per_core"])
    best = {name: max(values) for name, values in found.items()}
    return best | dict(quotient=best["in_place"] / best["copy"])


@contextlib.contextmanager
def bucket(folder: pathlib.Path, cache: pathlib.Path) -> Iterator[str]:
    """The URL of a folder as a bucket of a server on this machine, in a process of its own."""
    with s3_server.serving(folder) as port:
        os.environ |= dict(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", XDG_CACHE_HOME=str(cache))
        os.environ |= dict(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
        os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
        yield f"s3://{s3_server.NAME}"


def timed_batches(path: str, steps: int) -> tuple[float, list[Any]]:
    """Processor seconds of the first `steps` batches, opening left out, and the batches."""
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = run_vocabulary.load_or_train(config_of(path), scratch)
    stream, found = open_stream(config_of(path), vocabulary), []
    found.append(next(stream))
    took = spent(lambda: found.extend(take(stream, steps)))
    stream.close()
    return took, found


def from_s3(tars: list[pathlib.Path], folder: pathlib.Path, steps: int) -> dict[str, Any]:
    """The same tars in a bucket and here: index and batches, by processor seconds of this process,
    the server's left out. first: nothing was read before; again: what the disk keeps of that."""
    with bucket(tars[0].parent, folder / "cache") as url:
        options = dict(options=Options(in_place=True, check=False), processes=1, progress=False)
        there, here = str(folder / "of_s3"), str(folder / "of_disk")
        names = f"{{00000..{len(tars) - 1:05d}}}.tar"
        found: dict[str, Any] = {}
        for name, out, root in (("here", here, str(tars[0].parent)), ("s3", there, url)):
            found[f"index_{name}"] = spent(
                lambda o=out, r=root: prepare("webdataset", f"{r}/{names}", o, **options)
            )
        made = {}
        for name, path in (("here", here), ("first", there), ("again", there)):
            took, made[name] = timed_batches(path, steps)
            found[f"batches_{name}"] = steps * BATCH / took
    found["same"] = all(equal(made["here"], made[name]) for name in ("first", "again"))
    found["index_factor"] = found["index_s3"] / found["index_here"]
    for name in ("first", "again"):
        found[f"{name}_factor"] = found["batches_here"] / found[f"batches_{name}"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--tars", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--s3_tars", type=int, default=0)
    parser.add_argument("--s3_only", action="store_true")
    parser.add_argument("--s3_steps", type=int, default=S3_STEPS)
    parser.add_argument("--rated_tars", type=int, default=2, help="whose import is timed, in turn")
    args = parser.parse_args()
    tars = make(args.folder / "tars", args.pairs, args.tars)
    told: dict[str, Any] = {}

    def tell(**found: Any) -> None:
        """Says at once what was found: the rest takes minutes more."""
        told.update(found)
        print(json.dumps(found), file=sys.stderr, flush=True)

    tell(pairs=args.pairs, gb=sum(path.stat().st_size for path in tars) / 1e9)
    if not args.s3_only:
        tell_of_all(tell, args, tars)
    if args.s3_tars:
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            tell(s3=from_s3(tars[: args.s3_tars], pathlib.Path(scratch), args.s3_steps))
    print(json.dumps(told))


def tell_of_all(
    tell: Callable[..., None], args: argparse.Namespace, tars: list[pathlib.Path]
) -> None:
    """Tells of all tars, here."""
    index, copy = args.folder / "index", args.folder / "copy"
    rated = tars[: args.rated_tars]
    tell(rates=rates(rated, len(rated) * args.pairs // args.tars))
    tell(whole_index_seconds=spent(lambda: imported(tars, index, False, True)))
    imported(tars, copy, False, False)
    tell(same=same(str(index), str(copy)))
    tell(batches=batches(str(index), str(copy), args.seconds, args.repeats))


if __name__ == "__main__":
    main()
