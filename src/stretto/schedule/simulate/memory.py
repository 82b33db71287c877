"""Activation memory of a schedule.

One rank's curve for ``0F0 0F1 0I0 0W0 0B1`` with act_w = 1/4:

    2 ┤     ┌───┐
    1 ┤ ┌───┘   └1.25┐       taken at the start of F, 1 - act_w given back at the end of I, the rest at
    0 ┤─┘            └─      the end of W; all of it at the end of B

Unit: what one micro-batch keeps alive over one rank's whole share of the layers, so that a chunk of V
counts 1/V.  A rank runs one operation at a time: its peak depends on its order alone, not on any cost.
"""

from __future__ import annotations

from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule


def peak_activation(schedule: Schedule, *, act_w: float = 1.0) -> tuple[float, ...]:
    """Largest activation memory of each rank; a stage without backward keeps nothing after its F.

    ``act_w``, between 0 and 1, is the fraction kept between I and W.
    """
    share = schedule.num_ranks / schedule.num_stages
    given_back = {Kind.B: share, Kind.I: share * (1 - act_w), Kind.W: share * act_w}
    peaks = []
    for rank in range(schedule.num_ranks):
        held = peak = 0.0
        for kind, stage, _, _ in schedule.rows(rank):
            if kind == Kind.F:
                peak = max(peak, held + share)
                held += share if schedule.has_backward(stage) else 0.0
            elif kind in given_back:
                held -= given_back[Kind(kind)]
        peaks.append(peak)
    return tuple(peaks)
