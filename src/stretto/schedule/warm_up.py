"""The warm-up of a step: the forwards that every rank can run before any rank needs a gradient.

A step that is begun before its weights are confirmed (trainer/post_validation.py) may go so far and no further:

    rank 0 │ 0F0 0F1 0F2 0F3 ┊ 0I0 0W0 0F4 ...
    rank 1 │ 1F0 1F1 1F2 ┊ 1I0 1F3 1I1 ...
    rank 2 │ 2F0 2F1 ┊ 2I0 2F2 2I1 ...                 (ZB-H1; Qi et al. 2023, section 4)

What stands before the cut needs nothing that stands behind it on any rank, so that all ranks reach the cut whatever
happens there.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.schedule.op import Kind, Op
from stretto.schedule.schedule import Schedule

FORWARD_ONLY = frozenset({Kind.F, Kind.SEND_F, Kind.RECV_F, Kind.UNSHARD, Kind.RESHARD})
"""Kinds that leave nothing but activations, messages and gathered parameters behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """What one rank has to know of the cut."""

    length: int
    """Operations before the cut on this rank."""
    sent: frozenset[tuple[int, int, int]]
    """Messages (sending stage, micro-batch, rank) that other ranks send to this one before their cut."""
    gathered: tuple[Op, ...]
    """What undoes the UNSHARD operations before the cut that no RESHARD before it undoes."""


def warm_up(schedule: Schedule, rank: int) -> WarmUp:
    """The part of a lowered schedule's ``rank`` before the cut."""
    lengths = lengths_of(schedule)
    sent = {
        (stage, microbatch, other)
        for other, length in enumerate(lengths)
        for kind, stage, microbatch, peer in list(schedule.rows(other))[:length]
        if kind == Kind.SEND_F and peer == rank
    }
    held: list[tuple[int, int]] = []
    for op in schedule.ops(rank)[: lengths[rank]]:
        if op.kind is Kind.UNSHARD:
            held.append((op.stage, op.microbatch))
        elif op.kind is Kind.RESHARD:
            held.remove((op.stage, op.microbatch))
    gathered = tuple(Op(Kind.RESHARD, stage=stage, microbatch=block) for stage, block in held)
    return WarmUp(length=lengths[rank], sent=frozenset(sent), gathered=gathered)


def lengths_of(schedule: Schedule) -> list[int]:
    """Operations before the cut, per rank: the longest that need nothing from behind it.

    >>> from stretto.schedule.families import build
    >>> from stretto.schedule.passes.communication import lower
    >>> lengths_of(lower(build("1f1b", ranks=2, microbatches=3)))
    [4, 2]
    """
    rows = [list(schedule.rows(rank)) for rank in range(schedule.num_ranks)]
    sends = {
        (stage, microbatch, rank): at
        for rank, order in enumerate(rows)
        for at, (kind, stage, microbatch, _) in enumerate(order)
        if kind == Kind.SEND_F
    }
    lengths = [next((at for at, row in enumerate(order) if row[0] not in FORWARD_ONLY), len(order)) for order in rows]
    shrunk = True
    while shrunk:
        shrunk = False
        for rank, order in enumerate(rows):
            for at, (kind, stage, microbatch, peer) in enumerate(order[: lengths[rank]]):
                if kind != Kind.RECV_F:
                    continue
                source = schedule.previous_stage(stage, microbatch)
                assert source is not None
                if sends[source, microbatch, peer] >= lengths[peer]:
                    lengths[rank], shrunk = at, True
                    break
    return lengths
