"""Which of a rank's sends are certainly over when a receive is over.

Gloo doesn't tell whether a send has left before it is waited for, and waiting for one whose receiver isn't there
yet could stop a schedule that is right.  The schedule knows better: what rank 1 sent after it had received from
rank 0 proves that the latter's message arrived.

    rank 0   SEND_F0 SEND_F1 SEND_F2 ── RECV_B0      RECV_B0 is over: SEND_F0 and SEND_F1 are gone, their tensors
    rank 1   RECV_F0 RECV_F1 ── SEND_B0 RECV_F2      can be let go; SEND_F2 may still be on its way
"""

from __future__ import annotations

from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule

RECEIVES = (Kind.RECV_F, Kind.RECV_B)
Key = tuple[int, int, int]


def arrivals(schedule: Schedule, rank: int) -> dict[Key, tuple[int, int]]:
    """For each receive of ``rank`` (kind, stage, micro-batch): how many messages to its sender have arrived by then.

    The first number counts activations, the second gradients; ``schedule`` is lowered.
    """
    found: dict[Key, tuple[int, int]] = {}
    for peer in range(schedule.num_ranks):
        received = [0, 0]
        proofs: dict[Key, tuple[int, int]] = {}
        for kind, stage, microbatch, other in schedule.rows(peer):
            if other != rank:
                continue
            if kind in RECEIVES:
                received[kind == Kind.RECV_B] += 1
            else:
                forward = kind == Kind.SEND_F
                reader = (schedule.next_stage if forward else schedule.gradient_target)(stage, microbatch)
                assert reader is not None
                proofs[Kind.RECV_F if forward else Kind.RECV_B, reader, microbatch] = (received[0], received[1])
        found |= proofs
    return found
