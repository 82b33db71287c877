"""Polish a schedule: move operations of its critical path, keep what doesn't make it longer.

The critical path is a chain of operations from the end back to the start, each held up by the one before.  Where it
steps from one operation to the next on the same rank, that order is what costs time, and one of the two is moved
over a few others.  A move that makes nothing longer is kept even where it gains nothing, since the next
may gain by it (the classic neighbourhood of job-shop scheduling; van Laarhoven et al. 1992).
"""

from __future__ import annotations

import numpy as np

from stretto.schedule.compiled import compiled
from stretto.schedule.families.blocks.running import ROUNDING
from stretto.schedule.families.blocks.work import INFINITE

FARTHEST = 12
"""Operations that a move passes at most."""


@compiled
def polish(work, done, offsets, span_weight, rounds, seed, start):  # type: ignore[no-untyped-def]
    """Improve the order ``done`` in place; fills ``start`` (3, S, M) and returns the figure that was made small.

    Rank r's operations are ``done[offsets[r]]`` to ``done[offsets[r + 1]]``.  The figure is the makespan, or
    with ``span_weight`` above 0 that share of it is the largest time between a rank's first and last operation.
    """
    trial = np.zeros_like(start)
    where = np.zeros(len(done), dtype=np.int64)
    spots = np.zeros(len(done), dtype=np.int64)
    chance = np.full(1, seed, dtype=np.int64)
    best = retime(work, done, offsets, span_weight, start)
    for place in range(len(done)):
        where[done[place]] = place
    for _ in range(rounds):
        by_span = span_weight > 0 and _draw(chance, 2) == 0
        count = _critical(work, done, offsets, where, start, chance, spots, by_span)
        if count == 0:
            break
        spot = spots[_draw(chance, count)]
        rank = np.searchsorted(offsets, spot, side="right") - 1
        reach = 1
        while reach < FARTHEST and _draw(chance, 2) == 0:
            reach += 1
        if _draw(chance, 2) == 0:
            source, target = spot - 1, min(spot - 1 + reach, offsets[rank + 1] - 1)
        else:
            source, target = spot, max(spot - reach, offsets[rank])
        _move(done, source, target)
        figure = INFINITE
        if _may_stand(work, done, offsets, rank, source, target, start.shape[2]):
            figure = retime(work, done, offsets, span_weight, trial)
        if figure <= best * (1 + 1e-12):
            best = figure
            start[:] = trial
            for place in range(min(source, target), max(source, target) + 1):
                where[done[place]] = place
        else:
            _move(done, target, source)
    return best


@compiled
def retime(work, done, offsets, span_weight, start):  # type: ignore[no-untyped-def]
    """Run each rank's operations in exactly their order; the figure, or INFINITE where ranks wait in a circle."""
    _, stages, microbatches = start.shape
    ranks = len(offsets) - 1
    duration, comm = work.duration, work.comm  # taking an array out of a tuple costs more than what is done with it
    start[:] = -1.0
    position = offsets[:-1].copy()
    free = np.zeros(ranks)
    left = len(done)
    while left > 0:
        before = left
        for rank in range(ranks):
            while position[rank] < offsets[rank + 1]:
                op = done[position[rank]]
                kind, stage, micro = op // (stages * microbatches), op // microbatches % stages, op % microbatches
                at = _ready(duration, comm, start, kind, stage, micro)
                if at < 0:
                    break
                at = max(at, free[rank])
                start[kind, stage, micro] = at
                free[rank] = at + duration[kind, stage]
                position[rank] += 1
                left -= 1
        if left == before:
            return INFINITE
    span = 0.0
    for rank in range(ranks):
        op = done[offsets[rank]]
        begun = start[op // (stages * microbatches), op // microbatches % stages, op % microbatches]
        span = max(span, free[rank] - begun)
    return (1 - span_weight) * free.max() + span_weight * span


@compiled
def _ready(duration, comm, start, kind, stage, micro):  # type: ignore[no-untyped-def]
    """When an operation has what it needs, -1 where something of that hasn't run."""
    stages = start.shape[1]
    if kind == 2:
        given = start[1, stage, micro]
        return given + duration[1, stage] if given >= 0 else -1.0
    if kind == 1 and start[0, stage, micro] < 0:
        return -1.0
    giver = stage - 1 if kind == 0 else stage + 1
    if giver < 0:
        return 0.0
    if giver == stages:
        return start[0, stage, micro] + duration[0, stage]
    given = start[kind, giver, micro]
    return given + duration[kind, giver] + comm[min(giver, stage)] if given >= 0 else -1.0


@compiled
def _critical(work, done, offsets, where, start, chance, spots, by_span):  # type: ignore[no-untyped-def]
    """Places held up by the operation before them on their rank, along one critical path; returns how many.

    The path ends with the last operation of all, or ``by_span`` with that of the rank whose span is the largest.
    """
    _, stages, microbatches = start.shape
    flows = stages * microbatches
    duration, comm, rank_of = work.duration, work.comm, work.rank_of
    tiny = work.instant
    op, latest = done[0], -1.0
    for rank in range(len(offsets) - 1):
        last = done[offsets[rank + 1] - 1]
        kind, stage = last // flows, last // microbatches % stages
        over = start[kind, stage, last % microbatches] + duration[kind, stage]
        if by_span:
            first = done[offsets[rank]]
            over -= start[first // flows, first // microbatches % stages, first % microbatches]
        if over > latest + tiny or (over > latest - tiny and _draw(chance, 2) == 0):
            op, latest = last, over
    count = 0
    while True:
        kind, stage, micro = op // flows, op // microbatches % stages, op % microbatches
        at = start[kind, stage, micro]
        if at <= tiny:
            return count
        ahead = -1
        if where[op] > offsets[rank_of[stage]]:
            prior = done[where[op] - 1]
            of, on = prior // flows, prior // microbatches % stages
            if start[of, on, prior % microbatches] + duration[of, on] >= at - tiny:
                ahead = prior
                spots[count] = where[op]
                count += 1
        if ahead < 0 or (_ready(duration, comm, start, kind, stage, micro) >= at - tiny and _draw(chance, 2) == 0):
            if kind == 2 or (kind == 1 and stage == stages - 1):
                op -= flows
            else:
                op += -microbatches if kind == 0 else microbatches
        else:
            op = ahead


@compiled
def _move(done, source, target):  # type: ignore[no-untyped-def]
    """Move the operation at ``source`` to ``target``; those between close up."""
    op = done[source]
    step = 1 if target > source else -1
    for place in range(source, target, step):
        done[place] = done[place + step]
    done[target] = op


@compiled
def _may_stand(work, done, offsets, rank, source, target, microbatches):  # type: ignore[no-untyped-def]
    """Whether the rank keeps its limit, and no micro-batch has overtaken another at the same work."""
    stages = len(work.rank_of)
    moved = done[target] // microbatches
    for place in range(min(source, target), max(source, target) + 1):
        if place != target and done[place] // microbatches == moved:
            return False
    activation, kept, limit = work.activation, work.kept, work.limit[rank] + ROUNDING
    held = 0.0
    for place in range(offsets[rank], offsets[rank + 1]):
        kind, stage = done[place] // (stages * microbatches), done[place] // microbatches % stages
        if kind == 0:
            held += activation[stage]
            if held > limit:
                return False
        elif kind == 1:
            held -= activation[stage] * (1 - kept[stage])
        else:
            held -= activation[stage] * kept[stage]
    return True


@compiled
def _draw(chance, below):  # type: ignore[no-untyped-def]
    """A number from 0 to ``below`` - 1; the same sequence for the same seed everywhere."""
    chance[0] = (chance[0] * 1103515245 + 12345) % 2147483648
    return chance[0] // 65536 % below
