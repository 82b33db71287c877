"""Stacked bars of the plan's page: where the time of each plan goes, and the memory of each rank.

Bars are plain boxes with widths in percent, so that they fit every screen and their text keeps its size.  Each has its
figures as a tip and as its name for a screen reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from stretto.planner.estimate import Estimate
from stretto.planner.explain import described, kinds, parts
from stretto.planner.groups import limits
from stretto.spec.units import format_bytes, format_seconds

COLOURS: Mapping[str, str] = {
    "arithmetic": "--F",
    "bubble": "--idle",
    "tp communication": "--B",
    "cp communication": "--I",
    "pp communication": "--REDUCE_GRAD",
    "dp communication": "--R",
    "offloading": "--O",
    "optimizer": "--W",
    "parameters": "--F",
    "gradients": "--R",
    "activations": "--B",
    "logits": "--I",
    "temporaries": "--S",
    "reserve": "--idle",
}
"""Colour of a cause or a kind, by the style sheet's name."""
MANY = 24
"""Bars from which on they are thin."""
FAR = 3.0
"""Times the largest bar from which on a limit is said, not drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar: its name, its parts, and what the parts add up to."""

    name: str
    parts: Mapping[str, float]
    total: str
    tip: str


def time_bars(plans: Sequence[Estimate]) -> str:
    """One bar a plan, all on one scale."""
    bars = []
    for number, plan in enumerate(plans, start=1):
        of_plan = times(plan)
        told = "\n".join(f"{name} {format_seconds(s)} ({s / plan.seconds:.1%})" for name, s in of_plan.items() if s > 0)
        tip = f"{number}. {described(plan.plan)}\n{told}"
        bars.append(Bar(name=f"plan {number}", parts=of_plan, total=format_seconds(plan.seconds), tip=tip))
    return _legend(bars) + _bars(bars, "Time of a step by cause")


def times(plan: Estimate) -> dict[str, float]:
    """Seconds of a step by cause; what messages between stages add is told apart from filling and draining."""
    found = parts(plan)
    messages = min(plan.exposed.get("pp", 0.0), found["bubble"])
    found["bubble"] -= messages
    order = [name for name in COLOURS if name in found or name == "pp communication"]
    return {name: found.get(name, messages) for name in order}


def memory_bars(plans: Sequence[Estimate]) -> str:
    """One bar a pipeline rank, for the plan that is chosen; the device's limit across."""
    buttons, blocks = [], []
    for number, plan in enumerate(plans, start=1):
        room = limits(plan.work)
        bars = [
            Bar(
                name=f"rank {rank}",
                parts=kinds(memory),
                total=format_bytes(memory.total),
                tip=f"pipeline rank {rank}: {format_bytes(memory.total)} of {format_bytes(room[rank])}\n"
                + "\n".join(f"{name} {format_bytes(value)}" for name, value in kinds(memory).items() if value),
            )
            for rank, memory in enumerate(plan.memory)
        ]
        drawn = max(room) < FAR * plan.peak_bytes
        several = " and ".join(format_bytes(limit) for limit in sorted(set(room)))
        note = "the red line" if drawn else "far to the right of this"
        blocks.append(
            f'<div id="memory-{number}"><p class="note">{number}. {escape(described(plan.plan))}. '
            f"A device has {several}: {note}.</p>{_legend(bars)}"
            f"{_bars(bars, 'Peak memory by kind', room if drawn else None)}</div>"
        )
        buttons.append(
            f'<button type="button" aria-pressed="false" aria-controls="memory-{number}">Plan {number}</button>'
        )
    choice = f'<div class="choice" role="group" aria-label="Plan" hidden>{"".join(buttons)}</div>'
    return (choice if len(plans) > 1 else "") + "".join(blocks)


def _bars(bars: Sequence[Bar], name: str, room: Sequence[float] | None = None) -> str:
    """Bars under each other; ``room``: a line across each of them."""
    top = max([sum(bar.parts.values()) for bar in bars] + [limit * 1.01 for limit in room or ()])
    rows = []
    for at, bar in enumerate(bars):
        pieces = "".join(
            f'<i style="width:{value / top:.2%};background:var({COLOURS[part]})"></i>'
            for part, value in bar.parts.items()
            if value / top >= 5e-5
        )
        line = f'<i class="limit" style="left:{room[at] / top:.2%}"></i>' if room else ""
        tip = escape(bar.tip, quote=True)
        rows.append(
            f'<div class="row" role="img" tabindex="{-1 if at else 0}" data-tip="{tip}" aria-label="{tip}">'
            f"<span>{bar.name}</span>"
            f'<span class="track">{pieces}{line}</span><span class="sum">{bar.total}</span></div>'
        )
    many = " many" if len(bars) > MANY else ""
    return f'<div class="bars{many}" role="group" aria-label="{name}" data-roving>{"".join(rows)}</div>'


def _legend(bars: Sequence[Bar]) -> str:
    """A patch and a name for each part that is anywhere."""
    present = dict.fromkeys(name for bar in bars for name, value in bar.parts.items() if value > 0)
    order = sorted(present, key=list(bars[0].parts).index)
    items = (f'<li><i style="background:var({COLOURS[name]})"></i>{name}</li>' for name in order)
    return f'<ul class="legend">{"".join(items)}</ul>'
