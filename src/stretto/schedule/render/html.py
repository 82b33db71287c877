"""Schedules as one page for a browser, to explore and compare; it needs no network and no other file.

The page is ``page/page.html`` with the style and scripts beside it put in, and the schedules' columns as
compressed integers:

    header    JSON: what the schedules are, and the length of each column
    columns   base64 of zlib of all columns; each is the differences of its int32 values, split into four
              planes of bytes, lowest first, so that the repetition of a steady state shows

A schedule of 100,000 operations makes a page of about half a megabyte.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from stretto.schedule.op import PER_BLOCK, Kind
from stretto.schedule.render.scene import BESIDE, Scene, scene

if TYPE_CHECKING:
    import numpy.typing as npt

    from stretto.schedule.simulate import Costs, Figures, Timeline

SCRIPTS = ("columns.js", "colours.js", "panel.js", "details.js", "page.js")
DIGITS = 9
"""Significant digits of a makespan in ticks; it fits an int32."""
MEMORY_SCALE = 1_000_000
"""Memory is kept to a millionth of its unit."""


def page(
    timelines: Sequence[Timeline], *, figures: Sequence[Figures], costs: Costs, memory_limit: float | None = None
) -> str:
    """The page of one schedule, or of several under each other on one axis of time."""
    scenes = [scene(timeline, costs) for timeline in timelines]
    parts = [_described(shown, figure) for shown, figure in zip(scenes, figures, strict=True)]
    header = {
        "kinds": [kind.name for kind in Kind],
        "beside": sorted(kind.name for kind in BESIDE),
        "per_block": sorted(kind.name for kind in PER_BLOCK),
        "memory_scale": MEMORY_SCALE,
        "memory_top": max([memory_limit or 0.0, 1e-9, *(max(figure.peak_activation) for figure in figures)]) * 1.05,
        "memory_limit": memory_limit,
        "schedules": [about for about, _ in parts],
    }
    columns = zlib.compress(b"".join(column for _, column in parts), 9)
    folder = resources.files("stretto.schedule.render") / "page"
    read = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)}
    values = {
        "title": escape(_title(figures)),
        "style": read["page.css"],
        "figures": _table(figures),
        "header": json.dumps(header).replace("<", "\\u003c"),
        "columns": base64.b64encode(columns).decode(),
        "script": "\n".join(read[name] for name in SCRIPTS),
    }
    text = read["page.html"]
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def _title(figures: Sequence[Figures]) -> str:
    first = figures[0]
    shape = f"{first.ranks} ranks, {first.microbatches} micro-batches"
    return f"{' and '.join(figure.name for figure in figures)}: {shape}"


def _described(shown: Scene, figures: Figures) -> tuple[dict[str, Any], bytes]:
    """A schedule's part of the header, and its columns."""
    schedule = shown.schedule
    digits = DIGITS - math.ceil(math.log10(shown.makespan)) if shown.makespan > 0 else 0
    times = {"start": shown.start, "end": shown.end}
    columns: dict[str, npt.NDArray[Any]] = {
        "kind": schedule.kind,
        "stage": schedule.stage,
        "microbatch": schedule.microbatch,
        **{name: np.rint(values * 10.0**digits) for name, values in times.items()},
        "cause": shown.cause,
        "source": shown.source,
        "critical": shown.critical,
        "memoryAt": np.rint(shown.memory_at * 10.0**digits),
        "memory": np.rint(shown.memory * MEMORY_SCALE),
    }
    about = {
        "name": schedule.name,
        "line": _line(figures),
        "ranks": schedule.num_ranks,
        "stages": schedule.num_stages,
        "chunks": schedule.num_chunks,
        "placement": schedule.placement,
        "voice": schedule.voice,
        "offsets": schedule.offsets.tolist(),
        "memoryOffsets": shown.memory_offsets.tolist(),
        "digits": digits,
        "makespan": shown.makespan,
        "busy": figures.busy,
        "peak": figures.peak_activation,
        "columns": [[name, len(values)] for name, values in columns.items()],
    }
    return about, b"".join(_packed(values) for values in columns.values())


def _packed(values: npt.NDArray[Any]) -> bytes:
    """Differences of int32 values, four planes of bytes."""
    steps = np.diff(values.astype(np.int64), prepend=0).astype(np.int32)
    return steps.astype("<i4").view(np.uint8).reshape(-1, 4).T.tobytes()


def _line(figures: Figures) -> str:
    """The figures in a line."""
    peak = max(figures.peak_activation)
    return (
        f"makespan {figures.makespan:g} · lower bound {figures.lower_bound:g} · bubble {figures.bubble_rate:.1%}"
        f" · peak memory {peak:g} on rank {figures.peak_activation.index(peak)}"
    )


def _table(figures: Sequence[Figures]) -> str:
    """The figures side by side, what differs from the first in per cent, and those of each rank."""
    rows = [
        ("makespan", [_time(figure.makespan, figures[0].makespan) for figure in figures]),
        ("lower bound", [_time(figure.lower_bound, figures[0].lower_bound) for figure in figures]),
        ("span of the longest rank", [_time(figure.span, figures[0].span) for figure in figures]),
        ("bubble", [f"{figure.bubble_rate:.2%}" for figure in figures]),
        ("bubble over the span", [f"{figure.bubble_rate_span:.2%}" for figure in figures]),
        ("peak activation memory", [f"{max(figure.peak_activation):.6g}" for figure in figures]),
    ]
    heads = "".join(f"<th scope=col>{escape(figure.name)}</th>" for figure in figures)
    body = "".join(
        f"<tr><th scope=row>{name}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>" for name, values in rows
    )
    each = "".join(_ranks(figure) for figure in figures)
    return (
        f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table>\n"
        f"<details><summary>Each rank</summary>{each}</details>"
    )


def _time(value: float, first: float) -> str:
    """A time, and by how much it differs from that of the first schedule."""
    return f"{value:.6g}" if value == first else f"<small>{value / first - 1:+.1%}</small> {value:.6g}"


def _ranks(figures: Figures) -> str:
    """One row for each rank of a schedule."""
    rows = "".join(
        f"<tr><th scope=row>{rank}</th><td>{busy:.6g}</td><td>{1 - busy / figures.makespan:.1%}</td>"
        f"<td>{peak:.6g}</td></tr>"
        for rank, (busy, peak) in enumerate(zip(figures.busy, figures.peak_activation, strict=True))
    )
    return (
        f"<table><caption>{escape(figures.name)}</caption><thead><tr><th scope=col>rank</th><th scope=col>busy</th>"
        f"<th scope=col>idle</th><th scope=col>peak memory</th></tr></thead><tbody>{rows}</tbody></table>"
    )
