"""Pictures of an index that look alike: duplicates and clusters."""

import time
import tracemalloc

import numpy as np
import pytest
import scipy.cluster.vq
import scipy.sparse.csgraph
from test_search import clustered

from coca_jax.apps.search import groups, nearest
from coca_jax.runtime import progress


class Pictures:
    """An index of given embeddings."""

    def __init__(self, x: np.ndarray):
        self.embeddings, self.nearest = x.astype(np.float16), nearest.Exact(x.astype(np.float16))


def test_duplicates_are_joined_by_chains_of_pairs():
    angles = np.radians([0, 4, 8, 90, 91, 180])
    x = np.stack([np.cos(angles), np.sin(angles)], 1)
    near = float(np.cos(np.radians(5)))  # 0 and 8 degrees are joined by 4
    assert groups.duplicates(Pictures(x), near) == [[0, 1, 2], [3, 4]]
    assert groups.duplicates(Pictures(x[:0]), near) == []
    with pytest.raises(ValueError, match="--threshold=1.5"):
        groups.duplicates(Pictures(x), 1.5)


def test_equal_pictures_are_duplicates_at_the_threshold_1(tmp_path):
    x = clustered(500, 64)
    twins = Pictures(np.concatenate([x, x]))
    assert groups.duplicates(twins, 1.0) == [[row, row + 500] for row in range(500)]
    pytest.importorskip("usearch", reason="needs the extra 'search'")
    nearest.build(twins.embeddings, str(tmp_path))
    twins.nearest = nearest.open_nearest(twins.embeddings, str(tmp_path))
    assert len(groups.duplicates(twins, 1.0)) >= 495


def test_duplicates_of_many_equal_pictures_keep_no_list_of_pairs():
    same = Pictures(np.full((5000, 4), 0.5))
    tracemalloc.start()
    assert groups.duplicates(same, 0.95) == [[*range(5000)]]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100 << 20  # their 12 million pairs are 200 MiB


def test_duplicates_of_a_large_index_are_joined_in_one_pass_and_told(monkeypatch, capfd):
    """To join some goes through all rows: at each 1,024 pictures, ten million took minutes."""
    count, calls = 40_000, []
    twins = Pictures(np.random.default_rng(0).standard_normal((count, 8)))
    twins.embeddings[count // 2 :: 10] = twins.embeddings[: count // 2 : 10]
    near = np.arange(count)
    near[: count // 2 : 10] += count // 2
    at = iter(range(0, count, 1024))
    twins.nearest = lambda queries, k: (None, near[(start := next(at)) : start + 1024, None])
    really = scipy.sparse.csgraph.connected_components
    monkeypatch.setattr(
        scipy.sparse.csgraph,
        "connected_components",
        lambda graph, **how: calls.append(graph.nnz) or really(graph, **how),
    )
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    found = groups.duplicates(twins, 0.9999, progress=True)
    assert found == [[row, row + count // 2] for row in range(0, count // 2, 10)]
    assert calls == [2000]
    assert "duplicates: 1,024 of 40,000 pictures in 00:0" in capfd.readouterr().err


def test_clusters_are_the_groups_that_there_are():
    rng = np.random.default_rng(1)
    centres = np.linalg.qr(rng.normal(size=(8, 8)))[0][:3]
    sizes = (30, 20, 10)
    x = np.repeat(centres, sizes, 0) + 0.05 * rng.normal(size=(60, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = groups.clusters(Pictures(x), 3, seed=0)
    assert [sorted(one["rows"]) for one in found] == [
        [*range(30)],
        [*range(30, 50)],
        [*range(50, 60)],
    ]
    with pytest.raises(ValueError, match="--clusters=61 of 60"):
        groups.clusters(Pictures(x), 61, seed=0)


def test_hundreds_of_clusters_are_those_of_scipy_in_a_pass_each_to_begin_with():
    x = clustered(4000, 64)
    begun = time.process_time()
    assert len(groups.clusters(Pictures(x), 400, seed=0)) > 300
    assert time.process_time() - begun < 4  # by SciPy's own beginning 10 s and more
    whole = x[:500].astype(np.float32)
    for seed in range(5):
        _, chosen = scipy.cluster.vq.kmeans2(whole, 9, iter=50, minit="++", seed=seed)
        found = [sorted(one["rows"]) for one in groups.clusters(Pictures(whole), 9, seed)]
        wanted = [np.flatnonzero(chosen == number).tolist() for number in range(9)]
        assert found == sorted(filter(None, wanted), key=len, reverse=True)
    same = groups.clusters(Pictures(np.full((4, 2), 0.5**0.5)), 3, 0)
    assert [sorted(one["rows"]) for one in same] == [[0, 1, 2, 3]]


def test_clusters_hold_no_distance_of_every_picture_from_every_centre():
    x = Pictures(clustered(8000, 8))
    tracemalloc.start()
    groups.clusters(x, 1000, seed=0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 24 << 20  # all distances are 31 MiB, and of a million pictures 4 GB
