"""Sharded stages gathered for as long as a rank works on them, the next one while it works on this one.

    0F0 0F1 2F0 2F1 2B0 2B1 0B0   ──►   0UNSHARD0 2UNSHARD0 0F0 0F1 0RESHARD0 2F0 2F1 2B0 ...

A *turn* is a row of operations of one stage that need its parameters (W between them doesn't).  For families
whose turns are long: at most two stages are gathered at a time, and each only once a turn.
"""

from __future__ import annotations

from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule


def gathered(schedule: Schedule) -> Schedule:
    """Each stage has one UNSHARD a turn, at the start of the turn before, and one RESHARD; all else stays."""
    import numpy as np

    rank = np.repeat(np.arange(schedule.num_ranks), np.diff(schedule.offsets))
    uses = np.flatnonzero(np.isin(schedule.kind, (Kind.F, Kind.B, Kind.I)))
    where, stage = rank[uses], schedule.stage[uses]
    turns = np.flatnonzero(np.diff(where * schedule.num_stages + stage, prepend=-1))
    opens, stage, where = uses[turns], stage[turns], where[turns]
    closes = uses[np.append(turns[1:], len(uses)) - 1]
    initial = np.diff(where, prepend=-1) != 0
    ahead = np.where(initial, opens, np.roll(opens, 1))

    # At one point a rank opens its first turn, then closes one, then opens the one after the next.
    first = int(np.count_nonzero(initial))
    place = np.repeat([0, 1, 2], [first, len(turns), len(turns) - first])
    turn = np.concatenate([np.flatnonzero(initial), np.arange(len(turns)), np.flatnonzero(~initial)])
    order = np.lexsort((place, where[turn]))
    place, turn = place[order], turn[order]
    points = np.where(place == 1, closes[turn] + 1, ahead[turn])
    return schedule.with_columns(
        kind=np.insert(schedule.kind, points, np.where(place == 1, Kind.RESHARD, Kind.UNSHARD)),
        stage=np.insert(schedule.stage, points, stage[turn]),
        microbatch=np.insert(schedule.microbatch, points, 0),
        offsets=schedule.offsets + np.searchsorted(where[turn], np.arange(schedule.num_ranks + 1)),
    )
