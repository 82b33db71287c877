"""Why a schedule takes as long as it does: where each rank's time goes, and what the makespan hangs on.

rank  busy  communication  bubble  peak activation
0       24              0       9                4
...
critical path: 22 operations, F 11 + B 22
  0F0 1F0 2F0 3F0 3B0 3F1 3B1 ...
"""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any

from stretto.schedule.op import Kind
from stretto.schedule.simulate import attribution, critical_path, memory_curve
from stretto.schedule.simulate.attribution import ops_of

if TYPE_CHECKING:
    from stretto.schedule.simulate import Timeline

SMALL = 1e-9
"""Share of the makespan that is nothing but rounding."""


def as_data(timeline: Timeline) -> dict[str, Any]:
    """What ``--explain --json`` adds to the figures.

    ``communication`` and ``bubble`` per rank (with ``busy`` they add up to the makespan), ``critical_path`` as
    operations, ``memory_curve`` per rank as pairs of a time and the memory from then on.
    """
    spent = attribution(timeline)
    curves = memory_curve(timeline)
    return {
        "communication": spent.communication,
        "bubble": spent.bubble,
        "critical_path": [str(op) for op in ops_of(timeline, critical_path(timeline))],
        "memory_curve": [list(zip(curve.times.tolist(), curve.values.tolist(), strict=True)) for curve in curves],
    }


def as_text(timeline: Timeline, peaks: tuple[float, ...], *, width: int = 120) -> str:
    """The table of ranks, and the critical path named operation by operation."""
    spent = attribution(timeline)
    columns = ("rank", "busy", "communication", "bubble", "peak activation")
    rows = [
        (f"{rank}", *(f"{value:.6g}" for value in values))
        for rank, values in enumerate(zip(spent.busy, spent.communication, spent.bubble, peaks, strict=True))
    ]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:>{room}}" if at else f"{cell:<{room}}"
            for at, (cell, room) in enumerate(zip(row, widths, strict=True))
        )
        for row in (columns, *rows)
    ]
    path = critical_path(timeline)
    lines.append(f"critical path: {len(path)} operations, {_sums(timeline, path)}")
    lines += [f"  {line}" for line in wrap(" ".join(map(str, ops_of(timeline, path))), width - 2)]
    return "\n".join(lines)


def _sums(timeline: Timeline, path: tuple[int, ...]) -> str:
    """Time of each kind on the path, and what passes between them: latency."""
    spent: dict[str, float] = {}
    for row in path:
        name = Kind(int(timeline.schedule.kind[row])).name
        spent[name] = spent.get(name, 0.0) + float(timeline.end[row] - timeline.start[row])
    between = timeline.makespan - sum(spent.values())
    if between > SMALL * timeline.makespan:
        spent["latency"] = between
    return " + ".join(f"{name} {time:.6g}" for name, time in spent.items())
