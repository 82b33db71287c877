"""The loops of the search, over plain arrays: place all operations by priority, and time given orders.

An order is one row of symbols per rank: ``kind * S + stage`` with kind 0 for F, 1 for I, 2 for W.  The n-th
occurrence of a symbol works for micro-batch n: micro-batches are alike, so nothing is lost by running them
in turn on every stage.
"""

from __future__ import annotations

import numpy as np

from stretto.schedule.compiled import compiled

INFINITE = 1e300
SLACK = 1e-9
"""Times closer than this count as equal."""


@compiled
def place(rank_of, stages_on, duration, comm, activation, act_w, limit, cap, release, priority, patience, order, end):  # type: ignore[no-untyped-def]
    """List scheduling: a free rank runs the ready operation of the least priority; returns the makespan.

    ``rank_of`` (S,); ``stages_on`` (R, V) ascending, filled up with -1; ``duration`` (3, S) and ``priority``
    (3, S, M) for F, I, W; ``comm`` (S - 1,); ``activation`` and ``act_w`` (S,).

    ``cap`` (S,): F of a stage may start while the memory of the stages up to it on its rank stays within its
    cap.  Caps that rise with the stage by at least an activation each, the last one the rank's limit, can't
    deadlock: whatever waits for memory waits for a later stage, which has a place of its own.

    ``release`` (S, M): F does not start earlier.  ``patience``: an operation that is known to arrive within
    this fraction of the chosen one's duration, and has a lower priority number, is waited for.

    Fills ``order`` (R, 3 V M) with symbols and ``end`` (3, S, M).  Returns INFINITE where memory can't suffice.
    """
    stages = len(rank_of)
    ranks, chunks = stages_on.shape
    microbatches = priority.shape[2]
    done = np.zeros((3, stages), dtype=np.int64)
    free = np.zeros(ranks)
    wake = np.zeros(ranks)
    free_memory = limit.copy()
    used = np.zeros(stages)
    claim = np.zeros(ranks)
    for stage in range(stages):
        claim[rank_of[stage]] += activation[stage]
    count = np.zeros(ranks, dtype=np.int64)
    total = 3 * stages * microbatches
    placed = 0
    makespan = 0.0
    while placed < total:
        rank = 0
        now = wake[0]
        for other in range(1, ranks):
            if wake[other] < now:
                rank, now = other, wake[other]
        if now >= INFINITE:
            return INFINITE
        best = later = soonest = INFINITE
        best_kind = best_stage = -1
        later_at = INFINITE
        for chunk in range(chunks):
            stage = stages_on[rank, chunk]
            if stage < 0:
                break
            # F
            m = done[0, stage]
            if m < microbatches:
                at = release[stage, m]
                if stage > 0:
                    at = max(at, end[0, stage - 1, m] + comm[stage - 1]) if done[0, stage - 1] > m else INFINITE
                if at < INFINITE:
                    fits = free_memory[rank] - activation[stage] > -1e-7
                    held = activation[stage]
                    for other in range(chunks):
                        level = stages_on[rank, other]
                        if level < 0 or not fits:
                            break
                        held += used[level]
                        if other >= chunk and held > cap[level] + 1e-7:
                            fits = False
                    if fits and free_memory[rank] - activation[stage] < claim[rank] - 1e-7:
                        # could all micro-batches that hold memory here still be finished, the oldest first?
                        oldest, newest = m, m
                        for other in range(chunks):
                            level = stages_on[rank, other]
                            if level < 0:
                                break
                            oldest = min(oldest, done[2, level])
                            newest = max(newest, done[0, level] - 1)
                        room = free_memory[rank] - activation[stage]
                        for flow in range(oldest, newest + 1):
                            needs = 0.0
                            holds = 0.0
                            for other in range(chunks):
                                level = stages_on[rank, other]
                                if level < 0:
                                    break
                                if flow >= done[0, level] and not (level == stage and flow == m):
                                    needs += activation[level]
                                elif flow >= done[1, level]:
                                    holds += activation[level]
                                elif flow >= done[2, level]:
                                    holds += activation[level] * act_w[level]
                            if holds > 0 and needs > room + 1e-7:
                                fits = False
                                break
                            room += holds
                    if fits:
                        rated = priority[0, stage, m]
                        if at <= now + SLACK:
                            if rated < best:
                                best, best_kind, best_stage = rated, 0, stage
                        else:
                            soonest = min(soonest, at)
                            if rated < later:
                                later, later_at = rated, at
            # I
            m = done[1, stage]
            if m < done[0, stage]:
                at = end[0, stage, m]
                if stage < stages - 1:
                    at = max(at, end[1, stage + 1, m] + comm[stage]) if done[1, stage + 1] > m else INFINITE
                if at < INFINITE:
                    rated = priority[1, stage, m]
                    if at <= now + SLACK:
                        if rated < best:
                            best, best_kind, best_stage = rated, 1, stage
                    else:
                        soonest = min(soonest, at)
                        if rated < later:
                            later, later_at = rated, at
            # W
            m = done[2, stage]
            if m < done[1, stage]:
                rated = priority[2, stage, m]
                if rated < best:
                    best, best_kind, best_stage = rated, 2, stage
        if best_kind < 0:
            wake[rank] = soonest
            continue
        if later < best and later_at - now < patience * duration[best_kind, best_stage]:
            wake[rank] = later_at
            continue
        m = done[best_kind, best_stage]
        over = now + duration[best_kind, best_stage]
        end[best_kind, best_stage, m] = over
        done[best_kind, best_stage] = m + 1
        order[rank, count[rank]] = best_kind * stages + best_stage
        count[rank] += 1
        placed += 1
        makespan = max(makespan, over)
        free[rank] = over
        wake[rank] = over
        neighbour = -1
        if best_kind == 0:
            change = activation[best_stage]
            if best_stage < stages - 1:
                neighbour = best_stage + 1
                at = over + comm[best_stage]
        elif best_kind == 1:
            change = -activation[best_stage] * (1 - act_w[best_stage])
            if best_stage > 0:
                neighbour = best_stage - 1
                at = over + comm[best_stage - 1]
        else:
            change = -activation[best_stage] * act_w[best_stage]
        free_memory[rank] -= change
        used[best_stage] += change
        if neighbour >= 0:
            holder = rank_of[neighbour]
            wake[holder] = min(wake[holder], max(free[holder], at))
    return makespan


@compiled
def retime(order, length, rank_of, duration, comm, microbatches, end, cause, stack, flag, at, done):  # type: ignore[no-untyped-def]
    """Time given orders; returns the makespan, INFINITE where they can't finish.

    ``order`` (R, n) symbols, ``length`` (R,).  Fills ``end`` and ``cause`` (3 S M,), indexed by symbol * M + m;
    ``cause`` is the operation whose end let this one start (-1 at time 0).  The last four are room to work in:
    (R,), (R,), (R,), (3 S,) integers.
    """
    ranks = order.shape[0]
    stages = len(rank_of)
    makespan = 0.0
    missing = 0
    for rank in range(ranks):
        stack[rank] = rank
        flag[rank] = 1
        at[rank] = 0
        missing += length[rank]
    for symbol in range(3 * stages):
        done[symbol] = 0
    height = ranks
    while height > 0:
        height -= 1
        rank = stack[height]
        flag[rank] = 0
        last = -1
        free = 0.0
        if at[rank] > 0:
            symbol = order[rank, at[rank] - 1]
            last = symbol * microbatches + done[symbol] - 1
            free = end[last]
        while at[rank] < length[rank]:
            symbol = order[rank, at[rank]]
            m = done[symbol]
            kind = symbol // stages
            stage = symbol - kind * stages
            start = free
            why = last
            if kind == 0:
                if stage > 0:
                    if done[symbol - 1] <= m:
                        break
                    other = (symbol - 1) * microbatches + m
                    if end[other] + comm[stage - 1] > start:
                        start = end[other] + comm[stage - 1]
                        why = other
            elif kind == 1:
                if done[stage] <= m:
                    break
                if stage < stages - 1:
                    if done[symbol + 1] <= m:
                        break
                    other = (symbol + 1) * microbatches + m
                    if end[other] + comm[stage] > start:
                        start = end[other] + comm[stage]
                        why = other
            elif done[symbol - stages] <= m:
                break
            last = symbol * microbatches + m
            free = start + duration[kind, stage]
            end[last] = free
            cause[last] = why
            done[symbol] = m + 1
            at[rank] += 1
            missing -= 1
            holder = -1
            if kind == 0 and stage < stages - 1:
                holder = rank_of[stage + 1]
            elif kind == 1 and stage > 0:
                holder = rank_of[stage - 1]
            if holder >= 0 and holder != rank and flag[holder] == 0:
                flag[holder] = 1
                stack[height] = holder
                height += 1
        makespan = max(makespan, free)
    if missing > 0:
        return INFINITE
    return makespan


@compiled
def fits(order, length, rank, stages, activation, act_w, limit):  # type: ignore[no-untyped-def]
    """Whether a rank's order keeps F before I before W on each stage, and its memory within ``limit``."""
    done = np.zeros(3 * stages, dtype=np.int64)
    used = 0.0
    for position in range(length[rank]):
        symbol = order[rank, position]
        kind = symbol // stages
        stage = symbol - kind * stages
        done[symbol] += 1
        if kind == 0:
            used += activation[stage]
            if used > limit + 1e-7:
                return False
        else:
            if done[symbol] > done[symbol - stages]:
                return False
            used -= activation[stage] * ((1 - act_w[stage]) if kind == 1 else act_w[stage])
    return True


@compiled
def anneal(order, length, rank_of, duration, comm, activation, act_w, limit, microbatches, seed, tries, hot, cold):  # type: ignore[no-untyped-def]
    """Move operations of the critical path within their ranks' orders; returns the best makespan.

    Leaves the best orders in ``order``.  Simulated annealing over ``tries`` moves, from temperature ``hot``
    to ``cold`` (in units of time).
    """
    ranks = order.shape[0]
    stages = len(rank_of)
    total = 3 * stages * microbatches
    end = np.zeros(total)
    cause = np.zeros(total, dtype=np.int64)
    stack = np.zeros(ranks, dtype=np.int64)
    flag = np.zeros(ranks, dtype=np.int64)
    at = np.zeros(ranks, dtype=np.int64)
    done = np.zeros(3 * stages, dtype=np.int64)
    current = order.copy()
    path_rank = np.zeros(total, dtype=np.int64)
    path_position = np.zeros(total, dtype=np.int64)
    place_of = np.zeros(total, dtype=np.int64)
    best = now = retime(current, length, rank_of, duration, comm, microbatches, end, cause, stack, flag, at, done)
    state = np.uint64(seed * 2 + 1)
    fresh = True
    steps = 0
    for turn in range(tries):
        if fresh:
            # the critical path: from the operation that ends last, back along what it waited for
            for symbol in range(3 * stages):
                done[symbol] = 0
            last = -1
            for rank in range(ranks):
                for position in range(length[rank]):
                    symbol = current[rank, position]
                    row = symbol * microbatches + done[symbol]
                    place_of[row] = position
                    done[symbol] += 1
                    if last < 0 or end[row] > end[last]:
                        last = row
            steps = 0
            while last >= 0:
                symbol = last // microbatches
                path_rank[steps] = rank_of[symbol % stages]
                path_position[steps] = place_of[last]
                steps += 1
                last = cause[last]
            fresh = False
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        pick = int((state >> np.uint64(33)) % np.uint64(steps))
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        far = int((state >> np.uint64(33)) % np.uint64(16))
        rank, source = path_rank[pick], path_position[pick]
        if far < 10:
            target = source + (1 if far % 2 == 0 else -1)
        else:
            state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            reach = 2 + int((state >> np.uint64(33)) % np.uint64(8))
            target = source + (reach if far % 2 == 0 else -reach)
        if target < 0 or target >= length[rank]:
            continue
        symbol = current[rank, source]
        if current[rank, target] == symbol:
            continue
        step = 1 if target > source else -1
        position = source
        while position != target:
            current[rank, position] = current[rank, position + step]
            position += step
        current[rank, target] = symbol
        makespan = INFINITE
        if fits(current, length, rank, stages, activation, act_w, limit[rank]):
            makespan = retime(current, length, rank_of, duration, comm, microbatches, end, cause, stack, flag, at, done)
        temperature = hot * (cold / hot) ** (turn / tries)
        accept = makespan <= now
        if not accept and makespan < INFINITE:
            state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            chance = float(state >> np.uint64(33)) / 2147483648.0
            accept = chance < np.exp((now - makespan) / temperature)
        if accept:
            now = makespan
            fresh = True
            if makespan < best - SLACK:
                best = makespan
                order[:, :] = current
        else:
            position = target
            while position != source:
                current[rank, position] = current[rank, position - step]
                position -= step
            current[rank, source] = symbol
    return best
