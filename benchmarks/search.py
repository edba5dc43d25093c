"""Search measured: exact and by a graph (HNSW), against drawn vectors of width 512.

    python benchmarks/search.py --vectors=100000 --exact
    python benchmarks/search.py --vectors=1000000 --out=/tmp/million

Prints a line of JSON: milliseconds of a query by the clock and of a core; of a graph also its
recall of ten, build time and size.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import time
from typing import Any

import numpy as np

WIDTH = 512
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

    drawn = Clustered()
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


def exact(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a query, and of numpy's product alone."""
    from coca_jax.apps.search import nearest

    x = Clustered().draw(args.vectors, 1)
    queries, float32 = Clustered().draw(50, 2).astype(np.float32), x.astype(np.float32)
    search, told = nearest.Exact(x), dict(vectors=args.vectors)
    search(queries[:1], 10)  # converts them once
    for name, call in (("search", search), ("numpy", lambda query, k: float32 @ query[0])):
        took = []
        for query in queries:
            start = time.perf_counter()
            call(query[None], 10)
            took.append(1000 * (time.perf_counter() - start))
        told[f"{name}_ms"] = round(float(np.median(took)), 2)
    return told


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--exact", action="store_true", help="compare with all of them")
    parser.add_argument("--out", help="folder of the index; one that is there is asked")
    args = parser.parse_args()
    if not args.exact and not args.out:
        parser.error("give --out=FOLDER or --exact")
    print(json.dumps(exact(args) if args.exact else graph(args)))


if __name__ == "__main__":
    main()
