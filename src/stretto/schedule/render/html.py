"""Schedules as one page for a browser, to explore and compare; it needs no network and no other file.

The page is ``page/page.html`` with the style and scripts beside it put in, and the schedules' columns as
compressed integers:

    header    JSON: what the schedules are, and the length of each column
    columns   base64 of zlib of all columns; each is the differences of its int32 values, split into four
              planes of bytes, lowest first, so that the repetition of a steady state shows

A schedule of 100,000 operations makes a page of about 100 kilobytes.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from stretto.schedule.op import PER_BLOCK, Kind
from stretto.schedule.render.colours import PALER, declarations
from stretto.schedule.render.figures_table import table
from stretto.schedule.render.scene import Scene, scene
from stretto.schedule.simulate.streams import STREAM_OF

if TYPE_CHECKING:
    import numpy.typing as npt

    from stretto.schedule.simulate import Figures, Timeline

SCRIPTS = ("columns.js", "colours.js", "panel.js", "details.js", "page.js")
DIGITS = 9
"""Significant digits of a makespan in ticks; it fits an int32."""
MEMORY_SCALE = 1_000_000
"""Memory is kept to a millionth of its unit."""


def page(timelines: Sequence[Timeline], *, figures: Sequence[Figures], memory_limit: float | None = None) -> str:
    """The page of one schedule, or of several on one axis of time; ``memory_limit`` is drawn into the curves."""
    parts = [
        _described(scene(timeline), figure, memory_limit) for timeline, figure in zip(timelines, figures, strict=True)
    ]
    header = {
        "kinds": [kind.name for kind in Kind],
        "beside": sorted(kind.name for kind in STREAM_OF),
        "per_block": sorted(kind.name for kind in PER_BLOCK),
        "paler": PALER,
        "memory_scale": MEMORY_SCALE,
        "memory_top": max([memory_limit or 0.0, 1e-9, *(max(figure.peak_activation) for figure in figures)]) * 1.05,
        "memory_limit": memory_limit,
        "schedules": [about for about, _ in parts],
    }
    columns = zlib.compress(b"".join(column for _, column in parts), 9)
    folder = resources.files("stretto.schedule.render") / "page"
    read = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)}
    colours = {"light": declarations(dark=False), "dark": declarations(dark=True)}
    values = {
        "title": escape(_title(figures)),
        "style": _filled(read["page.css"], colours),
        "figures": table(timelines, figures),
        "header": json.dumps(header).replace("<", "\\u003c"),
        "columns": base64.b64encode(columns).decode(),
        "script": "\n".join(read[name] for name in SCRIPTS),
    }
    return _filled(read["page.html"], values)


def _filled(template: str, values: dict[str, str]) -> str:
    """The template with each ``{{name}}`` replaced, in one pass: what is put in isn't looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _title(figures: Sequence[Figures]) -> str:
    first = figures[0]
    shape = f"{first.ranks} ranks, {first.microbatches} micro-batches"
    return f"{' and '.join(figure.name for figure in figures)}: {shape}"


def _described(shown: Scene, figures: Figures, memory_limit: float | None) -> tuple[dict[str, Any], bytes]:
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
        "line": _line(figures) + (f" (limit {memory_limit:g})" if memory_limit is not None else ""),
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
