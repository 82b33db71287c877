"""The order is a bijection per epoch, and blends keep their proportions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.data.order import LONGEST_PERIOD, Order, keyed, permute, shares
from stretto.spec.errors import ConfigError


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_hits_everything_once(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, keyed(seed)).tolist()) == list(range(size))


def test_permutations_look_random() -> None:
    size = 10_000
    there = permute(np.arange(size), size, keyed(1))
    assert abs(np.corrcoef(np.arange(size), there)[0, 1]) < 0.05
    assert (np.abs(np.diff(there)) < 10).mean() < 0.01
    # Where each of a few first indices goes, over many keys, is spread evenly.
    first = permute(np.zeros(20_000, dtype=np.int64), 10, keyed(7, np.arange(20_000)))
    assert np.bincount(first, minlength=10).min() > 1800


def test_huge_sizes_need_no_memory() -> None:
    size = 10**15 + 37
    there = permute(np.array([0, 1, size - 1]), size, keyed(3))
    assert len(set(there.tolist())) == 3 and there.min() >= 0 and there.max() < size


@given(st.integers(1, 200), st.integers(0, 10), st.integers(0, 3))
def test_every_sample_once_per_epoch(size: int, seed: int, epoch: int) -> None:
    _, sample = Order([size], [1.0], seed=seed).samples_at(np.arange(epoch * size, (epoch + 1) * size))
    assert sorted(sample.tolist()) == list(range(size))


def test_seeds_and_epochs_differ() -> None:
    epochs = Order([500], [1.0], seed=0).samples_at(np.arange(1000))[1].reshape(2, 500)
    other = Order([500], [1.0], seed=1).samples_at(np.arange(500))[1]
    assert (epochs[0] == epochs[1]).mean() < 0.05 and (epochs[0] == other).mean() < 0.05


def test_one_index_is_like_many() -> None:
    order = Order([10, 7], [3, 1], seed=5)
    source, sample = order.samples_at(np.arange(100))
    assert [order.sample_at(i) for i in range(100)] == list(zip(source.tolist(), sample.tolist(), strict=True))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 20))
def test_blends_are_exact_over_a_period(weights: list[int], period: int) -> None:
    order = Order([50] * len(weights), weights, seed=0)
    length = len(order.pattern)
    source, _ = order.samples_at(np.arange(period * length, (period + 1) * length))
    share = np.bincount(source, minlength=len(weights)) / length
    assert np.allclose(share, np.array(weights) / sum(weights), atol=1e-12)


def test_every_source_of_a_blend_is_read_once_per_its_epoch() -> None:
    order = Order([6, 9], [1, 2], seed=0)
    source, sample = order.samples_at(np.arange(27))
    seen = Counter(zip(source.tolist(), sample.tolist(), strict=True))
    assert all(seen[1, s] == 2 for s in range(9))  # 18 draws of 9
    assert sorted(seen[0, s] for s in range(6)) == [1, 1, 1, 2, 2, 2]  # 9 draws of 6


@given(st.integers(1, 30), st.integers(1, 30))
def test_turns_are_spread_over_the_period(one: int, two: int) -> None:
    source, _ = Order([5, 5], [one, two], seed=0).samples_at(np.arange(2 * (one + two)))
    drawn = np.cumsum(source == 0)
    assert np.abs(drawn - np.arange(1, len(drawn) + 1) * one / (one + two)).max() <= 1


def test_odd_weights_are_rounded_finely() -> None:
    counts = np.array(shares([2**0.5, 1, 1e-9]))
    assert counts.min() == 1 and abs(counts.sum() - LONGEST_PERIOD) <= 3
    assert abs(counts[0] / counts[1] - 2**0.5) < 2e-3


def test_weights_that_cannot_be() -> None:
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="weights are positive numbers"):
            shares([1.0, weight])
