"""Documents placed on groups of ranks: everything is somewhere, memory holds, and the step is near its best time."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.planner.document_costs import Costs, Host
from stretto.planner.document_groups import Placement, assign, options
from stretto.spec.errors import ConfigError
from stretto.spec.sequence import group_sizes

COSTS = st.builds(
    Costs,
    pair=st.floats(0.001, 1.0),
    token=st.floats(0.01, 100.0),
    exchange=st.sampled_from([0.0, 1.0, 50.0]),
    window=st.sampled_from([None, 7]),
    host=st.sampled_from([None, Host(blocks=8, copy=0.0, ends=1.0), Host(blocks=4, copy=0.5)]),
    messages=st.sampled_from([None, None, {n: 40.0 / n for n in range(2, 9)}]),
)


def tail(seed: int, tokens: int, *, longest: int = 65536) -> list[int]:
    """Lengths of a long tail until there are ``tokens``."""
    draw, found = random.Random(seed), []
    while sum(found) < tokens:
        found.append(min(longest, max(64, round(draw.lognormvariate(math.log(2048), 1.4)))))
    return found


def work_of_ranks(placement: Placement, lengths: list[int], costs: Costs, ranks: int) -> list[float]:
    """Work of each rank, and proof that memory and micro-batches are as they should be."""
    times = [0.0] * ranks
    for piece in placement.pieces:
        for rank in range(piece.first, piece.first + piece.ranks):
            times[rank] += costs.time(lengths[piece.document], piece.ranks)
    return times


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), max_size=12),
    ranks=st.sampled_from([1, 2, 3, 4, 6, 7, 8]),
    costs=COSTS,
    memory=st.integers(60, 500),
)
def test_every_document_is_placed_once_and_fits(lengths: list[int], ranks: int, costs: Costs, memory: int) -> None:
    memory = max(memory, -(-max(lengths, default=1) // ranks))
    placement = assign(lengths, ranks, costs, memory_tokens=memory)
    assert [piece.document for piece in placement.pieces] == list(range(len(lengths)))
    held: dict[tuple[int, int], float] = {}
    groups: dict[tuple[int, int], tuple[int, int]] = {}
    for piece in placement.pieces:
        assert piece.ranks in group_sizes(ranks) and piece.first % piece.ranks == 0
        for rank in range(piece.first, piece.first + piece.ranks):
            at = rank, piece.micro_batch
            share = costs.host.kept(piece.away) if costs.host else 1.0
            held[at] = held.get(at, 0.0) - (-lengths[piece.document] // piece.ranks) * share
            # A micro-batch belongs to one group, and groups only become smaller from one to the next.
            assert groups.setdefault(at, (piece.first, piece.ranks)) == (piece.first, piece.ranks)
    assert all(tokens <= memory * (1 + 1e-9) for tokens in held.values())
    for rank in range(ranks):
        sizes = [size for (r, _), (_, size) in sorted(groups.items()) if r == rank]
        assert sizes == sorted(sizes, reverse=True)
        assert sorted(m for r, m in groups if r == rank) == list(range(len(sizes)))
    work = work_of_ranks(placement, lengths, costs, ranks)
    assert placement.times == pytest.approx(work)
    assert placement.makespan >= placement.lower_bound * (1 - 1e-9)
    assert assign(lengths, ranks, costs, memory_tokens=memory) == placement


def best_time(lengths: list[int], ranks: int, costs: Costs, memory: int) -> float:
    """The makespan of the best placement, by trying them all."""
    sizes = [[option.ranks for option in options(n, ranks, costs, memory)] for n in lengths]
    places = [[(first, size) for size in those for first in range(0, ranks, size)] for those in sizes]
    best = math.inf
    for chosen in itertools.product(*places):
        times = [0.0] * ranks
        for length, (first, size) in zip(lengths, chosen, strict=True):
            for rank in range(first, first + size):
                times[rank] += costs.time(length, size)
        best = min(best, max(times))
    return best


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4), costs=COSTS, memory=st.integers(100, 500))
def test_near_the_best_placement(lengths: list[int], costs: Costs, memory: int) -> None:
    placement = assign(lengths, 4, costs, memory_tokens=memory)
    best = best_time(lengths, 4, costs, memory)
    assert placement.lower_bound <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= placement.makespan <= 2.1 * best


def test_a_few_documents_are_mostly_placed_best() -> None:
    draw, ratios = random.Random(0), []
    for _ in range(40):
        lengths = [min(4000, max(8, round(draw.lognormvariate(5, 1.4)))) for _ in range(draw.randint(1, 4))]
        costs = Costs(pair=draw.choice([0.01, 0.1, 1]), token=draw.choice([1, 100]), exchange=draw.choice([0, 5, 50]))
        placement = assign(lengths, 4, costs, memory_tokens=1000)
        ratios.append(placement.makespan / best_time(lengths, 4, costs, 1000))
    assert max(ratios) <= 1.05 and sum(ratios) / len(ratios) <= 1.01


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_long_tails_are_balanced(seed: int) -> None:
    costs = Costs(pair=16384.0, token=4.03e8, exchange=1.0e8)
    lengths = tail(seed, 524288)
    placement = assign(lengths, 8, costs, memory_tokens=8192)
    assert placement.makespan <= 1.01 * placement.lower_bound
    assert min(piece.ranks for piece in placement.pieces) == 1


def test_long_documents_get_many_ranks_and_short_ones_one() -> None:
    costs = Costs(pair=1.0, token=100.0, exchange=50.0)
    placement = assign([4000, *[100] * 40], 8, costs, memory_tokens=1000)
    assert placement.pieces[0].ranks >= 4
    assert {piece.ranks for piece in placement.pieces[1:]} == {1}


def test_the_longest_needs_fewer_ranks_where_its_attention_hides_the_way_to_the_host() -> None:
    lengths, memory = [8000, *[500] * 30], 1000
    stays = Costs(pair=1.0, token=100.0, exchange=3000.0)
    free, slow = (replace(stays, host=Host(blocks=10, copy=copy)) for copy in (0.1, 1e6))
    at = [assign(lengths, 8, costs, memory_tokens=memory) for costs in (stays, free, slow)]
    assert [placement.pieces[0].ranks for placement in at] == [8, 2, 8]
    assert at[1].pieces[0].away == 8 and at[0] == at[2]
    assert at[1].makespan < at[0].makespan
    assert {piece.away for piece in at[1].pieces[1:]} == {0}, "what fits stays"
    # 3,000 tokens a rank must keep a third: 7 of 10 blocks go, while 8 are at work, if the copies take no longer.
    away = [replace(stays, host=Host(blocks=10, copy=copy)).away(6000, 2, memory) for copy in (110.0, 125.0)]
    assert away == [7, None]


def test_ranks_that_share_heads_are_as_many_as_can() -> None:
    costs = Costs(pair=1.0, token=100.0, messages={2: 30.0, 4: 20.0})
    lengths = [4000, *[100] * 40]
    placement = assign(lengths, 8, costs, memory_tokens=1000)
    assert placement.pieces[0].ranks == 4
    assert [option.ranks for option in options(4000, 8, costs, 1000)] == [4]
    with pytest.raises(ConfigError, match=r"fit on 4 ranks \(heads can't be .* of the 8\).* 1250, or set plan"):
        assign([5000], 8, costs, memory_tokens=1000)


def test_micro_batches_that_cost_much_are_few() -> None:
    lengths = tail(1, 60000, longest=8192)
    free = Costs(pair=1.0, token=100.0)
    dear = Costs(pair=1.0, token=100.0, micro_batch=1e7)
    counts = [assign(lengths, 8, costs, memory_tokens=8192).micro_batches for costs in (free, dear)]
    assert counts[1] <= counts[0]


def test_a_document_too_long_says_what_would_fit() -> None:
    with pytest.raises(ConfigError, match=r"4097 tokens doesn't fit on 4 ranks .* at least 1025"):
        assign([4097], 4, Costs(pair=1.0, token=1.0), memory_tokens=1024)
