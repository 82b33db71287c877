"""What every data rank gets of a step's documents, micro-batch by micro-batch: the run's own placing, told in tokens.

    lengths ──► assign ──► portions[rank][micro-batch]        tokens, the documents' shares, the group that has them

A portion is what a row of as many tokens on a rank by itself would be, but for its attention, which is that of its
documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stretto.planner.document_costs import costs_of
from stretto.planner.document_groups import Placement, assign
from stretto.planner.workload import Workload
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.sequence import memory_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """One micro-batch of one data rank."""

    tokens: int
    """On the rank, before tp divides what it can; filled up to a multiple of it."""
    documents: tuple[int, ...]
    """Lengths of the documents that it has shares of."""
    first: int
    """First data rank of their group."""
    ranks: int
    """Size of that group."""
    away: int = 0
    """Blocks whose activations are on the host between forward and backward."""


def placed(run: RunSpec, lengths: Sequence[int]) -> Placement:
    """Where the run puts the documents of a step; ConfigError for one that doesn't fit on all ranks together."""
    room = memory_tokens(run.plan, run.training.sequence_length)
    return assign(lengths, run.plan.cp * run.plan.dp, costs_of(run), memory_tokens=room)


def portions(run: RunSpec, lengths: Sequence[int]) -> tuple[tuple[Portion, ...], ...]:
    """Each data rank's micro-batches; equally many, of which some hold a token that nothing is asked of."""
    placement, unit = placed(run, lengths), run.plan.tp
    number = max(1, placement.micro_batches)
    held: dict[tuple[int, int], list[tuple[int, int, int, int, int]]] = {}
    for piece in placement.pieces:
        length = lengths[piece.document]
        own = -(-length // piece.ranks)
        for rank in range(piece.first, piece.first + piece.ranks):
            held.setdefault((rank, piece.micro_batch), []).append((own, length, piece.first, piece.ranks, piece.away))
    found = []
    for rank in range(len(placement.times)):
        row = []
        for at in range(number):
            parts = held.get((rank, at), [(0, 0, rank, 1, 0)])
            tokens = max(1, sum(part[0] for part in parts))
            row.append(
                Portion(
                    tokens=-(-tokens // unit) * unit,
                    documents=tuple(part[1] for part in parts if part[1]),
                    first=parts[0][2],
                    ranks=parts[0][3],
                    away=parts[0][4],
                )
            )
        found.append(tuple(row))
    return tuple(found)


def plain_plan(plan: PlanSpec) -> PlanSpec:
    """The plan as far as estimates know it: groups, their room and what they offload are told apart from it."""
    return replace(plan, context_groups="static", context_tokens=None, offload=False)


def step_work(work: Workload, micro_batches: int) -> Workload:
    """The run's workload with as many micro-batches as its documents need."""
    plan = plain_plan(work.plan)
    return replace(work, plan=plan, global_batch_size=micro_batches * plan.dp * plan.micro_batch_size)


def alone(work: Workload, tokens: int, ranks: int = 1) -> Workload:
    """A row of which each of so many ranks has so many tokens, beside such rows on all others."""
    plan = plain_plan(work.plan)
    data = plan.cp * plan.dp
    one = replace(plan, cp=ranks, dp_shard=1, dp_replicate=data // ranks, micro_batch_size=1)
    one = replace(one, context="ring", ulysses=1, inner_ring=1)
    batch = work.num_microbatches * one.dp
    return replace(work, plan=one, sharding=work.states, sequence_length=tokens * ranks, global_batch_size=batch)
