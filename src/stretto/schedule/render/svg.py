"""A schedule as a drawing for documents: time on x, one lane per rank, colours as in the page.

    ┌──────────────────────────────────────────┐
    │ 1f1b · makespan 33                       │
    │ rank 0 ■■■■            ■■ ■ ■■ ■ ■■      │     lanes, with what runs beside the arithmetic as a thin strip
    │ rank 1   ■■■        ■■ ■ ■■ ■ ■■         │
    │        0         10          20          │
    │ ■ F  ■ B                                 │
    └──────────────────────────────────────────┘

Operations of a kind are one path, so that a drawing of many stays small; it follows the reader's light or dark mode.
"""

from __future__ import annotations

import math
from collections import defaultdict
from html import escape
from typing import TYPE_CHECKING

from stretto.schedule.op import Kind, text
from stretto.schedule.render.colours import COLOURS, bright, declarations, strength

if TYPE_CHECKING:
    from stretto.schedule.schedule import Schedule
    from stretto.schedule.simulate import Timeline

LEFT, RIGHT, TOP, BOTTOM = 62.0, 14.0, 28.0, 46.0
LETTER = 6.2
"""Width of a character in a label."""
STRONG_ENOUGH = 0.75
"""From this strength on, the colour of a label goes by its kind's colour, below by the ground's."""


def draw(timeline: Timeline, *, width: float = 1200.0, until: float | None = None, title: str | None = None) -> str:
    """The drawing as the text of an SVG file, ``width`` pixels wide.

    ``until``: only what begins before that time.  ``title``: instead of the schedule's name and shape.
    """
    schedule, shown = timeline.schedule, min(timeline.makespan, until or timeline.makespan)
    lane = max(6.0, min(30.0, 900.0 / schedule.num_ranks))
    height = TOP + lane * schedule.num_ranks + BOTTOM
    scale = (width - LEFT - RIGHT) / (shown or 1.0)
    shapes, labels = _operations(timeline, lane, scale, shown)
    tones = schedule.num_chunks * len(schedule.placement)
    paths = [
        f'<path class="{Kind(kind).name}" fill-opacity="{strength(tone, tones):.2f}" d="{"".join(parts)}"/>'
        for (kind, tone), parts in sorted(shapes.items())
    ]
    title = title or f"{schedule.name}, {schedule.num_ranks} ranks, {schedule.num_microbatches} micro-batches"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" role="img">',
            f"<title>{escape(title)}: makespan {timeline.makespan:g}</title>",
            f"<style>{_style()}</style>",
            '<rect class="back" width="100%" height="100%"/>',
            f'<text x="{LEFT}" y="17" class="name">{escape(title)}</text>',
            *_lanes(schedule, lane, width),
            *paths,
            *labels,
            *_ruler(shown, scale, TOP + lane * schedule.num_ranks),
            *_legend(sorted({kind for kind, _ in shapes}), height - 12),
            "</svg>\n",
        ]
    )


def _style() -> str:
    """Colours of both modes."""
    fills = "".join(f".{kind.name}{{fill:var(--{kind.name})}}" for kind in COLOURS)
    grounds = (
        "--back:#fff; --lane:#f3f4f6; --ink:#1b1f24; --soft:#646c76;",
        "--back:#14171b; --lane:#1c2026; --ink:#e4e7eb; --soft:#98a1ac;",
    )
    light, dark = (f":root{{{grounds[mode]} {declarations(bool(mode))}}}" for mode in (0, 1))
    return (
        f"{light} @media (prefers-color-scheme: dark){{{dark}}} {fills} .back{{fill:var(--back)}} "
        ".lane{fill:var(--lane)} text{font:11px system-ui,'DejaVu Sans',sans-serif;fill:var(--soft)} "
        ".name{font-size:13px;font-weight:600;fill:var(--ink)} .on{text-anchor:middle;fill:#fff} .dark{fill:#14171b} "
        ".pale{fill:var(--ink)} .end{text-anchor:end} .mid{text-anchor:middle} line{stroke:var(--soft)}"
    )


class _Labels:
    """Names inside operations, all in the fullest form that fits every one which has room for any."""

    def __init__(self, tones: int) -> None:
        self.tones = tones
        self.level = 0
        self.places: list[tuple[str, tuple[str, ...], float]] = []

    def add(self, row: tuple[int, int, int], *, tone: int, x: float, y: float, room: float) -> None:
        """Place a name in the middle of ``room`` from x on."""
        full, number = text(*row), str(row[2])
        forms = (full, full.lstrip("0123456789"), number)[self.tones == 1 :]
        fitting = next((at for at, form in enumerate(forms) if _fits(form, room)), None)
        if fitting is None:
            return
        self.level = max(self.level, fitting)
        look = "pale" if strength(tone, self.tones) < STRONG_ENOUGH else "dark" * bright(COLOURS[Kind(row[0])][0])
        self.places.append((f'<text class="on {look}" x="{x + room / 2:.1f}" y="{y:.1f}">', forms, room))

    def drawn(self) -> list[str]:
        """The elements."""
        chosen = ((place, forms[self.level], room) for place, forms, room in self.places)
        return [f"{place}{form}</text>" for place, form, room in chosen if _fits(form, room)]


def _fits(label: str, room: float) -> bool:
    return len(label) * LETTER + 2 <= room


def _operations(
    timeline: Timeline, lane: float, scale: float, shown: float
) -> tuple[dict[tuple[int, int], list[str]], list[str]]:
    """Pieces of paths by kind and tone, and the labels that have room; until the time ``shown``."""
    schedule, first = timeline.schedule, float(timeline.start.min())
    tone_of, labels = _tones(schedule), _Labels(schedule.num_chunks * len(schedule.placement))
    main = timeline.graph.arithmetic.tolist()
    height = lane * (0.9 if all(main) else 0.72)
    shapes: dict[tuple[int, int], list[str]] = defaultdict(list)
    for rank in range(schedule.num_ranks):
        part, top = timeline.rows(rank), rank * lane + TOP
        columns = ((timeline.start[part] - first).tolist(), (timeline.end[part] - first).tolist(), main[part])
        for (kind, stage, microbatch, _), start, end, on_lane in zip(schedule.rows(rank), *columns, strict=True):
            if end <= start or start >= shown:
                continue
            x, length = LEFT + start * scale, (min(end, shown) - start) * scale
            y, tall = (top, height) if on_lane else (top + height + 1, lane * 0.14)
            room = length - 1 if length > 4 else length
            tone = tone_of[schedule.voice[microbatch]][stage] if kind <= Kind.R else 0
            shapes[kind, tone].append(f"M{x:.2f} {y:.1f}h{room:.2f}v{tall:.1f}h{-room:.2f}z")
            if on_lane and tall >= 11 and kind != Kind.OPT:
                labels.add((kind, stage, microbatch), tone=tone, x=x, y=y + tall / 2 + 4, room=room)
    return shapes, labels.drawn()


def _tones(schedule: Schedule) -> list[list[int]]:
    """Which of its rank's chunks each stage is, by replica; a further replica goes on counting."""
    tones: list[list[int]] = []
    for voice, replica in enumerate(schedule.placement):
        held = [0] * schedule.num_ranks
        tones.append([])
        for rank in replica:
            tones[-1].append(voice * schedule.num_chunks + held[rank])
            held[rank] += 1
    return tones


def _lanes(schedule: Schedule, lane: float, width: float) -> list[str]:
    """Grounds and names of the ranks."""
    every = math.ceil(12 / lane)
    grounds = "".join(
        f"M{LEFT} {TOP + rank * lane:.1f}h{width - LEFT - RIGHT:g}v{lane * 0.9:.1f}h{LEFT + RIGHT - width:g}z"
        for rank in range(schedule.num_ranks)
    )
    names = [
        f'<text class="end" x="{LEFT - 8}" y="{TOP + rank * lane + lane * 0.45 + 4:.1f}">rank {rank}</text>'
        for rank in range(0, schedule.num_ranks, every)
    ]
    return [f'<path class="lane" d="{grounds}"/>', *names]


def _ruler(makespan: float, scale: float, y: float) -> list[str]:
    """Marks at round times, and the makespan."""
    step = round_step(makespan / 10)
    marks = []
    for count in range(int(makespan / step) + 1):
        x = LEFT + count * step * scale
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}"/>')
        marks.append(f'<text class="mid" x="{x:.1f}" y="{y + 15:.1f}">{count * step:.6g}</text>')
    return marks


def round_step(rough: float) -> float:
    """The least of 1, 2 or 5 times a power of ten that isn't below.

    >>> round_step(3.3), round_step(0.07)
    (5.0, 0.1)
    """
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return float(f"{next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough):.9g}")


def _legend(kinds: list[int], y: float) -> list[str]:
    """A patch and a name for each kind."""
    items, x = [], LEFT
    for kind in kinds:
        name = Kind(kind).name
        items.append(f'<rect class="{name}" x="{x:g}" y="{y - 9:g}" width="10" height="10" rx="2"/>')
        items.append(f'<text x="{x + 15:g}" y="{y:g}">{name}</text>')
        x += 32 + 7 * len(name)
    return items
