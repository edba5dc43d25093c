"""Order: permutations, draws and the rows of a mixture."""

import numpy as np
import pytest

from coca_jax.data import order, texts

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
    found = order.indices(np.array([0, 99, 100, 250]), 100, seed=3, source=2)
    assert found.tolist() == [4, 78, 48, 54]
    assert order.key(0, np.arange(2), -1).tolist() == [13186015209599246682, 10842310226424321898]
    draws = order.uniform(order.key(1, np.arange(2)), 3)
    wanted = [[0.97176684, 0.42656881, 0.80620731], [0.60937517, 0.93813538, 0.74327508]]
    np.testing.assert_allclose(draws, wanted, atol=1e-8)
    for shares, rows in (([4, 4], "01010101"), ([6, 2], "00100010"), ([3, 2, 1], "010210")):
        assert "".join(map(str, order.rows(shares))) == rows


@pytest.mark.parametrize(
    "parts", [(), (0,), (-1, 7), (2**63 - 1, -(2**63)), tuple(b"a.tar/\xc3\xa4")]
)
def test_one_key_is_that_of_the_arrays(parts):
    assert [order.key_of(parts)] == order.key(*parts).tolist()


def test_seeds_sources_and_epochs_have_orders_of_their_own():
    def first(seed, source, epoch=0):
        return tuple(order.indices(np.arange(20) + 1000 * epoch, 1000, seed, source).tolist())

    found = {first(*parts) for parts in ((0, 0), (1, 0), (0, 1), (1, 1), (-1, 0), (0, 0, 1))}
    assert len(found) == 6


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


def test_captions_of_an_image_take_turns_by_chance_and_evenly():
    """Four captions over 8,000 visits: chi-square of three degrees of freedom below its 99.9%
    quantile, also of pairs of visits one after another (15 degrees)."""
    visits = np.arange(8_000)

    def draw(seed, source):
        return texts.choose_captions([list("abcd")] * 8_000, texts.Draw(seed, source, visits))

    found = draw(3, 1)
    numbers = np.array(["abcd".index(text) for text in found])
    for seen, cells, quantile in (
        (numbers, 4, 16.27),
        (numbers[::2] * 4 + numbers[1::2], 16, 37.70),
    ):
        even = len(seen) / cells
        assert ((np.bincount(seen, minlength=cells) - even) ** 2 / even).sum() < quantile
    assert found != draw(4, 1) and found != draw(3, 2)
    assert texts.choose_captions([["one"]] * 3, texts.Draw(3, 1, visits[:3])) == ["one"] * 3
