"""The loops of ``relax``: from all beginnings of n operations to all beginnings of n + 1.

With S stages on R ranks, operations are numbered along a micro-batch's way, F of each stage and back I of each, then
W of each stage beside it: 3 S.  A beginning of a schedule is a row of whole numbers:

    │ done (3 S) │ over │ free (R) │ ready ...      done   how often each operation has run
                                                    over   what the makespan is at the least; -1: dropped
    free   when each rank is free                   ready  when each micro-batch under way, the oldest
                                                           first, can go on with its next operation
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule.compiled import compiled

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Whole = npt.NDArray[np.int64]

NEVER = 1 << 60
WIDTH = 64
"""Beginnings of equal counts that are kept apart."""

RANK, LENGTH, LAG, AFTER, MEMORY, TIMES, EARLIEST = range(7)
"""Columns of an operation: rank that runs it; how long; least time from its end to the next on the way, and to the end
of the schedule; memory that it takes; how often it runs; earliest start."""
CAPACITY, LAST, LAST_IDLE, HELD, LEFT, FITS = range(6)
"""Columns of a rank: memory; length of the stretch without F at its end, and idle time in it at the least; then, of the
row at hand, memory in use, work left, least end of an I or W that could run."""
KEY, SLOT, FOLLOWING, PARENT, OP = range(5)
"""Columns of a row's links: hash of what is done, its place in the table, the next row with the same done; the row
that it came from, and by which operation."""


@compiled
def survey(ops: Whole, ranks: Whole, row: Whole):  # type: ignore[no-untyped-def]
    """Note each rank's memory in use, work left, and what could fill a gap."""
    free, ready, way = len(ops) + 1, len(ops) + 1 + len(ranks), len(ops) // 3 * 2
    for rank in range(len(ranks)):
        ranks[rank, HELD] = 0
        ranks[rank, LEFT] = 0
        ranks[rank, FITS] = NEVER
    for op in range(len(ops)):
        rank = ops[op, RANK]
        ranks[rank, HELD] += row[op] * ops[op, MEMORY]
        ranks[rank, LEFT] += (ops[op, TIMES] - row[op]) * ops[op, LENGTH]
        at = row[free + rank]
        if op >= way:
            can_run = row[op] < row[2 * way - 1 - op]
        else:
            can_run = op >= way // 2 and row[op] < row[op - 1]
            if can_run:
                at = max(at, row[ready + row[op] - row[way - 1]])
        if can_run:
            ranks[rank, FITS] = min(ranks[rank, FITS], at + ops[op, LENGTH])


@compiled
def start_of(ops: Whole, ranks: Whole, row: Whole, op: int):  # type: ignore[no-untyped-def]
    """When an operation can start for its next micro-batch, -1 where it can't or shouldn't.

    It shouldn't where the rank would stand still before it for as long as some I or W takes that could run:
    running that first delays nothing and only frees memory.
    """
    way = len(ops) // 3 * 2
    rank = ops[op, RANK]
    free = row[len(ops) + 1 + rank]
    if op >= way:
        return free if row[op] < row[2 * way - 1 - op] else -1
    if op == 0:
        if row[op] == ops[op, TIMES]:
            return -1
        start = max(free, ops[op, EARLIEST])
    else:
        if row[op] == row[op - 1]:
            return -1
        start = max(free, row[len(ops) + 1 + len(ranks) + row[op] - row[way - 1]])
    if op < way // 2 and ranks[rank, HELD] + ops[op, MEMORY] > ranks[rank, CAPACITY]:
        return -1
    return -1 if start > free and start >= ranks[rank, FITS] else start


@compiled
def advance(ops: Whole, ranks: Whole, row: Whole, op: int, start: int, child: Whole):  # type: ignore[no-untyped-def]
    """Write the row after an operation.

    Operations run in the order of their starts, so no rank is free before this one's start.
    """
    over, free, ready, way = len(ops), len(ops) + 1, len(ops) + 1 + len(ranks), len(ops) // 3 * 2
    end = start + ops[op, LENGTH]
    for other in range(len(ops)):
        child[other] = row[other]
    child[op] += 1
    for rank in range(len(ranks)):
        child[free + rank] = max(row[free + rank], start)
    child[free + ops[op, RANK]] = end
    oldest = row[way - 1]
    gone = child[way - 1] - oldest
    for place in range(gone, row[0] - oldest):
        child[ready + place - gone] = row[ready + place]
    child[over] = row[over]
    if op < way:
        if child[op] == ops[op, TIMES]:
            child[over] = max(row[over], end + ops[op, AFTER])
        if op < way - 1:
            child[ready + row[op] - oldest] = end + ops[op, LAG]
    done = 0
    for microbatch in range(child[0] - 1, child[way - 1] - 1, -1):
        while done < way - 1 and child[done + 1] > microbatch:
            done += 1
        place = ready + microbatch - child[way - 1]
        child[place] = max(child[place], child[free + ops[done + 1, RANK]])


@compiled
def least_end(ops: Whole, ranks: Whole, child: Whole, op: int):  # type: ignore[no-untyped-def]
    """Least makespan from a row: every rank has its work left, and stands still in its last stretch.

    Of that stretch at most ``last`` - (makespan - now) is over, so its idle time is ahead where more work is left
    than the stretch has room for; else it may be past.
    """
    end = child[len(ops)]
    for rank in range(len(ranks)):
        left = ranks[rank, LEFT]
        if rank == ops[op, RANK]:
            left -= ops[op, LENGTH]
        idle = ranks[rank, LAST_IDLE]
        ahead = left + idle if left + idle > ranks[rank, LAST] else left
        end = max(end, child[len(ops) + 1 + rank] + ahead)
    return end


@compiled
def find(rows: Whole, links: Whole, table: Whole, made: int, num_ops: int):  # type: ignore[no-untyped-def]
    """Give row ``made`` its key and slot; returns the first row with the same done, -1 where there is none.

    A slot of the table is in use where it names a row, below ``made``, that names the slot: so the table need
    never be emptied.
    """
    key = 0
    for op in range(num_ops):
        key = (key * 1_000_003) ^ rows[made, op]
    key ^= key >> 29
    slot = key & (len(table) - 1)
    while True:
        head = table[slot]
        if head >= made or links[head, SLOT] != slot:
            break
        same = links[head, KEY] == key
        op = 0
        while same and op < num_ops:
            same = rows[head, op] == rows[made, op]
            op += 1
        if same:
            break
        slot = (slot + 1) & (len(table) - 1)
    found = head < made and links[head, SLOT] == slot
    links[made, KEY] = key
    links[made, SLOT] = slot
    return head if found else -1


@compiled
def compare(rows: Whole, one: int, other: int, begin: int, end: int):  # type: ignore[no-untyped-def]
    """1: row ``one`` is as early as ``other`` in all columns from begin to end; -1: the other way round; 0: neither."""
    earlier = later = True
    for column in range(begin, end):
        if rows[one, column] < rows[other, column]:
            later = False
        elif rows[one, column] > rows[other, column]:
            earlier = False
    if earlier:
        return 1
    return -1 if later else 0


@compiled
def merge(rows: Whole, links: Whole, head: int, made: int, begin: int, end: int):  # type: ignore[no-untyped-def]
    """Make the row that differs least from row ``made`` as early as it in everything.

    No schedule that begins like either is lost, so what is proven stays true.
    """
    best, least = head, NEVER
    row = head
    while row >= 0:
        distance = 0
        for column in range(begin, end):
            distance += abs(rows[row, column] - rows[made, column])
        if distance < least:
            best, least = row, distance
        row = links[row, FOLLOWING]
    for column in range(begin, end):
        rows[best, column] = min(rows[best, column], rows[made, column])


@compiled
def admit(rows: Whole, links: Whole, table: Whole, made: int, num_ops: int, num_ranks: int):  # type: ignore[no-untyped-def]
    """Keep row ``made`` unless one of the same done is as early in everything; returns how many rows there are then.

    Rows that it makes needless are dropped.  Beyond WIDTH rows of the same done it is merged with the nearest.
    """
    head = find(rows, links, table, made, num_ops)
    way = num_ops // 3 * 2
    begin, end = num_ops, num_ops + 1 + num_ranks + rows[made, 0] - rows[made, way - 1]
    alike = 0
    previous = -1
    row = head
    while row >= 0:
        following = links[row, FOLLOWING]
        order = compare(rows, row, made, begin, end)
        if order == 1:
            return made
        if order == -1:
            rows[row, num_ops] = -1
            if previous >= 0:
                links[previous, FOLLOWING] = following
            else:
                head = following
                if head >= 0:
                    table[links[made, SLOT]] = head
        else:
            alike += 1
            previous = row
        row = following
    if alike >= WIDTH:
        merge(rows, links, head, made, begin, end)
        return made
    links[made, FOLLOWING] = head
    table[links[made, SLOT]] = made
    return made + 1


@compiled
def compact(rows: Whole, links: Whole, made: int, over: int):  # type: ignore[no-untyped-def]
    """Close the gaps that dropped rows left; returns how many remain."""
    kept = 0
    for row in range(made):
        if rows[row, over] >= 0:
            if kept != row:
                for column in range(rows.shape[1]):
                    rows[kept, column] = rows[row, column]
                links[kept, PARENT] = links[row, PARENT]
                links[kept, OP] = links[row, OP]
            kept += 1
    return kept


@compiled
def expand(ops: Whole, ranks: Whole, old: Whole, number: int, new: Whole, links: Whole, table: Whole, upper: int):  # type: ignore[no-untyped-def]
    """All children of the first ``number`` rows; returns how many (-1: no room) and their least makespan.

    Children whose least makespan is above ``upper`` are left out.
    """
    made, least = 0, NEVER
    for parent in range(number):
        row = old[parent]
        survey(ops, ranks, row)
        for op in range(len(ops)):
            start = start_of(ops, ranks, row, op)
            if start < 0:
                continue
            if made == len(new):
                return -1, least
            child = new[made]
            advance(ops, ranks, row, op, start, child)
            end = least_end(ops, ranks, child, op)
            if end <= upper:
                least = min(least, end)
                links[made, PARENT] = parent
                links[made, OP] = op
                made = admit(new, links, table, made, len(ops), len(ranks))
    return compact(new, links, made, len(ops)), least
