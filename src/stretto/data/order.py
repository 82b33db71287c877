"""Which sample comes when: a pure function of (seed, global sample index).

Nothing is shuffled and stored.  The permutation of an epoch is a Feistel network over the pairs
(left, right) of a grid a x b that just holds the samples; numbers that fall outside are sent through
again until they land inside (cycle walking).  Each half-round adds a hash of the one half to the other,
which can be undone, so the whole is a bijection whatever the hash is (Luby and Rackoff 1988; Black and
Rogaway 2002 for the walking).

    sample index ──► (left, right) ──► left += h(right) ──► right += h(left) ──► ... ──► inside? ──► sample

A blend deals the indices out to its sources in a fixed pattern of one period, so that each source gets its
exact share in every period, and the question "which sample of which source is number n" is one division.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from stretto.spec.errors import ConfigError

HALF_ROUNDS = 8
"""Half-rounds of the network; four are a pseudorandom permutation in theory, eight leave no visible order."""
LONGEST_PERIOD = 4096
"""Weights that aren't fractions over at most this number are rounded to multiples of one over it."""


def mix(value: np.ndarray) -> np.ndarray:
    """A hash of uint64 to uint64, bijective (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def keyed(*numbers: int | np.ndarray) -> np.ndarray:
    """A uint64 hash of several integers or arrays of them, order mattering; arrays are broadcast."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        if isinstance(number, int):
            number = np.array([number & (2**64 - 1)], dtype=np.uint64)
        state = mix((state ^ number.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return state


def permute(indices: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a permutation of ``range(size)`` sends each index.

    ``indices`` int64 [n] in ``range(size)``; ``key`` uint64 [n] or [1] names the permutation of each.
    """
    if size < 2:
        return indices.copy()
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    key = np.broadcast_to(key, indices.shape)
    result = _network(indices.astype(np.uint64), (a, b), key)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        walked = _network(result[outside], (a, b), key[outside])
        result[outside] = walked
        outside = outside[walked >= size]
    return result.astype(np.int64)


def _network(values: np.ndarray, grid: tuple[int, int], key: np.ndarray) -> np.ndarray:
    a, b = np.uint64(grid[0]), np.uint64(grid[1])
    left: np.ndarray = values // b
    right: np.ndarray = values % b
    for turn in range(HALF_ROUNDS):
        step = np.uint64(turn << 40)  # far from the small numbers that left and right are
        if turn % 2 == 0:
            left = (left + mix((key ^ right) + step) % a) % a
        else:
            right = (right + mix((key ^ left) + step) % b) % b
    return left * b + right


def shares(weights: Sequence[float]) -> list[int]:
    """How many samples of a period each source gives.

    Exact for weights in the ratio of small integers, else to one part in LONGEST_PERIOD; at least one each.

    >>> shares([0.75, 0.25]), shares([1, 1, 2])
    ([3, 1], [1, 1, 2])
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"A source can't have weight {weight}; weights are positive numbers, relative to each other."
            )
    parts = [Fraction(weight).limit_denominator(10**6) or Fraction(1, 10**6) for weight in weights]
    total = sum(parts)
    period = math.lcm(*((part / total).denominator for part in parts))
    if period > LONGEST_PERIOD:
        period = max(LONGEST_PERIOD, len(weights))
    exact = [part / total * period for part in parts]
    counts = [max(1, math.floor(value)) for value in exact]
    by_need = sorted(range(len(parts)), key=lambda i: (counts[i] - exact[i], i))
    for place in range(period - sum(counts)):
        counts[by_need[place % len(parts)]] += 1
    return counts


class Order:
    """The order of one split: ``sizes[s]`` samples in source ``s``, drawn in the ratio of ``weights``."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int) -> None:
        assert len(sizes) == len(weights) and all(size > 0 for size in sizes)
        self.sizes = tuple(sizes)
        self.seed = seed
        counts = np.array(shares(weights), dtype=np.int64)
        # Each source's turns are spread evenly over the period: its j-th comes at (j + 1/2) / count.
        source = np.repeat(np.arange(len(counts)), counts)
        turn = np.concatenate([np.arange(count) for count in counts])
        spread = np.lexsort((source, (turn + 0.5) / counts[source]))
        self.pattern, self.turn, self.counts = source[spread], turn[spread], counts

    def samples_at(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source [n] and sample within the source [n] of each global sample index (int64 [n])."""
        period, place = np.divmod(indices, len(self.pattern))
        source = self.pattern[place]
        ordinal = period * self.counts[source] + self.turn[place]
        sample = np.empty_like(ordinal)
        for number, size in enumerate(self.sizes):
            mine = np.flatnonzero(source == number) if len(self.sizes) > 1 else slice(None)
            epoch, index = np.divmod(ordinal[mine], size)
            sample[mine] = permute(index, size, keyed(self.seed, number, epoch))
        return source, sample

    def sample_at(self, index: int) -> tuple[int, int]:
        """(source, sample) of one global sample index."""
        source, sample = self.samples_at(np.array([index], dtype=np.int64))
        return int(source[0]), int(sample[0])
