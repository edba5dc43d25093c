"""Search measured: a graph of a million vectors; embedding beside open_clip's loop; kills.

    python benchmarks/search.py graph --vectors=1000000 --out=/tmp/million
    taskset -c 0 python benchmarks/search.py embed FOLDER --count=512
    python benchmarks/search.py kills FOLDER --checkpoint=runs/demo

Each prints a line of JSON at last. `embed` and `kills` take a folder of JPEGs.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

WIDTH = 512
BATCH = 64
FEW = 64  # pictures of the short run, whose start is taken off the long one's
QUERIES = 1000
_AT_ONCE = 50_000


class Clustered:
    """Vectors as encoders give them: 20,000 clusters of 500 kinds, variances that fall as 1/i over
    the axes, a common direction. Neighbours of rank 1, 10 and 1000 among 200,000 have cosines of
    about 0.84, 0.78 and 0.59."""

    def __init__(self, kinds: int = 500, clusters: int = 20_000):
        rng = np.random.default_rng(0)
        sizes = np.arange(1, WIDTH + 1) ** -0.5
        self.sizes = (sizes / np.linalg.norm(sizes)).astype(np.float32)
        self.turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
        self.common = (0.8 * rng.normal(size=WIDTH) / WIDTH**0.5).astype(np.float32)
        of_kind = rng.normal(size=(kinds, WIDTH)).astype(np.float32)[
            rng.integers(0, kinds, clusters)
        ]
        own = rng.normal(size=(clusters, WIDTH)).astype(np.float32)
        self.centres = (0.7 * of_kind + 0.5 * own) * self.sizes
        shares = np.arange(1, clusters + 1) ** -0.5  # a few are large
        self.until = np.cumsum(shares / shares.sum())

    def draw(self, count: int, seed: int) -> np.ndarray:
        """float16 [count, WIDTH], unit length."""
        rng, found = np.random.default_rng(seed), np.empty((count, WIDTH), np.float16)
        for start in range(0, count, _AT_ONCE):
            size = min(_AT_ONCE, count - start)
            of = np.searchsorted(self.until, rng.random(size)).clip(0, len(self.until) - 1)
            x = self.centres[of] + 0.6 * self.sizes * rng.standard_normal((size, WIDTH), np.float32)
            found[start : start + size] = unit(x @ self.turn + self.common)
        return found


class Uniform:
    """Vectors without any structure, on which no graph does well."""

    def draw(self, count: int, seed: int) -> np.ndarray:
        """As of `Clustered`."""
        rng, found = np.random.default_rng(seed), np.empty((count, WIDTH), np.float16)
        for start in range(0, count, _AT_ONCE):
            size = min(_AT_ONCE, count - start)
            found[start : start + size] = unit(rng.standard_normal((size, WIDTH), np.float32))
        return found


def unit(x: np.ndarray) -> np.ndarray:
    """[N, E] at unit length."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def texts(pictures: np.ndarray) -> np.ndarray:
    """Queries as texts are: off to one side of the pictures, and further from each of them."""
    rng = np.random.default_rng(5)
    aside, noise = rng.standard_normal((1, WIDTH)), rng.standard_normal((len(pictures), WIDTH))
    return unit(0.4 * pictures + 0.5 * unit(aside) + 0.7 * unit(noise)).astype(np.float32)


def graph(args: argparse.Namespace) -> dict[str, Any]:
    """Builds an index by the package's own code, and asks it, a query at a time."""
    from coca_jax.apps.search import embed, index, nearest
    from coca_jax.apps.search.parts import Parts, Row

    drawn = dict(clustered=Clustered, uniform=Uniform)[args.kind]()
    parts, count = Parts(args.out), args.vectors
    if not parts.about:
        x = drawn.draw(count, 1)
        about = dict(version=embed.VERSION, model="0" * 64, checkpoint="none", width=WIDTH)
        parts.begin(about)
        for start in range(0, count, embed.PART):
            rows = x[start : start + embed.PART].astype(np.float32)
            names = [Row(f"photos/{start + i:07d}.jpg", "") for i in range(len(rows))]
            parts.write("drawn", rows, names, {}, start + len(rows) == count)
    wall, spent = time.perf_counter(), time.process_time()
    nearest.build(parts.embeddings(), args.out)
    told: dict[str, Any] = dict(
        kind=args.kind,
        vectors=count,
        build_seconds=time.perf_counter() - wall,
        build_core_seconds=time.process_time() - spent,
        graph_mb=(pathlib.Path(args.out) / nearest.FILE).stat().st_size / 1e6,
    )
    opened = time.perf_counter()
    made = index.Index(args.out)
    told["open_seconds"] = time.perf_counter() - opened
    embed = drawn.draw(QUERIES, 2).astype(np.float32)
    for name, queries in (("pictures", embed), ("texts", texts(drawn.draw(QUERIES, 3)))):
        told[name] = asked(made, np.asarray(queries, np.float32), nearest.Exact(made.embeddings))
    told["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return told


def asked(made: Any, queries: np.ndarray, exact: Any) -> dict[str, float]:
    """Recall of ten finds, and milliseconds of a query: by the clock, and of a core."""
    made.search(queries[0], 10)  # the first reads the file
    wall, spent, hits = [], [], 0
    truth = exact(queries, 10)[1]
    for query, true in zip(queries, truth):
        start, used = time.perf_counter(), time.process_time()
        found = made.search(query, 10)
        spent.append(1000 * (time.process_time() - used))
        wall.append(1000 * (time.perf_counter() - start))
        hits += len({one["row"] for one in found} & set(true.tolist()))
    found = dict(recall=100 * hits / truth.size)
    for name, values in (("wall", wall), ("core", spent)):
        found |= {f"{name}_p{p}_ms": float(np.percentile(values, p)) for p in (50, 99)}
    return found


def subset(folder: str, count: int, out: pathlib.Path) -> pathlib.Path:
    """A folder of the first `count` files, as links."""
    out.mkdir()
    names = sorted(pathlib.Path(folder).glob("*.jpg"))[:count]
    if len(names) < count:
        raise SystemExit(f"{folder}: {len(names)} JPEGs, {count} are wanted")
    for name in names:
        os.link(name, out / name.name)
    return out


def index_command(folder: pathlib.Path, checkpoint: str, out: pathlib.Path) -> list[str]:
    command = [sys.executable, "-m", "coca_jax", "search", "index", str(folder)]
    return [*command, f"--checkpoint={checkpoint}", f"--out={out}", f"--batch_size={BATCH}"]


def embed(args: argparse.Namespace) -> dict[str, Any]:
    """`search index` and open_clip's loop over the same files, both by the seconds of all their
    processes' cores. Ours: a long run less a short one, so that neither start counts."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        place = pathlib.Path(scratch)
        model, preprocess = random_peer()
        weights = place / "weights"
        write_weights(model, weights)
        many, few = (subset(args.folder, n, place / f"jpegs{n}") for n in (args.count, FEW))
        rounds = []
        for number in range(args.rounds):
            spent = {
                folder: children(index_command(folder, str(weights), place / f"{number}{n}"))
                for n, folder in enumerate((few, many))
            }
            ours = spent[many] - spent[few]
            peers = [loop(model, preprocess, few, many, workers) for workers in (0, 1)]
            rounds.append(
                dict(ours=(args.count - FEW) / ours, peer=(args.count - FEW) / min(peers))
            )
            print(rounds[-1], file=sys.stderr, flush=True)
        embedded = np.load(place / "01/img_emb/img_emb_0.npy").astype(np.float32)
        theirs = peer_embeddings(model, preprocess, many)
        cosine = float((embedded[: len(theirs)] * theirs).sum(1).min())
    best = {name: max(one[name] for one in rounds) for name in ("ours", "peer")}
    told = dict(count=args.count, rounds=rounds, least_cosine=cosine, **best)
    return told | dict(ratio=min(one["ours"] / one["peer"] for one in rounds))


def random_peer(name: str = "coca_ViT-B-32") -> tuple[Any, Any]:
    """(a CoCa of open_clip, its preprocessing), the same random weights each time."""
    import open_clip
    import torch

    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    with torch.no_grad():  # open_clip leaves this one as memory was found
        model.text_decoder.text_projection.normal_(std=0.02)
    return model.eval(), preprocess


def write_weights(model: Any, folder: pathlib.Path) -> None:
    """A folder as open_clip publishes it, of random weights."""
    import open_clip
    import torch

    folder.mkdir()
    about = dict(model_cfg=open_clip.get_model_config("coca_ViT-B-32"))
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")


def children(command: list[str]) -> float:
    """Seconds of all cores that a command takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def batches(preprocess: Any, folder: pathlib.Path, workers: int) -> Any:
    """open_clip's pictures, by torch's loader."""
    import torch
    from PIL import Image

    class Files(torch.utils.data.Dataset):
        names = sorted(folder.iterdir())

        def __len__(self) -> int:
            return len(self.names)

        def __getitem__(self, number: int) -> Any:
            return preprocess(Image.open(self.names[number]))

    return torch.utils.data.DataLoader(Files(), batch_size=BATCH, num_workers=workers)


def loop(model: Any, preprocess: Any, few: pathlib.Path, many: pathlib.Path, workers: int) -> float:
    """Seconds of all cores for the pictures of `many` beyond the number of `few`."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    spent = []
    for folder in (few, many):
        before = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        with torch.inference_mode():
            for images in batches(preprocess, folder, workers):
                model.encode_image(images, normalize=True).numpy()
        after = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        spent.append(
            sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after))
        )
    return spent[1] - spent[0]


def peer_embeddings(model: Any, preprocess: Any, folder: pathlib.Path) -> np.ndarray:
    """float32 [BATCH, E] of the first pictures."""
    import torch

    with torch.inference_mode():
        images = next(iter(batches(preprocess, folder, 0)))
        return model.encode_image(images, normalize=True).numpy()


def kills(args: argparse.Namespace) -> dict[str, Any]:
    """Runs `search index` undisturbed, then kills it so many times at moments that are drawn, and
    compares whatever comes to its end."""
    drawn = random.Random(args.seed)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        place = pathlib.Path(scratch)
        folder = pathlib.Path(args.folder)
        start = time.monotonic()
        children(index_command(folder, args.checkpoint, place / "calm"))
        whole, killed = time.monotonic() - start, 0
        parts: list[Any] = []
        out, same = place / "out", True
        command = index_command(folder, args.checkpoint, out)
        while killed < args.kills or parts[-1:] != ["whole"]:
            # Once all kills are spent it runs to its end.
            limit = drawn.uniform(0, whole) if killed < args.kills else None
            running = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                running.wait(limit)
                same = same and tree(place / "calm") == tree(out)
                parts.append("whole")
                shutil.rmtree(out)
            except subprocess.TimeoutExpired:
                running.send_signal(signal.SIGKILL)
                running.wait()
                killed += 1
                parts.append(len(list(out.glob("metadata/*.jsonl"))))
            print(f"kill {killed}: {parts[-1]} parts", file=sys.stderr, flush=True)
        count = len(list(folder.glob("*.jpg")))
    return dict(files=count, kills=killed, parts=parts, seconds=whole, same=same)


def tree(root: pathlib.Path) -> dict[str, bytes]:
    """Every file's bytes by its name."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    ways = parser.add_subparsers(required=True)
    one = ways.add_parser("graph")
    one.add_argument("--vectors", type=int, default=1_000_000)
    one.add_argument("--kind", choices=("clustered", "uniform"), default="clustered")
    one.add_argument("--out", required=True, help="folder of the index; one that is there is asked")
    one.set_defaults(run=graph)
    one = ways.add_parser("embed")
    one.add_argument("folder")
    one.add_argument("--count", type=int, default=5000)
    one.add_argument("--rounds", type=int, default=1)
    one.add_argument("--scratch", default=None)
    one.set_defaults(run=embed)
    one = ways.add_parser("kills")
    one.add_argument("folder")
    one.add_argument("--checkpoint", required=True)
    one.add_argument("--kills", type=int, default=10)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--scratch", default=None)
    one.set_defaults(run=kills)
    args = parser.parse_args()
    print(json.dumps(args.run(args)))


if __name__ == "__main__":
    main()
