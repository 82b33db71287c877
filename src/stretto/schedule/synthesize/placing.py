"""List scheduling: a free rank runs the ready operation that has the least priority number.

An order is one row of symbols per rank: ``kind * S + stage`` with kind 0 for F, 1 for I, 2 for W.  The n-th
occurrence of a symbol works for micro-batch n: micro-batches are alike, so nothing is lost by running them in
turn on every stage.

Memory can't deadlock it.  F starts only where afterwards all micro-batches that hold memory on its rank could
still be finished, the oldest first, with what the ones before them give back (Dijkstra's banker):

    room for 3     held by micro-batch 0: 1 of 2   by 1: 1 of 2     F of 2?  0 takes the last place, gives back 2,
                                                                    1 and 2 follow: it may
                                                                    F of 3 then?  0 can't go on: it must wait
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stretto.schedule.compiled import compiled

if TYPE_CHECKING:
    from stretto.schedule.synthesize.tables import Symbols, Tables, Values

INFINITE = 1e300
"""A time that never comes."""
SLACK = 1e-9
"""Times closer than this count as equal."""
ROUNDING = 1e-7
"""Memory likewise."""


class Guidance(NamedTuple):
    """What chooses between operations that could run."""

    priority: Values
    """(3, S, M) for F, I, W; the least comes first."""
    release: Values
    """F does not start earlier (S, M)."""
    cap: Values
    """F of a stage may start while the stages up to it on its rank keep no more memory than this (S,).  Caps that
    rise from stage to stage by an activation each leave a place for every later stage, so nothing stands still."""
    patience: float
    """An operation of less priority number that is known to arrive within this fraction of the chosen one's
    duration is waited for."""


@compiled
def place(tables: Tables, guidance: Guidance, order: Symbols, end: Values) -> float:
    """Place all operations; returns the makespan.  Fills ``order`` (R, n) and ``end`` (3, S, M).

    One loop on local arrays, long as it is: handing tuples or many arrays to a function per operation takes
    compiled code ten times as long as the work itself.
    """
    rank_of, stages_on, _, duration, comm, activation, act_w, limit, microbatches = tables
    priority, release, cap, patience = guidance
    stages, ranks = len(rank_of), len(limit)
    done = np.zeros((3, stages), dtype=np.int64)
    used, room, claim = np.zeros(stages), limit.copy(), np.zeros(ranks)
    for stage in range(stages):
        claim[rank_of[stage]] += activation[stage]
    wake, free = np.zeros(ranks), np.zeros(ranks)
    count = np.zeros(ranks, dtype=np.int64)
    left = 3 * stages * microbatches
    makespan = 0.0
    while left > 0:
        rank = 0
        now = wake[0]
        for other in range(1, ranks):
            if wake[other] < now:
                rank, now = other, wake[other]
        if now >= INFINITE:
            return INFINITE
        best = later = soonest = later_at = INFINITE
        best_kind = best_stage = -1
        for chunk in range(stages_on.shape[1]):
            stage = stages_on[rank, chunk]
            if stage < 0:
                break
            for kind in range(3):
                m = done[kind, stage]
                if m >= (microbatches if kind == 0 else done[kind - 1, stage]) or priority[kind, stage, m] >= best:
                    continue
                at = release[stage, m] if kind == 0 else end[kind - 1, stage, m]
                if kind == 0 and stage > 0:
                    at = max(at, end[0, stage - 1, m] + comm[stage - 1]) if done[0, stage - 1] > m else INFINITE
                elif kind == 1 and stage < stages - 1:
                    at = max(at, end[1, stage + 1, m] + comm[stage]) if done[1, stage + 1] > m else INFINITE
                if at >= INFINITE:
                    continue
                if kind == 0 and not fits(rank, chunk, stages_on, done, used, room, claim, activation, act_w, cap):
                    continue
                if at <= now + SLACK:
                    best, best_kind, best_stage = priority[kind, stage, m], kind, stage
                else:
                    soonest = min(soonest, at)
                    if priority[kind, stage, m] < later:
                        later, later_at = priority[kind, stage, m], at
        if best_kind < 0:
            wake[rank] = soonest
            continue
        if later < best and later_at - now < patience * duration[best_kind, best_stage]:
            wake[rank] = later_at
            continue
        over = now + duration[best_kind, best_stage]
        end[best_kind, best_stage, done[best_kind, best_stage]] = over
        done[best_kind, best_stage] += 1
        order[rank, count[rank]] = best_kind * stages + best_stage
        count[rank] += 1
        left -= 1
        makespan = max(makespan, over)
        free[rank] = wake[rank] = over
        neighbour, at = -1, over
        if best_kind == 0:
            change = activation[best_stage]
            if best_stage < stages - 1:
                neighbour, at = best_stage + 1, over + comm[best_stage]
        elif best_kind == 1:
            change = activation[best_stage] * (act_w[best_stage] - 1)
            if best_stage > 0:
                neighbour, at = best_stage - 1, over + comm[best_stage - 1]
        else:
            change = -activation[best_stage] * act_w[best_stage]
        used[best_stage] += change
        room[rank] -= change
        if neighbour >= 0:
            holder = rank_of[neighbour]
            wake[holder] = min(wake[holder], max(free[holder], at))
    return makespan


@compiled
def fits(rank, chunk, stages_on, done, used, room, claim, activation, act_w, cap):  # type: ignore[no-untyped-def]
    """Whether memory admits the next F of a rank's chunk; arrays as in ``place``."""
    new = stages_on[rank, chunk]
    left = room[rank] - activation[new]
    if left < -ROUNDING:
        return False
    kept = activation[new]
    oldest, newest = done[0, new], done[0, new]
    for other in range(stages_on.shape[1]):
        stage = stages_on[rank, other]
        if stage < 0:
            break
        kept += used[stage]
        if other >= chunk and kept > cap[stage] + ROUNDING:
            return False
        oldest = min(oldest, done[2, stage])
        newest = max(newest, done[0, stage] - 1)
    if left >= claim[rank] - ROUNDING:
        return True
    for m in range(oldest, newest + 1):
        needs, holds = 0.0, 0.0
        for other in range(stages_on.shape[1]):
            stage = stages_on[rank, other]
            if stage < 0:
                break
            if m >= done[0, stage] and not (stage == new and m == done[0, new]):
                needs += activation[stage]
            elif m >= done[1, stage]:
                holds += activation[stage]
            elif m >= done[2, stage]:
                holds += activation[stage] * act_w[stage]
        if holds > 0 and needs > left + ROUNDING:
            return False
        left += holds
    return True
