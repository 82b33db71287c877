"""Make building blocks: one micro-batch's operations, each where its rank is free modulo the period.

rank 0  │F       · · · · I W     │     F goes down the stages, I comes back up, each as soon as the one before
rank 1  │  F     · · I W         │     is over, has waited, and the rank has a hole in its period; then the W
"""

from __future__ import annotations

import numpy as np

from stretto.schedule.compiled import compiled
from stretto.schedule.families.blocks.work import INFINITE

CLOSE = 1e-9
"""Fraction of the period within which times are equal."""


@compiled
def make_blocks(work, period, microbatches, waits, starts, peaks):  # type: ignore[no-untyped-def]
    """One block for each row of ``waits``; fills ``starts`` (N, 3, S) and ``peaks`` (2, N, R).

    ``waits`` (N, 2, V): by how much F and I fall behind at each step to a stage of that index, on average,
    beyond their duration and latency.  ``peaks``: memory of each rank with M micro-batches under way where each
    W follows its I at once, and where it stands as in the block.
    """
    ranks, chunks = work.stages_on.shape
    table = np.zeros((2, ranks, 3 * chunks))
    count = np.zeros(ranks, dtype=np.int64)
    for block in range(len(waits)):
        count[:] = 0
        _chain(work, period, waits[block], table, count, starts[block])
        for stage in range(starts.shape[2] - 1, -1, -1):
            now = starts[block, 1, stage] + work.duration[1, stage]
            lasts = work.duration[2, stage]
            starts[block, 2, stage] = _first_fit(table, count, work.rank_of[stage], now, lasts, period)
        _peaks(work, period, microbatches, starts[block], peaks[:, block])


@compiled
def _chain(work, period, waits, table, count, starts):  # type: ignore[no-untyped-def]
    """Place F down the stages and I up again.

    ``line`` is where an even fall behind would put the operation; without it the time lost by looking for a
    hole would add up step by step.
    """
    stages = starts.shape[1]
    now = line = 0.0
    for step in range(2 * stages):
        kind = step // stages
        stage = step if kind == 0 else 2 * stages - 1 - step
        even = False
        if step > 0:
            before = stage if step == stages else (stage - 1 if kind == 0 else stage + 1)
            further = work.duration[0 if step == stages else kind, before]
            if before != stage:
                further += work.comm[min(before, stage)]
                even = work.index_of[before] == work.index_of[stage]
            now += further
            if even:
                line += further + waits[kind, work.index_of[stage]]
                now = max(now, line)
        now = _first_fit(table, count, work.rank_of[stage], now, work.duration[kind, stage], period)
        starts[kind, stage] = now
        if not even:
            line = now


@compiled
def _first_fit(table, count, rank, now, lasts, period):  # type: ignore[no-untyped-def]
    """First time from ``now`` on at which the rank is free for ``lasts``, modulo the period; taken down in ``table``.

    Where there is none it is ``now`` all the same, and not taken down: such a block still tells an order, which
    running turns into times.
    """
    tiny = CLOSE * period
    best = INFINITE
    for candidate in range(-1, count[rank]):
        at = now
        if candidate >= 0:
            at += (table[0, rank, candidate] + table[1, rank, candidate] - now) % period
            if at - now > period - tiny:
                at = now
        if at >= best:
            continue
        free = lasts <= period + tiny
        for other in range(count[rank]):
            ahead = (table[0, rank, other] - at) % period
            if ahead > period - tiny:
                ahead = 0.0
            if ahead + tiny < lasts or ahead + table[1, rank, other] > period + tiny:
                free = False
                break
        if free:
            best = at
    if best >= INFINITE:
        return now
    table[0, rank, count[rank]] = best
    table[1, rank, count[rank]] = lasts
    count[rank] += 1
    return best


@compiled
def _peaks(work, period, microbatches, starts, peaks):  # type: ignore[no-untyped-def]
    """Fill ``peaks`` (2, R): memory is highest just after some F has started."""
    ranks, chunks = work.stages_on.shape
    for rank in range(ranks):
        peaks[:, rank] = 0.0
        for chunk in range(chunks):
            stage = work.stages_on[rank, chunk]
            if stage < 0:
                break
            at = starts[0, stage]
            least = held = 0.0
            for other in range(chunks):
                beside = work.stages_on[rank, other]
                if beside < 0:
                    break
                taken = np.floor((at - starts[0, beside]) / period + CLOSE)
                freed = np.floor((at - starts[1, beside] - work.duration[1, beside]) / period + CLOSE)
                over = np.floor((at - starts[2, beside] - work.duration[2, beside]) / period + CLOSE)
                kept = work.kept[beside]
                least += work.activation[beside] * min(taken - freed, microbatches)
                held += work.activation[beside] * min(taken - (1 - kept) * freed - kept * over, microbatches)
            peaks[0, rank] = max(peaks[0, rank], least)
            peaks[1, rank] = max(peaks[1, rank], held)
