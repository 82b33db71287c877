"""The figures of schedules as an HTML table, one column per schedule, and one row per rank below it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from stretto.schedule.simulate import attribution

if TYPE_CHECKING:
    from stretto.schedule.simulate import Figures, Timeline


def table(timelines: Sequence[Timeline], figures: Sequence[Figures]) -> str:
    """Both tables; a time that differs from the first schedule's says by how much."""
    first = figures[0]
    rows = [
        ("makespan", [_time(figure.makespan, first.makespan) for figure in figures]),
        ("lower bound", [_time(figure.lower_bound, first.lower_bound) for figure in figures]),
        ("span of the longest rank", [_time(figure.span, first.span) for figure in figures]),
        ("bubble", [f"{figure.bubble_rate:.2%}" for figure in figures]),
        ("bubble over the span", [f"{figure.bubble_rate_span:.2%}" for figure in figures]),
        ("peak activation memory", [f"{max(figure.peak_activation):.6g}" for figure in figures]),
    ]
    heads = "".join(f"<th scope=col>{escape(figure.name)}</th>" for figure in figures)
    body = "".join(
        f"<tr><th scope=row>{name}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>" for name, values in rows
    )
    each = "".join(_ranks(timeline, figure) for timeline, figure in zip(timelines, figures, strict=True))
    return (
        f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table>\n"
        f"<details><summary>Each rank</summary>{each}</details>"
    )


def _time(value: float, first: float) -> str:
    """A time, and by how much it differs from that of the first schedule."""
    return f"{value:.6g}" if value == first else f"<small>{value / first - 1:+.1%}</small> {value:.6g}"


def _ranks(timeline: Timeline, figures: Figures) -> str:
    """One row for each rank of a schedule."""
    spent = attribution(timeline)
    columns = (spent.busy, spent.communication, spent.bubble, figures.peak_activation)
    rows = "".join(
        f"<tr><th scope=row>{rank}</th>{''.join(f'<td>{value:.6g}</td>' for value in values)}</tr>"
        for rank, values in enumerate(zip(*columns, strict=True))
    )
    heads = "".join(f"<th scope=col>{name}</th>" for name in ("rank", "busy", "communication", "bubble", "peak memory"))
    return (
        f"<table><caption>{escape(figures.name)}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )
