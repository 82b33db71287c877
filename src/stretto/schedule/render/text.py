"""Schedules drawn with characters, at most 120 columns wide.

``draw`` puts time on x, one rank per row; ``grid`` puts position on x and points at one cell:

    rank 0 │F0-F1-F2-      B0----B1----           rank 0 │ 0F0  0F1  0B0
    rank 1 │   F0-F1-B0----...                    rank 1 │ 1B0  1F0  1F1
                                                         │ ^^^
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule.op import Kind, text
from stretto.schedule.schedule import Schedule

if TYPE_CHECKING:
    from stretto.schedule.simulate.clock import Timeline

MOST_ROWS = 16
"""Ranks that a grid shows, around the one that it points at."""


def draw(timeline: Timeline, *, width: int = 120) -> str:
    """Draw when each operation runs, with a ruler of time below.

    An operation is drawn as long as it lasts, and named as fully as the shortest one allows: ``2F11``,
    ``F11`` (always so where each rank has one stage), or ``F``.
    """
    schedule = timeline.schedule
    heads = [f"rank {rank}" for rank in range(schedule.num_ranks)]
    margin = len(heads[-1]) + 2
    columns = width - margin
    first = min(min(start) for start in timeline.start if start)
    rows = [
        list(zip(schedule.rows(rank), timeline.start[rank], timeline.end[rank], strict=True))
        for rank in range(schedule.num_ranks)
    ]
    shortest = min((end - start for row in rows for _, start, end in row if end > start), default=1.0)
    staged = schedule.num_chunks * len(schedule.placement) > 1
    longest = max(len(_label(op, staged)) for row in rows for op, _, _ in row)
    cell = columns * shortest / timeline.makespan
    if cell >= 3:  # a whole number keeps equal operations equally wide; below three it would waste too much
        cell = min(int(cell), longest + 1)
    staged = staged and cell > longest
    lines = []
    for head, row in zip(heads, rows, strict=True):
        cells = [" "] * columns
        for op, start, end in row:
            left, right = (round((time - first) / shortest * cell) for time in (start, end))
            cells[left:right] = _block(_label(op, staged), Kind(op[0]).name, right - left)
        lines.append(f"{head:<{margin - 1}}│{''.join(cells)}".rstrip())
    end_of_time = round(timeline.makespan / shortest * cell)
    return "\n".join([*lines, f"{'time':<{margin - 1}}│0{f'{timeline.makespan:g}':>{max(end_of_time - 1, 1)}}"])


def _label(op: tuple[int, int, int, int], staged: bool) -> str:
    """``2F0``, or ``F0`` without its stage."""
    full = text(*op[:3])
    return full if staged else full.lstrip("0123456789")


def _block(label: str, kind: str, width: int) -> str:
    """The label filled up to ``width`` columns, or as much of it as fits."""
    shown = label if len(label) <= width else kind[:width]
    return shown + "-" * (width - len(shown))


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
