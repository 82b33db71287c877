"""Two plots of the plan's page: step time against memory, and the roofline.

Lines are drawn in a square of 1000 x 1000 that is stretched over the plot; dots are lines without length, whose round
ends keep their size.  Words and the points that can be reached by keyboard lie over it, placed in percent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import TypeVar

from stretto.planner.axis import Axis
from stretto.planner.estimate import Estimate
from stretto.planner.explain import described
from stretto.planner.front import Point, front
from stretto.planner.plan import Answer
from stretto.planner.roofline import Part, rooflines
from stretto.spec.cluster import ClusterSpec
from stretto.spec.units import BYTES, SECONDS, format_bytes, format_seconds

T = TypeVar("T")
SIDE = 1000
"""Of the square that is drawn into."""
CELLS = 48
"""Per side; of the plans that something beats, the fastest in each cell is drawn."""
BEYOND = 1.3
"""Times the device's memory up to which plans that don't fit are shown."""
SLOW = 5.0
"""Times the fastest step up to which plans are shown."""
FLOPS = {1e15: "PFLOP/s", 1e12: "TFLOP/s", 1e9: "GFLOP/s", 1e6: "MFLOP/s"}
"""Operations a second and their unit."""
NEAR = (0.03, 0.06)
"""Shares of the plot's width and height within which two numbers would hide each other."""
HIGH = 0.8
"""Share of the plot's height from which on numbers give way downwards."""
STEP = 22
"""Pixels by which one gives way, ``NEAR`` of the plot's height."""
FAR = 2.0
"""Times the largest shown plan from which on the limit lies outside."""


def front_plot(answer: Answer, found: Sequence[Point]) -> str:
    """All plans by memory and time; those that nothing beats in both are joined, those of the list numbered."""
    walls, best = _walls(answer), answer.best.seconds
    limit = max(walls)
    near = [point for point in found if point.seconds <= SLOW * best and point.peak <= BEYOND * limit]
    largest = max(point.peak for point in near)
    drawn = limit < FAR * largest
    time = Axis(
        low=min(point.seconds for point in near) / 1.04,
        high=max(point.seconds for point in near) * 1.04,
        logarithmic=True,
    )
    room = Axis(low=0.0, high=max(largest, limit if drawn else 0.0) * 1.03)
    fitting = [point for point in near if point.fits]
    edge, listed = front(fitting), {plan.plan for plan in answer.plans}
    others = _thinned([point for point in near if point.plan not in listed], room, time, set(edge))
    cloud = [(_x(room.at(one.peak)), _y(time.at(one.seconds)), one) for one in others]
    paths = _grid(room, time)
    paths += _dots("cloud", [(x, y) for x, y, one in cloud if one.fits])
    paths += _dots("toolarge", [(x, y) for x, y, one in cloud if not one.fits])
    paths += _steps([(_x(room.at(one.peak)), _y(time.at(one.seconds))) for one in edge])
    over = [_button(room.at(one.peak), time.at(one.seconds), _tip(one)) for one in edge if one.plan not in listed]
    chosen = [Point(plan=plan.plan, seconds=plan.seconds, peak=plan.peak_bytes, fits=True) for plan in answer.plans]
    over += _numbered(
        [(room.at(one.peak), time.at(one.seconds), f"Plan {at}: {_tip(one)}") for at, one in _from_1(chosen)]
    )
    for wall, name in walls.items() if drawn else ():
        x = _x(room.at(wall))
        paths += f'<path class="limit" d="M{x} 0V{SIDE}"/>'
        over.append(f'<span class="limit-name" style="right:{1 - x / SIDE:.2%};margin-right:5px">{escape(name)}</span>')
    data = [[x, y, _tip(one)] for x, y, one in cloud]
    size, second = _unit(BYTES, room.high), "s" if best >= 1 else "ms"
    ticks = _ticks(room, time, BYTES[size], SECONDS[second])
    hidden = len(found) - len(near)
    return (
        f'<div class="plot titled" data-cloud="cloud">{_svg(paths)}{ticks}'
        f'<span class="axis-x">peak memory of the fullest rank, {size}</span>'
        f'<span class="axis-y">step time, {second}</span>'
        f'<div role="group" aria-label="Plans that no other beats in both, and those of the list" data-roving>'
        f"{''.join(over)}</div></div>"
        f'<script type="application/json" id="cloud">{json.dumps(data).replace("<", chr(92) + "u003c")}</script>'
        f'<p class="note">{_words(len(found), len(near) - len(fitting), hidden, walls)}</p>{_table(edge)}'
    )


def roofline_plot(best: Estimate) -> str:
    """The parts of a step under the roof of a device, one plot for each kind of device."""
    each = rooflines(best.work, best.calibration)
    heads = [f"<h3>{escape(machines.name)}</h3>" if len(each) > 1 else "" for machines in each]
    plots = [_roofline(machines, parts, assumed=bool(best.assumed)) for machines, parts in each.items()]
    return "".join(head + plot for head, plot in zip(heads, plots, strict=True))


def _roofline(cluster: ClusterSpec, parts: Sequence[Part], *, assumed: bool) -> str:
    peak, bandwidth = cluster.peak_flops_bfloat16, cluster.memory_bytes_per_second
    ridge = peak / bandwidth
    rates, widths = [part.rate for part in parts], [part.intensity for part in parts]
    across = Axis(low=min(*widths, ridge) / 2, high=max(*widths, ridge) * 3, logarithmic=True)
    up = Axis(low=min(*rates, across.low * bandwidth) / 1.5, high=peak * 1.8, logarithmic=True)
    corner = [(across.low, across.low * bandwidth), (ridge, peak), (across.high, peak)]
    roof = "L".join(f"{_x(across.at(x))} {_y(up.at(y))}" for x, y in corner)
    paths = _grid(across, up) + f'<path class="roof" d="M{roof}"/>'
    tips = [
        f"{at}. {part.name}: {_short(part.intensity)} operations per byte, {_flops(part.rate)}"
        for at, part in _from_1(parts)
    ]
    places = zip(widths, rates, tips, strict=True)
    over = "".join(_numbered([(across.at(width), up.at(rate), tip) for width, rate, tip in places]))
    large = "TFLOP/s" if peak >= 1e12 else "GFLOP/s"
    ticks = _ticks(across, up, 1.0, 1e12 if peak >= 1e12 else 1e9)
    return (
        f'<div class="plot titled">{_svg(paths)}{ticks}'
        '<span class="axis-x">operations per byte moved</span>'
        f'<span class="axis-y">{large}</span>'
        f'<div role="group" aria-label="Parts of a step" data-roving>{over}</div></div>{_parts(parts)}'
        f'<p class="note">One device of {escape(cluster.name)} reaches {_flops(peak)} and moves '
        f"{format_bytes(bandwidth)}/s{' (assumed)' if assumed else ''}: below {ridge:.3g} operations per byte memory "
        "is the limit. A part's distance to the roof is what it leaves unused.</p>"
    )


def _parts(parts: Sequence[Part]) -> str:
    """The numbered parts in words."""
    rows = "".join(
        f'<tr><td>{at}</td><td class="words">{escape(part.name)}, {escape(part.unit)}</td>'
        f"<td>{_short(part.intensity)}</td><td>{_flops(part.rate)}</td><td>{format_seconds(part.seconds)}</td></tr>"
        for at, part in _from_1(parts)
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Parts of a step"><table><thead><tr><th></th>'
        '<th class="words">part</th><th>op/byte</th><th>reached</th><th>time</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _flops(rate: float) -> str:
    unit = next((unit for unit in (1e15, 1e12, 1e9) if rate >= unit), 1e6)
    return f"{rate / unit:.3g} {FLOPS[unit]}"


def _from_1(items: Iterable[T]) -> Iterator[tuple[int, T]]:
    return enumerate(items, start=1)


def _numbered(places: Sequence[tuple[float, float, str]]) -> list[str]:
    """Numbers at their points, moved up or down where they would hide each other; a dot then tells the place."""
    drawn: list[str] = []
    taken: list[tuple[float, float]] = []
    for at, (x, y, tip) in _from_1(places):
        way, moved = -1 if y > HIGH else 1, 0
        while any(
            abs(x - left) < NEAR[0] and abs(y + way * moved * NEAR[1] - up) < NEAR[1] * 0.99 for left, up in taken
        ):
            moved += 1
        taken.append((x, y + way * moved * NEAR[1]))
        if moved:
            place, up = f"left:{x:.2%};top:{1 - y:.2%}", STEP * moved if way > 0 else 0
            drawn.append(f'<span class="stem" style="{place};height:{STEP * moved}px;margin-top:{-up}px"></span>')
            drawn.append(f'<span class="at" style="{place}"></span>')
        drawn.append(_button(x, y, tip, number=at, lift=way * moved))
    return drawn


def _button(x: float, y: float, tip: str, *, number: int | None = None, lift: int = 0) -> str:
    """A point that Tab (the first) and the arrow keys reach."""
    told, lifted = escape(tip, quote=True), f";margin-top:{-10 - STEP * lift}px" if lift else ""
    return (
        f'<button type="button" class="at{" listed" if number else ""}" style="left:{x:.2%};top:{1 - y:.2%}{lifted}" '
        f'tabindex="{0 if number == 1 else -1}" data-tip="{told}" aria-label="{told}">{number or ""}</button>'
    )


def _tip(point: Point) -> str:
    return f"{format_seconds(point.seconds)}, {format_bytes(point.peak)}\n{described(point.plan)}"


def _thinned(points: Iterable[Point], room: Axis, time: Axis, kept: set[Point]) -> list[Point]:
    """The fastest of each cell, without those of the front, which are drawn by themselves."""
    cells: dict[tuple[int, int], Point] = {}
    for point in points:
        if point not in kept:
            cell = int(room.at(point.peak) * CELLS), int(time.at(point.seconds) * CELLS)
            if cell not in cells or point.seconds < cells[cell].seconds:
                cells[cell] = point
    return list(cells.values())


def _walls(answer: Answer) -> dict[float, str]:
    """Memory of each kind of device, and what its line is called."""
    cluster = answer.request.cluster
    if not cluster.groups:
        return {cluster.memory_bytes: "limit"}
    found: dict[float, list[str]] = {}
    for group in cluster.groups:
        found.setdefault(group.memory_bytes, []).append(group.name)
    return {wall: f"limit of {', '.join(names)}" for wall, names in found.items()}


def _words(number: int, too_large: int, hidden: int, walls: Mapping[float, str]) -> str:
    room = " or ".join(format_bytes(wall) for wall in sorted(walls))
    words = f"{number:,} plans were estimated; close ones share a dot. "
    words += f"Blue: nothing that fits a device's {room} is both faster and smaller; of equally fast "
    words += "plans the list has the simplest, which may be larger. "
    words += f"Red: {too_large:,} that don't fit. " if too_large else ""
    return words + (f"{hidden:,} more are too slow or too large to be shown." if hidden else "")


def _table(edge: Sequence[Point]) -> str:
    """The front in words."""
    rows = "".join(
        f"<tr><td>{format_bytes(one.peak)}</td><td>{format_seconds(one.seconds)}</td>"
        f'<td class="words">{escape(described(one.plan))}</td></tr>'
        for one in edge
    )
    return (
        f"<details><summary>The front as a table ({len(edge)} plans)</summary>"
        '<div class="scroll" tabindex="0" role="region" aria-label="The front"><table><thead><tr><th>memory</th>'
        f'<th>step</th><th class="words">plan</th></tr></thead><tbody>{rows}</tbody></table></div></details>'
    )


def _svg(paths: str) -> str:
    return f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">{paths}</svg>'


def _grid(across: Axis, up: Axis) -> str:
    lines = "".join(f"M{_x(across.at(mark))} 0V{SIDE}" for mark in across.marks())
    lines += "".join(f"M0 {_y(up.at(mark))}H{SIDE}" for mark in up.marks())
    return f'<path class="grid" d="{lines}"/><path class="frame" d="M0 0V{SIDE}H{SIDE}"/>'


def _dots(name: str, places: Sequence[tuple[int, int]]) -> str:
    return f'<path class="{name}" d="{"".join(f"M{x} {y}h0" for x, y in places)}"/>' if places else ""


def _steps(places: Sequence[tuple[int, int]]) -> str:
    """The front as stairs: with less memory than the next point, the one before is the fastest."""
    if len(places) < 2:
        return ""
    return f'<path class="line" d="M{places[0][0]} {places[0][1]}{"".join(f"H{x}V{y}" for x, y in places[1:])}"/>'


def _ticks(across: Axis, up: Axis, unit_x: float, unit_y: float) -> str:
    names = "".join(f'<span class="x" style="left:{across.at(m):.2%}">{m / unit_x:g}</span>' for m in across.marks())
    names += "".join(f'<span class="y" style="bottom:{up.at(m):.2%}">{m / unit_y:g}</span>' for m in up.marks())
    return f'<div class="ticks" aria-hidden="true">{names}</div>'


def _unit(units: Mapping[str, int], value: float) -> str:
    """The largest unit that isn't above the value."""
    return [name for name, size in units.items() if size <= max(value, 1)][-1]


def _x(share: float) -> int:
    return round(SIDE * share)


def _y(share: float) -> int:
    return round(SIDE * (1 - share))
