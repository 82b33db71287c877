"""DualPipe: two replicas in opposite directions, forward of one overlapped with backward of the other (DeepSeek-V3
2024, figure 5).

4 ranks, 8 micro-batches:

    rank 0 │0F0-0F1-0F2-3F4-3I4-3W4-3F5-0F3-3B5-----3F6-0B0-----3B6-----3F7-    0B1-----3B7-----0I2-0W2-0I3-0W3-
    rank 1 │    1F0-2F4-1F1-2F5-1F2-2B4-----2F6-1B0-----1F3-2B5-----2F7-1B1-----2B6-----1B2-----2I7-1I3-2W7-1W3-
    rank 2 │    1F4-2F0-1F5-2F1-1F6-2B0-----2F2-1B4-----1F7-2B1-----2F3-1B5-----2B2-----1B6-----2I3-1I7-2W3-1W7-
    rank 3 │0F4-0F5-0F6-3F0-3I0-3W0-3F1-0F7-3B1-----3F2-0B4-----3B2-----3F3-    0B5-----3B3-----0I6-0W6-0I7-0W7-
    time   │0                                                                                                 25

Rank r holds stage r of the replica that runs down the ranks and stage R - 1 - r of the one that runs up.
The work is symmetric: each rank sees a *near* direction, which enters the pipeline on its half of the ranks,
and a *far* one.  It goes through eight steps (h ranks lie between it and the entrance, H = R / 2, N micro-batches
in each direction):

    1   2 (H - h - 1)   F near
    2   h + 1           F near, F far
    3   H - h - 1       I far, W, F far
    4   N - R + h + 1   F near + B far, F far + B near     the steady state; + marks an overlapped pair
    5   H - h - 1       B far, F far + B near
    6   h + 1           B far, B near                      the second half with W apart
    7   H - h - 1       W, I near
    8   h + 1           W

The steps presume at least R micro-batches in each direction.  Fewer, or one more in one direction than in the
other, follow the order of the next larger number that fits with the missing ones left out, which can only
make it shorter.  The price: a rank holds two copies of its share of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule, Shape
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.int64]
    Flags = npt.NDArray[np.bool_]


def dualpipe(*, ranks: int, microbatches: int) -> Schedule:
    """Two replicas of R stages; the first half of the micro-batches runs down the ranks, the second half up."""
    import numpy as np

    if ranks % 2:
        raise ScheduleError(
            f"Schedule dualpipe can't have {ranks} ranks: its two directions meet between two ranks, so their number "
            f"is even; take {ranks + 1} ranks, or dualpipe-v, which has any number of them."
        )
    down = (microbatches + 1) // 2
    orders = []
    for rank in range(ranks):
        steps = read(eight_steps(min(rank, ranks - 1 - rank), depth=ranks // 2, turns=max(down, ranks)))
        runs_up = steps.far != (rank >= ranks // 2)
        steps = steps.only(steps.turn < np.where(runs_up, microbatches - down, down))
        runs_up = steps.far != (rank >= ranks // 2)
        orders.append((steps, np.where(runs_up, ranks - 1 - rank, rank), steps.turn + down * runs_up))
    return assemble(
        orders,
        voice=[int(microbatch >= down) for microbatch in range(microbatches)],
        shape={
            "name": "dualpipe",
            "num_stages": ranks,
            "num_microbatches": microbatches,
            "placement": [list(range(ranks)), list(reversed(range(ranks)))],
        },
    )


def eight_steps(level: int, *, depth: int, turns: int) -> str:
    """The order of a rank that is ``level`` ranks away from the entrance of a pipe that is ``depth`` ranks deep.

    ``turns`` micro-batches in each direction, at least ``2 * depth``.  Capital letters are the near direction, small
    ones the far; ``w`` is the oldest W that is due, and a pair with ``+`` overlaps.
    """
    ahead, own = depth - level - 1, level + 1
    return "".join(
        [
            "F" * 2 * ahead,
            "Ff" * own,
            "iwf" * ahead,
            # Next to the turn the first pair is left apart: joined, the backward would begin later than it can.
            "F+bf+B" if ahead else "Fbf+B",
            "F+bf+B" * (turns - 2 * depth + level),
            "bf+B" * ahead,
            "bB" * (own // 2),
            "bI" * (own % 2),
            "iI" * (own // 2),
            "wI" * ahead,
            "w" * own,
        ]
    )


class Steps(NamedTuple):
    """A rank's order in two directions; columns of N steps."""

    kind: Values
    """F, B, I or W."""
    far: Flags
    """Whether a step belongs to the far direction."""
    turn: Values
    """Which of the direction's micro-batches it works for."""
    joined: Flags
    """Whether it overlaps with the step that follows."""

    def only(self, kept: Flags) -> Steps:
        """Some of the steps; a pair that loses a half is no pair."""
        import numpy as np

        paired = self.joined & np.append(kept[1:], False)
        return Steps(self.kind[kept], self.far[kept], self.turn[kept], paired[kept])


def read(order: str) -> Steps:
    """Steps of an order as ``eight_steps`` writes it."""
    import numpy as np

    letters = np.array(list(order))
    joined = np.append(letters[1:] == "+", False)[letters != "+"]
    letters = letters[letters != "+"]
    lower = np.char.lower(letters)
    far = letters == lower
    kind = np.select([lower == name.lower() for name in "FBIW"], [Kind[name] for name in "FBIW"])
    turn = np.zeros(len(letters), dtype=np.int64)
    for kinds in ([Kind.F], [Kind.B, Kind.I]):
        for direction in (False, True):
            mine = np.isin(kind, kinds) & (far == direction)
            turn[mine] = np.arange(np.count_nonzero(mine))
    far[kind == Kind.W], turn[kind == Kind.W] = far[kind == Kind.I], turn[kind == Kind.I]
    return Steps(kind, far, turn, joined)


def assemble(orders: Sequence[tuple[Steps, Values, Values]], *, voice: Sequence[int], shape: Shape) -> Schedule:
    """The schedule of each rank's steps, their stages and their micro-batches."""
    import numpy as np

    return Schedule.from_columns(
        kind=np.concatenate([steps.kind for steps, _, _ in orders]),
        stage=np.concatenate([stage for _, stage, _ in orders]),
        microbatch=np.concatenate([microbatch for _, _, microbatch in orders]),
        joined=np.concatenate([steps.joined for steps, _, _ in orders]),
        offsets=np.cumsum([0, *(len(stage) for _, stage, _ in orders)]),
        voice=voice,
        **shape,
    )
