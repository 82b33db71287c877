"""Peak memory of a run whose documents have groups of their own: of rows with as many tokens as a rank holds at once.

    pipeline rank r keeps k micro-batches that follow each other, so the most of k portions' tokens in a row
        k   = 1      2      ...      │ p0 │ p1 │ p2 │ p3 │         1f1b: min(M, R - r), gpipe: M
                                          └─ most ─┘

All that a rank keeps is linear in its tokens: no mask is a table of pairs here.  Where activations are on the host, the
blocks that stay count (``document_costs.Host``).  Without lengths a rank is taken to fill a micro-batch as far as
``plan.context_tokens`` lets it, which most steps do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stretto.planner.document_costs import TURNS, costs_of
from stretto.planner.document_portions import Portion, alone, portions, step_work
from stretto.planner.groups import limits
from stretto.planner.in_flight import in_flight
from stretto.planner.memory import RankMemory, layer_activation_bytes, memory
from stretto.planner.request import Request
from stretto.planner.tracked import layer_elements, tracked
from stretto.planner.workload import Workload
from stretto.spec.sequence import memory_tokens


def document_memory(request: Request, lengths: Sequence[int] | None = None) -> tuple[RankMemory, ...]:
    """Peak of each pipeline rank, on the data rank where it is most; ScheduleError for a schedule that can't be.

    ``lengths``: of a step's documents; None: as much as the plan lets a micro-batch hold.
    """
    held = _fullest(request) if lengths is None else portions(request.run, lengths)
    work = step_work(request.work(request.run.plan), len(held[0]))
    flying = in_flight(work.plan.schedule, ranks=work.plan.pp, microbatches=work.num_microbatches)
    found = []
    for rank, number in enumerate(map(round, flying)):
        windows = {row[at : at + number] for row in held for at in range(len(row) - number + 1)}
        each = [_of_window(request, work, rank, window) for window in windows]
        found.append(max(each, key=lambda one: one.total))
    return tuple(found)


def documents_fit(request: Request) -> bool:
    """Whether each rank can hold as much as the plan lets its micro-batches have."""
    most = limits(step_work(request.work(request.run.plan), 1))
    return all(rank.total <= limit for rank, limit in zip(document_memory(request), most, strict=True))


def _fullest(request: Request) -> tuple[tuple[Portion, ...], ...]:
    """A data rank that gets as much as it may hold in each of its micro-batches."""
    run = request.run
    batch = run.training.global_batch_size * run.training.sequence_length
    room, unit, costs = memory_tokens(run.plan, run.training.sequence_length), run.plan.tp, costs_of(run)
    ranks = run.plan.cp * run.plan.dp
    number = -(-batch // (room * ranks)) + (run.plan.pp > 1)

    def filled(tokens: int, away: int) -> tuple[Portion, ...]:
        tokens = -(-min(tokens, batch) // unit) * unit
        return (Portion(tokens=tokens, documents=(tokens,), first=0, ranks=ranks, away=away),) * number

    found = [filled(room, 0)]
    most = 0 if costs.host is None else max(0, costs.host.blocks - TURNS)
    if most:
        longest = min(costs.room(most, room), run.training.sequence_length)
        found.append(filled(longest, most))
    return tuple(found)


def _of_window(request: Request, work: Workload, rank: int, window: Sequence[Portion]) -> RankMemory:
    """A pipeline rank with these micro-batches alive at once."""
    tokens = -(-sum(portion.tokens for portion in window) // len(window))
    one = alone(work, tokens, max(portion.ranks for portion in window))
    counted = request.cluster.name.partition(":")[0] == "local-cpu"
    found = (tracked(one, packed=False) if counted else memory(one, request.margin))[rank]
    spared = 0.0
    layers = work.layers_of_rank(rank)
    for portion in window:
        if portion.away:
            there = alone(work, portion.tokens)
            each = layer_elements(there, packed=False) * work.stack.parameter_bytes
            each = each if counted else layer_activation_bytes(there)
            spared += each * (layers - max(min(TURNS, layers), layers - portion.away))
    lost = 0.0 if counted else request.margin.fragmentation * spared
    return replace(found, activations=max(0.0, found.activations - spared), reserve=found.reserve - lost)
