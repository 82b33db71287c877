"""Schedules drawn with characters, at most 120 columns wide.

``draw`` puts time on x, one rank per row; ``grid`` puts position on x and points at one cell:

    rank 0 │F0-F1-F2-      B0----B1----           rank 0 │ 0F0  0F1  0B0
    rank 1 │   F0-F1-B0----...                    rank 1 │ 1B0  1F0  1F1
                                                         │ ^^^

Where an operation is narrower than a character, each character shows the kind that most of its time goes to, ▒
where several kinds take turns, and a blank where the rank mostly idles.
"""

from __future__ import annotations

from itertools import groupby
from textwrap import wrap
from typing import TYPE_CHECKING

from stretto.schedule.op import Kind, text
from stretto.schedule.schedule import Schedule

if TYPE_CHECKING:
    from stretto.schedule.simulate.clock import Timeline

    Drawn = tuple[tuple[int, int, int, int], float, float]
    """A row of the schedule with its start and end."""
    Lane = tuple[list[str], list[int]]
    """A rank's characters, and the kind that each stands for."""

MOST_ROWS = 16
"""Ranks that a grid shows, around the one that it points at."""
MOST_LINES = 12
"""Lines that a rank's order takes at most."""
MOST_LANES = 64
"""Ranks that a drawing shows: the first and the last ones."""
COLOURS = {
    Kind.F: 68, Kind.B: 173, Kind.I: 179, Kind.W: 72, Kind.R: 140, Kind.S: 175, Kind.T: 182, Kind.OPT: 246,
    Kind.SEND_F: 252, Kind.RECV_F: 252, Kind.SEND_B: 252, Kind.RECV_B: 252,
}  # fmt: skip
"""Backgrounds out of a terminal's 256 colours."""
IDLE, MIXED = -1, -2
MOSTLY = 0.6
"""Share of a character's time that a kind must take to stand for it."""


def draw(timeline: Timeline, *, width: int = 120, colour: bool = False) -> str:
    """Draw when each operation runs, with a ruler of time below.

    An operation is drawn as long as it lasts, and named as fully as the shortest one allows: ``2F11``,
    ``F11`` (always so where each rank has one stage), or ``F``.  What runs beside a rank's arithmetic isn't
    drawn.  ``colour`` is for terminals that understand ANSI escapes.
    """
    schedule = timeline.schedule
    ranks = _shown(schedule.num_ranks)
    margin = len(f"rank {schedule.num_ranks - 1}") + 2
    columns = width - margin
    lasting = (timeline.end - timeline.start)[timeline.graph.arithmetic]
    shortest = float(lasting[lasting > 0].min(initial=timeline.makespan or 1.0))
    makespan = timeline.makespan or shortest
    cell = columns * shortest / makespan
    if cell < 1:
        lanes = {rank: _mixed(timeline, rank, columns) for rank in ranks if rank >= 0}
    else:
        staged = schedule.num_chunks * len(schedule.placement) > 1
        rows = {rank: _rows(timeline, rank) for rank in ranks if rank >= 0}
        longest = max((len(_label(op, staged)) for row in rows.values() for op, _, _ in row), default=0)
        if cell >= 3:  # a whole number keeps equal operations equally wide; below three it would waste too much
            cell = min(int(cell), longest + 1)
        staged = staged and cell > longest
        lanes = {rank: _named(row, columns, cell / shortest, staged) for rank, row in rows.items()}
    lines = []
    for rank in ranks:
        if rank < 0:
            lines.append(f"{f'... {-rank} more':<{margin - 1}}│")
        else:
            lane = _coloured(*lanes[rank]) if colour else "".join(lanes[rank][0]).rstrip()
            lines.append(f"{f'rank {rank}':<{margin - 1}}│{lane}")
    end_of_time = round(makespan / shortest * cell)
    return "\n".join([*lines, f"{'time':<{margin - 1}}│0{f'{timeline.makespan:g}':>{max(end_of_time - 1, 1)}}"])


def _shown(num_ranks: int) -> list[int]:
    """The ranks to draw; a negative entry stands for that many left out."""
    if num_ranks <= MOST_LANES:
        return list(range(num_ranks))
    half = MOST_LANES // 2
    return [*range(half), -(num_ranks - 2 * half), *range(num_ranks - half, num_ranks)]


def _rows(timeline: Timeline, rank: int) -> list[Drawn]:
    """A rank's arithmetic, in time from the first operation anywhere."""
    part, first = timeline.rows(rank), float(timeline.start.min())
    times = ((timeline.start[part] - first).tolist(), (timeline.end[part] - first).tolist())
    main = timeline.graph.arithmetic[part].tolist()
    drawn = zip(timeline.schedule.rows(rank), *times, main, strict=True)
    return [(row, start, end) for row, start, end, arithmetic in drawn if arithmetic]


def _named(row: list[Drawn], columns: int, scale: float, staged: bool) -> Lane:
    """Characters and kinds of a lane whose operations all have room for a letter."""
    cells, kinds = [" "] * columns, [IDLE] * columns
    for op, start, end in row:
        left, right = round(start * scale), round(end * scale)
        cells[left:right] = _block(_label(op, staged), Kind(op[0]).name, right - left)
        kinds[left:right] = [op[0]] * (right - left)
    return cells, kinds


def _mixed(timeline: Timeline, rank: int, columns: int) -> Lane:
    """Characters and kinds of a lane whose operations are narrower than a character."""
    import numpy as np

    part = timeline.rows(rank)
    rows = np.flatnonzero(timeline.graph.arithmetic[part]) + part.start
    scale, first = columns / timeline.makespan, timeline.start.min()
    kind = timeline.schedule.kind[rows]
    start, end = (timeline.start[rows] - first) * scale, (timeline.end[rows] - first) * scale
    spent = np.zeros((len(Kind), columns + 1))
    at = np.minimum(start.astype(np.int64), columns - 1)
    inside = np.minimum(end, at + 1) - start
    np.add.at(spent, (kind, at), inside)
    long = end > at + 1
    for each, first, over in zip(kind[long].tolist(), at[long].tolist(), end[long].tolist(), strict=True):
        for column in range(first + 1, min(int(np.ceil(over)), columns)):
            spent[each, column] += min(over, column + 1) - column
    spent = spent[:, :columns]
    busy = spent.sum(axis=0)
    best = np.where(spent.max(axis=0) > MOSTLY * busy, spent.argmax(axis=0), MIXED)
    kinds = np.where(busy >= 0.5, best, IDLE).tolist()
    return [{IDLE: " ", MIXED: "▒"}.get(each) or Kind(each).name[0] for each in kinds], kinds


def _coloured(cells: list[str], kinds: list[int]) -> str:
    """A lane with the colours of its kinds."""
    lane = ""
    for kind, group in groupby(zip(kinds, cells, strict=True), key=lambda pair: pair[0]):
        part = "".join(cell for _, cell in group)
        lane += part if kind < 0 else f"\x1b[38;5;16;48;5;{COLOURS.get(Kind(kind), 250)}m{part}\x1b[0m"
    return lane.rstrip()


def _label(op: tuple[int, int, int, int], staged: bool) -> str:
    """``2F0``, or ``F0`` without its stage."""
    full = text(*op[:3])
    return full if staged else full.lstrip("0123456789")


def _block(label: str, kind: str, width: int) -> str:
    """The label filled up to ``width`` columns, or as much of it as fits."""
    shown = label if len(label) <= width else kind[:width]
    return shown + "-" * (width - len(shown))


def orders(schedule: Schedule, *, width: int = 120) -> str:
    """Each rank's operations in order, messages among them, on as many lines as they need up to ``MOST_LINES``."""
    margin = len(f"rank {schedule.num_ranks - 1}") + 1
    lines = []
    for rank in range(schedule.num_ranks):
        tokens = "".join(f"{op}{'+' if op.joined else ' '}" for op in schedule.ops(rank))
        wrapped = wrap(tokens, width - margin - 2, break_long_words=False)
        for at, line in enumerate(wrapped[:MOST_LINES]):
            lines.append(f"{f'rank {rank}' if at == 0 else '':<{margin}}│ {line}")
        left_out = len(" ".join(wrapped[MOST_LINES:]).split())
        lines += [f"{'':<{margin}}│ ... and {left_out} more"] * bool(left_out)
    return "\n".join(lines)


def grid(schedule: Schedule, *, rank: int, position: int, width: int = 120) -> str:
    """Draw the orders of all ranks around one cell and point at it.

    ``position`` is the operation's index on its rank, or the number of its operations to point behind
    the last one.
    """
    orders = [[text(*row[:3]) for row in schedule.rows(each)] for each in range(schedule.num_ranks)]
    top = max(0, min(rank - MOST_ROWS // 2, schedule.num_ranks - MOST_ROWS))
    shown = range(top, min(top + MOST_ROWS, schedule.num_ranks))
    margin = len(f"rank {shown[-1]}") + 1
    cell = 1 + max((len(token) for each in shown for token in orders[each]), default=3)
    columns = max(1, (width - margin - 1) // cell)
    first = max(0, position - columns // 2)
    lines = []
    for each in shown:
        tokens = orders[each][first : first + columns]
        lines.append(f"{f'rank {each}':<{margin}}│" + "".join(f" {token:<{cell - 1}}" for token in tokens))
        if each == rank:
            length = len(orders[rank][position]) if position < len(orders[rank]) else cell - 1
            lines.append(" " * margin + "│" + " " * ((position - first) * cell + 1) + "^" * length)
    return "\n".join(line.rstrip() for line in lines)
