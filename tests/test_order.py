"""Order: permutations, draws and the rows of a mixture."""

import numpy as np
import pytest

from coca_jax.data import order

GOLDEN = [17, 6, 77, 88, 32, 66]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 64, 1000, 65_537])
def test_permute_is_a_bijection(size):
    found = order.permute(np.arange(size), size, order.key(3, 1, 4))
    assert np.array_equal(np.sort(found), np.arange(size))


def test_permutations_differ_and_look_random():
    size = 10_000
    a, b = (order.permute(np.arange(size), size, order.key(seed)) for seed in (0, 1))
    assert (a == b).mean() < 0.01
    assert abs(np.corrcoef(np.arange(size), a)[0, 1]) < 0.03
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.03


def test_permute_a_billion_without_building_it():
    found = order.permute(np.arange(1000), 10**9, order.key(5))
    assert len(set(found.tolist())) == 1000 and found.max() < 10**9


def test_indices_visit_each_example_once_an_epoch():
    found = order.indices(np.arange(3 * 101), 101, seed=7, source=2).reshape(3, 101)
    for epoch in found:
        assert np.array_equal(np.sort(epoch), np.arange(101))
    assert not np.array_equal(found[0], found[1])


def test_the_order_is_what_it_was():
    """A change of these numbers breaks the resume of every run: it must be on purpose."""
    assert order.indices(np.arange(6), 100, seed=0, source=0).tolist() == GOLDEN


def test_uniform_draws_are_independent():
    draws = order.uniform(order.key(1, np.arange(20_000)), 4)
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.var() - 1 / 12) < 0.002
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03


@pytest.mark.parametrize("shares", [[8], [4, 4], [6, 2], [1, 2, 5], [30, 1, 1]])
def test_rows_hold_exact_shares_everywhere(shares):
    rows = order.rows(shares)
    assert np.bincount(rows).tolist() == shares
    for source, share in enumerate(shares):
        seen = np.cumsum(rows == source)
        even = share * np.arange(1, len(rows) + 1) / len(rows)
        assert np.abs(seen - even).max() <= 1
