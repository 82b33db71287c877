"""Matched: messages exist for exactly the arrows between ranks, and on each channel receives meet sends in order.

A channel is (source rank, destination rank, whether it carries activations or gradients):

    rank 0 │ 0SEND_F0  0SEND_F1          rank 1 │ 1RECV_F1  1RECV_F0      refused: 0SEND_F0 comes first
"""

from __future__ import annotations

from stretto.schedule.arrows import Arrows, Places
from stretto.schedule.op import MESSAGES, Kind, text
from stretto.schedule.verifier.fault import fault, fault_at, token


def check_matched(places: Places, arrows: Arrows) -> None:
    """Raise ScheduleError for a message that is met by nothing, an operand that isn't sent, a channel out of order."""
    _check_met(places)
    for row, key in sorted(arrows.missing.items()):
        if key[0] in MESSAGES and places.schedule.kind[row] not in MESSAGES:
            raise fault(places.schedule, row, f"but never receives what it needs; add {text(*key)}")
    _check_channels(places)


def _check_met(places: Places) -> None:
    """Every message crosses ranks, names the right one and is met."""
    import numpy as np

    schedule, flows = places.schedule, places.flows
    found: list[tuple[int, str]] = []
    for kind, other, end_of in (
        (Kind.SEND_F, Kind.RECV_F, flows.after),
        (Kind.RECV_F, Kind.SEND_F, flows.before),
        (Kind.SEND_B, Kind.RECV_B, flows.target),
        (Kind.RECV_B, Kind.SEND_B, flows.source),
    ):
        rows = np.flatnonzero(schedule.kind == kind)
        microbatch, peer = schedule.microbatch[rows], schedule.peer[rows]
        flow = flows.of[microbatch]
        there = end_of[flow, schedule.stage[rows]]
        holder = np.where(there >= 0, flows.holder[flow, there], places.rank[rows])
        inside = holder == places.rank[rows]
        unmet = places.find(other, np.maximum(there, 0), microbatch) < 0
        wrong = inside | (peer != holder) | unmet
        if wrong.any():
            at = int(wrong.argmax())
            if inside[at]:
                reason = "nothing crosses ranks there"
            elif peer[at] != holder[at]:
                reason = f"its peer is rank {peer[at]}, while stage {there[at]} lies on rank {holder[at]}"
            else:
                reason = f"rank {holder[at]} has no {text(other, there[at], microbatch[at])} to meet it"
            found.append((int(rows[at]), reason))
    if found:
        row, reason = min(found)
        raise fault(schedule, row, f"but {reason}")


def _check_channels(places: Places) -> None:
    """Receives of a channel stand in the order of their sends."""
    import numpy as np

    schedule = places.schedule
    sends, receives = places.messages()
    channel = (places.rank[sends] * schedule.num_ranks + schedule.peer[sends]) * 2
    channel += schedule.kind[sends] == Kind.SEND_B
    by_receive = np.lexsort((receives, channel))
    by_send = np.lexsort((sends, channel))
    crossed = by_receive != by_send
    if crossed.any():
        at = by_receive[crossed]
        first = int(at[receives[at].argmin()])
        row = int(receives[first])
        brought = int(sends[by_send[int(np.flatnonzero(by_receive == first)[0])]])
        rank, peer = int(places.rank[row]), schedule.peer[row]
        sentence = (
            f"rank {rank} receives {token(schedule, row)} from rank {peer} where the channel brings "
            f"{token(schedule, brought)}; a channel keeps the order of its sends."
        )
        raise fault_at(schedule, rank, row - int(schedule.offsets[rank]), sentence)
