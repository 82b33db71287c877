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

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule, Shape
from stretto.spec.errors import ScheduleError


class Step(NamedTuple):
    """One operation of a rank that works in two directions."""

    kind: Kind
    """F, B, I or W."""
    far: bool
    """Whether it belongs to the far direction."""
    turn: int
    """How many of its kind the direction has had on this rank."""
    joined: bool = False
    """Whether it overlaps with the operation that follows."""


def dualpipe(*, ranks: int, microbatches: int) -> Schedule:
    """Two replicas of R stages; the first half of the micro-batches runs down the ranks, the second half up."""
    if ranks % 2:
        raise ScheduleError(
            f"Schedule dualpipe can't have {ranks} ranks: its two directions meet between two ranks, so their number "
            f"is even; take {ranks + 1} ranks, or dualpipe-v, which has any number of them."
        )
    down = (microbatches + 1) // 2

    def place(rank: int, far: bool, turn: int) -> tuple[int, int]:
        runs_up = far != (rank >= ranks // 2)
        if turn >= (microbatches - down if runs_up else down):
            return -1, -1
        return (ranks - 1 - rank, down + turn) if runs_up else (rank, turn)

    turns = max(down, ranks)
    return from_steps(
        [eight_steps(min(rank, ranks - 1 - rank), depth=ranks // 2, turns=turns) for rank in range(ranks)],
        place,
        voice=[int(microbatch >= down) for microbatch in range(microbatches)],
        shape={
            "name": "dualpipe",
            "num_stages": ranks,
            "num_microbatches": microbatches,
            "placement": [list(range(ranks)), list(reversed(range(ranks)))],
        },
    )


def eight_steps(level: int, *, depth: int, turns: int) -> list[Step]:
    """The order of a rank that is ``level`` ranks away from the entrance of a pipe that is ``depth`` ranks deep.

    ``turns`` micro-batches in each direction, at least ``2 * depth``.  Capital letters are the near direction, small
    ones the far; ``w`` is the oldest W that is due.
    """
    order = _Order()
    ahead, own = depth - level - 1, level + 1
    order.repeat(2 * ahead, "F")
    order.repeat(own, "F f")
    order.repeat(ahead, "i w f")
    # Next to the turn the first pair is left apart: joined, the backward would begin later than it can.
    order.repeat(1, "F+b f+B" if ahead else "F b f+B")
    order.repeat(turns - 2 * depth + level, "F+b f+B")
    order.repeat(ahead, "b f+B")
    order.repeat(own // 2, "b B")
    if own % 2:
        order.repeat(1, "b I")
    order.repeat(own // 2, "i I")
    order.repeat(ahead, "w I")
    order.repeat(own, "w")
    return order.steps


class _Order:
    """A rank's order, as far as it is written."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.steps: list[Step] = []
        self.turns = {(kind, far): 0 for kind in (Kind.F, Kind.B) for far in (False, True)}
        self.due: deque[Step] = deque()

    def repeat(self, times: int, group: str) -> None:
        """Append a group of steps, several times."""
        for _ in range(times):
            for word in group.split():
                for letter in word:
                    self._append(letter, joined="+" in word and letter == word[0])

    def _append(self, letter: str, *, joined: bool) -> None:
        """One step; W comes out in the order in which I went in."""
        if letter == "+":
            return
        if letter == "w":
            self.steps.append(self.due.popleft())
            return
        far, kind = letter.islower(), Kind[letter.upper()]
        counter = (Kind.F if kind is Kind.F else Kind.B, far)
        turn = self.turns[counter]
        self.turns[counter] += 1
        self.steps.append(Step(kind, far, turn, joined))
        if kind is Kind.I:
            self.due.append(Step(Kind.W, far, turn))


def from_steps(
    orders: Sequence[Sequence[Step]],
    place: Callable[[int, bool, int], tuple[int, int]],
    *,
    voice: Sequence[int],
    shape: Shape,
) -> Schedule:
    """The schedule of one list of steps per rank.

    ``place(rank, far, turn)`` gives stage and micro-batch, a negative stage where the step is left out.
    """
    rows: list[tuple[int, int, int, bool]] = []
    offsets = [0]
    for rank, order in enumerate(orders):
        kept = [(step, *place(rank, step.far, step.turn)) for step in order]
        follows = [stage >= 0 for _, stage, _ in kept[1:]] + [False]
        rows += [
            (step.kind, stage, microbatch, step.joined and behind)
            for (step, stage, microbatch), behind in zip(kept, follows, strict=True)
            if stage >= 0
        ]
        offsets.append(len(rows))
    kind, stage, microbatch, joined = zip(*rows, strict=True)
    return Schedule.from_columns(
        kind=kind, stage=stage, microbatch=microbatch, offsets=offsets, joined=joined, voice=voice, **shape
    )
