"""Timing of given orders: every operation as early as its rank and what it needs allow.

Orders are rows of symbols per rank, as in ``placing``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stretto.schedule.compiled import compiled
from stretto.schedule.synthesize.placing import INFINITE, ROUNDING

if TYPE_CHECKING:
    from stretto.schedule.synthesize.tables import Symbols, Tables, Values


class Desk(NamedTuple):
    """Room to work in, made once for many timings."""

    end: Values
    """End of each operation, by symbol * M + micro-batch (3 S M,)."""
    cause: Symbols
    """Operation whose end let each one start, -1 at time 0 (3 S M,)."""
    stack: Symbols
    """Ranks that may be able to go on (R,)."""
    stacked: Symbols
    """Whether a rank is among them (R,)."""
    at: Symbols
    """Position of each rank in its order (R,)."""
    done: Symbols
    """Occurrences of each symbol so far (3 S,)."""


@compiled
def desk_for(tables: Tables) -> Desk:
    """Room for a problem's timings."""
    symbols, ranks = 3 * len(tables.rank_of), len(tables.length)
    total = symbols * tables.microbatches
    integers = [np.zeros(size, dtype=np.int64) for size in (total, ranks, ranks, ranks, symbols)]
    return Desk(np.zeros(total), integers[0], integers[1], integers[2], integers[3], integers[4])


@compiled
def retime(tables: Tables, order: Symbols, desk: Desk) -> float:
    """Makespan of orders, INFINITE where they can't finish.  Fills the desk's ``end`` and ``cause``."""
    rank_of, _, length, duration, comm, _, _, _, microbatches = tables
    end, cause, stack, stacked, at, done = desk
    ranks, stages = len(length), len(rank_of)
    done[:] = 0
    at[:] = 0
    stacked[:] = 1
    for rank in range(ranks):
        stack[rank] = rank
    height = ranks
    makespan = 0.0
    left = length.sum()
    while height > 0:
        height -= 1
        rank = stack[height]
        stacked[rank] = 0
        last, free = -1, 0.0
        if at[rank] > 0:
            symbol = order[rank, at[rank] - 1]
            last = symbol * microbatches + done[symbol] - 1
            free = end[last]
        while at[rank] < length[rank]:
            symbol = order[rank, at[rank]]
            kind, stage = symbol // stages, symbol % stages
            m = done[symbol]
            giver, reader, latency = -1, -1, 0.0
            if kind > 0 and done[symbol - stages] <= m:
                break
            if kind < 2 and (stage > 0 if kind == 0 else stage < stages - 1):
                giver, latency = (symbol - 1, comm[stage - 1]) if kind == 0 else (symbol + 1, comm[stage])
            if giver >= 0 and done[giver] <= m:
                break
            why = last
            if giver >= 0 and end[giver * microbatches + m] + latency > free:
                why = giver * microbatches + m
                free = end[why] + latency
            last = symbol * microbatches + m
            free += duration[kind, stage]
            end[last] = free
            cause[last] = why
            done[symbol] = m + 1
            at[rank] += 1
            left -= 1
            if kind == 0 and stage < stages - 1:
                reader = rank_of[stage + 1]
            elif kind == 1 and stage > 0:
                reader = rank_of[stage - 1]
            if reader >= 0 and reader != rank and stacked[reader] == 0:
                stacked[reader] = 1
                stack[height] = reader
                height += 1
        makespan = max(makespan, free)
    return makespan if left == 0 else INFINITE


@compiled
def keeps(tables: Tables, order: Symbols, rank: int) -> bool:
    """Whether a rank's order keeps F before I before W on each stage, and its memory within the limit."""
    rank_of, _, length, _, _, activation, act_w, limit, _ = tables
    stages = len(rank_of)
    done = np.zeros(3 * stages, dtype=np.int64)
    used = 0.0
    for position in range(length[rank]):
        symbol = order[rank, position]
        kind, stage = symbol // stages, symbol % stages
        done[symbol] += 1
        if kind == 0:
            used += activation[stage]
            if used > limit[rank] + ROUNDING:
                return False
        else:
            if done[symbol] > done[symbol - stages]:
                return False
            used -= activation[stage] * (1 - act_w[stage] if kind == 1 else act_w[stage])
    return True
