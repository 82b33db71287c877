"""Schedules in an arbitrary order: nothing but the arrows is respected.

At each turn any operation whose needs are met may come next, so that whatever a family would never do
(every W at the end, a backward that overtakes another, ranks that drift apart) is played as well.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from stretto.schedule.op import Kind, Op
from stretto.schedule.schedule import Schedule

Key = tuple[Kind, int, int]

PLACEMENTS: dict[str, list[tuple[int, ...]]] = {
    "loop2": [(0, 1, 0, 1)],
    "v2": [(0, 1, 1, 0)],
    "w2": [(0, 1, 1, 0, 0, 1, 1, 0)],
    "voices2": [(0, 1), (1, 0)],
    "folded2": [(0, 1, 1, 0), (1, 0, 0, 1)],
    "uneven2": [(0, 0, 0, 1)],
    "v4": [(0, 1, 2, 3, 3, 2, 1, 0)],
    "voices4": [(0, 1, 2, 3), (3, 2, 1, 0)],
    "same4": [(0, 1, 2, 3), (0, 2, 1, 3)],
    "scattered4": [(2, 0, 3, 0, 1, 1, 2)],
    "idle3": [(0, 2, 2, 0)],
    "v8": [(*range(8), *range(7, -1, -1))],
    "voices8": [tuple(range(8)), tuple(range(7, -1, -1))],
}
"""Placements by name; the last character is the number of ranks."""


def any_order(
    name: str, *, microbatches: int, seed: int, recompute: bool = False, vocabulary: bool = False
) -> Schedule:
    """A schedule on a placement, in an order that ``seed`` decides; about half of its backwards are split.

    Where ``recompute``, about half of them have an R; where ``vocabulary``, the ranks have S and T.
    """
    placement, choose = PLACEMENTS[name], random.Random(seed)
    stages, ranks = len(placement[0]), int(name[-1])
    voice = [m % len(placement) for m in range(microbatches)]
    split = {(s, m): choose.random() < 0.5 for s in range(stages) for m in range(microbatches)}
    needs: dict[Key, list[Key]] = {}
    for (s, m), is_split in split.items():
        needs[Kind.F, s, m] = [(Kind.F, s - 1, m)] if s else []
        back = Kind.I if is_split else Kind.B
        needs[back, s, m] = [(Kind.F, s, m)]
        if s + 1 < stages:
            needs[back, s, m].append((Kind.I if split[s + 1, m] else Kind.B, s + 1, m))
        if recompute and choose.random() < 0.5:
            needs[Kind.R, s, m] = [(Kind.F, s, m)]
            needs[back, s, m].append((Kind.R, s, m))
        if is_split:
            needs[Kind.W, s, m] = [(Kind.I, s, m)]
    if vocabulary:
        for m in range(microbatches):
            first = (Kind.I if split[stages - 1, m] else Kind.B, stages - 1, m)
            _score(needs, first, holder=placement[voice[m]][-1], ranks=ranks, early=choose.random() < 0.5)
        for kind in (Kind.S, Kind.T):  # each in an order of its own that all ranks share
            order = choose.sample(range(microbatches), microbatches)
            for before, m in pairwise(order):
                for rank in range(ranks):
                    needs[kind, rank, m].append((kind, rank, before))
    orders: list[list[Op]] = [[] for _ in range(ranks)]
    for kind, s, m in _drawn(needs, choose):
        rank = s if kind in (Kind.S, Kind.T) else placement[voice[m]][s]
        orders[rank].append(Op(kind, stage=s, microbatch=m))
    return Schedule.from_orders(
        orders,
        name=f"{name}, any order {seed}",
        num_stages=stages,
        num_microbatches=microbatches,
        placement=placement,
        voice=voice,
    )


def _score(needs: dict[Key, list[Key]], first: Key, *, holder: int, ranks: int, early: bool) -> None:
    """S and T of a micro-batch whose first backward runs on ``holder``; ``early``: by algorithm 2."""
    _, last, m = first
    sums = [(Kind.S, rank, m) for rank in range(ranks)]
    for rank in range(ranks):
        needs[Kind.S, rank, m] = [(Kind.F, last, m)]
        needs[Kind.T, rank, m] = list(sums)
    if early:
        needs[first] += sums
        needs[Kind.T, holder, m].append(first)
    else:
        needs[first] += [(Kind.T, rank, m) for rank in range(ranks)]


def _drawn(needs: dict[Key, list[Key]], choose: random.Random) -> Sequence[Key]:
    """One order of everything in which nothing precedes what it needs."""
    done: list[Key] = []
    seen: set[Key] = set()
    waiting = list(needs)
    while waiting:
        ready = [key for key in waiting if seen.issuperset(needs[key])]
        done.append(choose.choice(ready))
        seen.add(done[-1])
        waiting.remove(done[-1])
    return done
