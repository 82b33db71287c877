"""Simulated annealing: operations of the critical path move within their ranks' orders.

rank 0 │ 0F0 0F1 ····0I0 0W0 ...        only a move on the path of operations without slack, from the start to the
rank 1 │     1F0 1F1 1I0 1W0 ...        end of the schedule, can shorten it: here 0F0 1F0 1F1 1I0 0I0 ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stretto.schedule.compiled import compiled
from stretto.schedule.synthesize.placing import INFINITE, SLACK
from stretto.schedule.synthesize.timing import Desk, desk_for, keeps, retime

if TYPE_CHECKING:
    from stretto.schedule.synthesize.tables import Symbols, Tables

NEAR, KINDS_OF_MOVE = 10, 16
"""Of 16 moves, 10 go one place to the left or right, the others 2 to 9."""
FARTHEST = 8


class Cooling(NamedTuple):
    """How a run of moves accepts what is longer."""

    tries: int
    """Moves."""
    hot: float
    """Temperature at the first move, in the costs' unit of time."""
    cold: float
    """At the last."""
    seed: int


class Path(NamedTuple):
    """Where the operations of the critical path stand."""

    rank: Symbols
    position: Symbols
    standing: Symbols
    """Position of every operation, on and off the path (3 S M,)."""


@compiled
def anneal(tables: Tables, order: Symbols, cooling: Cooling) -> float:
    """Try moves; returns the best makespan and leaves its orders in ``order``."""
    desk = desk_for(tables)
    total = len(desk.end)
    path = Path(np.zeros(total, np.int64), np.zeros(total, np.int64), np.zeros(total, np.int64))
    current = order.copy()
    best = now = retime(tables, current, desk)
    state = np.uint64(cooling.seed * 2 + 1)
    steps = 0
    for turn in range(cooling.tries):
        if steps == 0:
            steps = trace(tables, current, desk, path)
        state, pick = draw(state, steps)
        state, kind = draw(state, KINDS_OF_MOVE)
        state, reach = draw(state, FARTHEST)
        far = 1 if kind < NEAR else 2 + reach
        rank, source = path.rank[pick], path.position[pick]
        target = source + (far if kind % 2 == 0 else -far)
        if target < 0 or target >= tables.length[rank] or current[rank, target] == current[rank, source]:
            continue
        move(current, rank, source, target)
        makespan = retime(tables, current, desk) if keeps(tables, current, rank) else INFINITE
        accept = makespan <= now
        if not accept and makespan < INFINITE:
            temperature = cooling.hot * (cooling.cold / cooling.hot) ** (turn / cooling.tries)
            state, chance = draw(state, 1 << 30)
            accept = chance < (1 << 30) * np.exp((now - makespan) / temperature)
        if accept:
            now = makespan
            steps = 0
            if makespan < best - SLACK:
                best = makespan
                order[:, :] = current
        else:
            move(current, rank, target, source)
    return best


@compiled
def draw(state: np.uint64, below: int) -> tuple[np.uint64, int]:
    """Next state of a linear congruential generator (Knuth's MMIX), and a number from 0 up."""
    state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
    return state, int((state >> np.uint64(33)) % np.uint64(below))


@compiled
def move(order: Symbols, rank: int, source: int, target: int) -> None:
    """Take a rank's operation out of one place and put it into another."""
    symbol = order[rank, source]
    step = 1 if target > source else -1
    for position in range(source, target, step):
        order[rank, position] = order[rank, position + step]
    order[rank, target] = symbol


@compiled
def trace(tables: Tables, order: Symbols, desk: Desk, path: Path) -> int:
    """Fill in the critical path of orders that have just been timed; returns its length."""
    rank_of, length, microbatches = tables.rank_of, tables.length, tables.microbatches
    end, cause, done = desk.end, desk.cause, desk.done
    on_rank, at, standing = path
    done[:] = 0
    last = -1
    for rank in range(len(length)):
        for position in range(length[rank]):
            symbol = order[rank, position]
            row = symbol * microbatches + done[symbol]
            standing[row] = position
            done[symbol] += 1
            if last < 0 or end[row] > end[last]:
                last = row
    steps = 0
    while last >= 0:
        on_rank[steps] = rank_of[last // microbatches % len(rank_of)]
        at[steps] = standing[last]
        steps += 1
        last = cause[last]
    return steps
