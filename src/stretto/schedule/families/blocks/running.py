"""Run a repeated block: F and I in about its order, each as soon as it can, W where there is room.

A rank runs its next F or I as soon as that has what it needs.  Until then it runs a W that fits, else a later F or I
that has what it needs, provided that the memory still suffices for everything before its turn.  Where memory
is short for an F, W comes first.  So gaps close, the way down and the way up fill, and the limit holds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stretto.schedule.compiled import compiled
from stretto.schedule.families.blocks.work import INFINITE, Numbers, Values

ROUNDING = 1e-7
"""How far above its limit memory may come out."""
WEIGHT, SLEEP, STUCK = -1, -2, -3


class State(NamedTuple):
    """How far a run has come."""

    arrive: Values
    """When F and I have what they need (2, S, M), INFINITE until that is known."""
    ran: Numbers
    """1 for each operation of the order that has run."""
    weights: Numbers
    """W that may run, per rank a queue in the order's places."""
    place: Numbers
    """Per rank: next operation of the order, first and last of the queue, operations run (4, R)."""
    time: Values
    """Per rank: when it is free, and when it should be looked at (2, R)."""
    held: Values
    """Per rank: memory held, and what of it only waits for W (2, R)."""


@compiled
def run_order(work, order, offsets, guess, policy, done, start):  # type: ignore[no-untyped-def]
    """Run; returns the makespan, INFINITE where the order can't keep the limit.

    ``order``: F and I of rank r at ``offsets[r]`` to ``offsets[r + 1]``.  ``guess`` (2, S, M): when an operation can be
    expected to have what it needs, INFINITE where nothing is known.  ``policy`` (3,): the fraction of itself by
    which W may delay what follows; likewise F or I before its turn; how many operations are looked over for these.
    Fills ``done`` with all operations, rank r's from ``offsets[r] * 3 // 2``, and ``start`` (3, S, M).
    """
    ranks = len(work.limit)
    place = np.zeros((4, ranks), dtype=np.int64)
    place[:3] = offsets[:-1]
    arrive = np.full(guess.shape, INFINITE)
    arrive[0, 0] = 0.0
    state = State(
        arrive,
        np.zeros(len(order), dtype=np.int64),
        np.zeros(len(order), dtype=np.int64),
        place,
        np.zeros((2, ranks)),
        np.zeros((2, ranks)),
    )
    makespan = 0.0
    left = len(order) + len(order) // 2
    while left > 0:
        rank = np.argmin(state.time[1])
        now = state.time[1, rank]
        if now >= INFINITE:
            return INFINITE
        chosen = _choose(work, state, order, offsets[rank + 1], guess, policy, rank, now)
        if chosen == STUCK:
            return INFINITE
        if chosen == SLEEP:
            continue
        if chosen == WEIGHT:
            op = state.weights[place[1, rank]]
            place[1, rank] += 1
        else:
            op = order[chosen]
            state.ran[chosen] = 1
        done[offsets[rank] * 3 // 2 + place[3, rank]] = op
        place[3, rank] += 1
        makespan = max(makespan, _perform(work, state, op, rank, now, start))
        left -= 1
    return makespan


@compiled
def _choose(work, state, order, end, guess, policy, rank, now):  # type: ignore[no-untyped-def]
    """Place in the order of what the rank runs now, or WEIGHT, SLEEP (which sets when to look again) or STUCK."""
    _, stages, microbatches = guess.shape
    tiny = work.instant
    place = state.place
    while place[0, rank] < end and state.ran[place[0, rank]] == 1:
        place[0, rank] += 1
    weighted = place[1, rank] < place[2, rank]
    if place[0, rank] == end:
        if weighted:
            return WEIGHT
        state.time[1, rank] = INFINITE
        return SLEEP
    op = order[place[0, rank]]
    kind, stage, micro = op // (stages * microbatches), op // microbatches % stages, op % microbatches
    at = state.arrive[kind, stage, micro]
    if at <= now + tiny:
        if kind == 1 or state.held[0, rank] + work.activation[stage] <= work.limit[rank] + ROUNDING:
            return place[0, rank]
        return WEIGHT if weighted else STUCK
    expected = at
    if at >= INFINITE and guess[kind, stage, micro] > now + tiny:
        expected = guess[kind, stage, micro]
    gap = expected - now + tiny
    if weighted:
        waiting = state.weights[place[1, rank]] // microbatches % stages
        if work.duration[2, waiting] * (1 - policy[0]) <= gap:
            return WEIGHT
    state.time[1, rank] = expected
    return _early(work, state, order, end, policy, rank, now, gap)


@compiled
def _early(work, state, order, end, policy, rank, now, gap):  # type: ignore[no-untyped-def]
    """Place of an F or I that may run before its turn, or SLEEP."""
    _, stages, microbatches = state.arrive.shape
    level = highest = state.held[0, rank] - state.held[1, rank]
    seen = 0
    place = state.place[0, rank]
    while place < end and seen <= policy[2]:
        if state.ran[place] == 0:
            op = order[place]
            kind, stage, micro = op // (stages * microbatches), op // microbatches % stages, op % microbatches
            more = work.activation[stage]
            fits = seen > 0 and work.duration[kind, stage] * (1 - policy[1]) <= gap
            if fits and kind == 0:
                fits = max(highest, state.held[0, rank]) + more <= work.limit[rank] + ROUNDING
            if fits:
                at = state.arrive[kind, stage, micro]
                if at <= now + work.instant:
                    return place
                state.time[1, rank] = min(state.time[1, rank], at)
            level += more if kind == 0 else -more
            highest = max(highest, level)
            seen += 1
        place += 1
    return SLEEP


@compiled
def _perform(work, state, op, rank, now, start):  # type: ignore[no-untyped-def]
    """Run one operation; returns when it is over."""
    _, stages, microbatches = start.shape
    kind, stage, micro = op // (stages * microbatches), op // microbatches % stages, op % microbatches
    start[kind, stage, micro] = now
    over = now + work.duration[kind, stage]
    state.time[:, rank] = over
    kept = work.activation[stage] * work.kept[stage]
    follower = -1
    if kind == 0:
        state.held[0, rank] += work.activation[stage]
        follower = stage + 1
        if follower == stages:
            state.arrive[1, stage, micro] = over
    elif kind == 1:
        state.held[0, rank] -= work.activation[stage] - kept
        state.held[1, rank] += kept
        state.weights[state.place[2, rank]] = op + stages * microbatches
        state.place[2, rank] += 1
        follower = stage - 1
    else:
        state.held[:, rank] -= kept
    if 0 <= follower < stages:
        at = over + work.comm[min(follower, stage)]
        state.arrive[kind, follower, micro] = at
        holder = work.rank_of[follower]
        state.time[1, holder] = min(state.time[1, holder], max(state.time[0, holder], at))
    return over
