"""``stretto simulate``: build, check, time and draw a pipeline schedule without running it.

    origin     --schedule NAME --pp R --microbatches M, or --schedule-file FILE
    changes    --pass NAME, in the order given
    costs      --cost F=1,... or --costs costs.json
    results    the drawing and a table, or --json; --html --svg --trace --export write files

Everything is computed before the first file is written, so that a command that fails leaves nothing behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stretto.cli.schedule_list import listing, listing_json
from stretto.cli.schedules import Timed, asked_for
from stretto.spec.errors import ConfigError

if TYPE_CHECKING:
    from stretto.schedule.schedule import Schedule

SUMMARY = "time and draw a pipeline schedule without running it"
DESCRIPTION = """\
Build a schedule (or read one), check that it is complete, ordered and free of deadlocks, and print its
drawing and figures: makespan, bubble, activation memory of each rank. Times are in the unit of the costs,
which are those of a rank's whole share of the model; memory is in micro-batches over that share, so that
1f1b peaks at R on rank 0. --list names all families."""
EXAMPLES = (
    "stretto simulate --list",
    "stretto simulate --schedule 1f1b --pp 4 --microbatches 8",
    "stretto simulate --schedule interleaved --pp 4 --microbatches 8 --chunks 2 --cost F=1,I=1,W=1,comm=0.1 --json",
    "stretto simulate --schedule 1f1b --pp 4 --microbatches 8 --against gpipe --html compared.html",
    "stretto simulate --schedule 1f1b --pp 4 --microbatches 8 --pass split-backward --lowered --export schedule.json",
    "stretto simulate --schedule auto --pp 4 --microbatches 8 --memory-limit 2 --cost F=20,I=36,W=6,comm=0.5",
    "stretto simulate --schedule-file schedule.json --costs costs.json --trace trace.json",
)
OUTPUTS = ("export", "html", "svg", "trace")
"""Options that name a file to write."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what simulate takes."""
    origin = parser.add_argument_group("what to simulate")
    one = origin.add_mutually_exclusive_group(required=True)
    one.add_argument("--schedule", metavar="NAME", help="family to build, for example 1f1b")
    one.add_argument("--schedule-file", metavar="FILE", type=Path, help="schedule file to read")
    one.add_argument("--list", action="store_true", help="name all families and passes")
    origin.add_argument("--pp", type=int, metavar="R", help="pipeline ranks")
    origin.add_argument("--microbatches", type=int, metavar="M", help="micro-batches of a step")
    origin.add_argument("--chunks", type=int, metavar="V", help="stages per rank (the family's own count, or 1)")
    origin.add_argument(
        "--option", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="option of the family"
    )
    origin.add_argument("--time-budget", type=float, metavar="S", help="seconds that --schedule auto may search")
    origin.add_argument("--seed", type=int, metavar="N", help="seed of --schedule auto; equal seeds, equal schedules")
    origin.add_argument(
        "--pass", dest="passes", action="append", default=[], metavar="NAME[:KEY=VALUE,...]",
        help="change the schedule by a pass; may be given several times",
    )  # fmt: skip
    origin.add_argument(
        "--against", action="append", default=[], metavar="NAME[:KEY=VALUE,...]|FILE",
        help="show beside it another family of the same shape and costs, or a schedule file; without passes",
    )  # fmt: skip
    under = parser.add_argument_group("under which costs")
    costs = under.add_mutually_exclusive_group()
    costs.add_argument("--cost", default="", metavar="F=1,I=1,W=1,comm=0,act_w=1", help="costs of the operations")
    costs.add_argument("--costs", metavar="FILE", type=Path, help="costs per stage, as JSON")
    under.add_argument(
        "--network",
        default="",
        metavar="manner=overlapped,...",
        help="how messages travel: manner (overlapped, blocking, rendezvous), message_bytes, bandwidth, in_flight",
    )
    under.add_argument(
        "--memory-limit", type=float, metavar="X", help="activation memory that no rank may exceed, in micro-batches"
    )
    results = parser.add_argument_group("what to do with it")
    results.add_argument("--json", action="store_true", help="print the figures as JSON alone")
    results.add_argument("--explain", action="store_true", help="where the time of each rank goes; the critical path")
    results.add_argument("--lowered", action="store_true", help="show and export the messages between ranks too")
    results.add_argument("--export", metavar="FILE", type=Path, help="write the schedule as a schedule file")
    results.add_argument("--html", metavar="FILE", type=Path, help="write a page to explore it in a browser")
    results.add_argument("--svg", metavar="FILE", type=Path, help="write a drawing")
    results.add_argument("--trace", metavar="FILE", type=Path, help="write a trace for Perfetto (ui.perfetto.dev)")


def execute(options: argparse.Namespace) -> int:
    """Simulate, write the files that are asked for, and print."""
    if options.list:
        print(listing_json() if options.json else listing())
        return 0
    _check_outputs(options)
    from stretto.schedule.simulate import Costs

    timed = asked_for(options, Costs.parse(options.cost) if options.costs is None else Costs.load(options.costs))
    for path, content in _files(options, timed).items():
        path.write_text(content, encoding="utf-8")
    if options.json:
        document = _document(timed[0], options.explain)
        if options.against:
            document["against"] = [_document(other, options.explain) for other in timed[1:]]
        print(json.dumps(document))
    else:
        print(_shown(options, timed))
        print(_table(timed))
    return 0


def _document(each: Timed, explain: bool) -> dict[str, Any]:
    """The figures; of a schedule that was searched for also how good it can be, ``lower_bound`` being its space's."""
    document = dataclasses.asdict(each.figures)
    if each.search is not None:
        document |= {name: getattr(each.search, name) for name in ("gap", "proven", "layout", "reason")}
    if explain:
        from stretto.schedule.render.explanation import as_data

        document |= as_data(each.timeline)
    return document


def _check_outputs(options: argparse.Namespace) -> None:
    """Raise ConfigError where a file that is asked for can't be written, before any work is done."""
    taken: dict[Path, str] = {}
    for name in OUTPUTS:
        path = getattr(options, name)
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"--{name} {path}: name a file in a folder that exists.")
        if path.resolve() in taken:
            raise ConfigError(f"--{name} {path}: --{taken[path.resolve()]} writes that file already.")
        taken[path.resolve()] = name


def _files(options: argparse.Namespace, timed: list[Timed]) -> dict[Path, str]:
    """What is to be written where."""
    files: dict[Path, str] = {}
    if options.export is not None:
        from stretto.schedule.document import to_json

        files[options.export] = to_json(_written(timed[0].schedule, options.lowered)) + "\n"
    if options.html is not None:
        from stretto.schedule.render.html import page

        figures = [each.figures for each in timed]
        timelines = [each.timeline for each in timed]
        files[options.html] = page(timelines, figures=figures, memory_limit=options.memory_limit)
    if options.svg is not None:
        from stretto.schedule.render import svg

        files[options.svg] = svg.draw(timed[0].timeline)
    if options.trace is not None:
        from stretto.schedule.render import trace

        parts = [trace.events(each.timeline, process=process) for process, each in enumerate(timed, start=1)]
        parts[0]["traceEvents"] = [event for part in parts for event in part["traceEvents"]]
        files[options.trace] = json.dumps(parts[0], separators=(",", ":")) + "\n"
    return files


def _written(schedule: Schedule, lowered: bool) -> Schedule:
    """The schedule with the messages between its ranks, or with its compute operations alone."""
    from stretto.schedule.op import COMPUTE
    from stretto.schedule.passes.communication import lower

    if lowered:
        return lower(schedule)
    if set(schedule.kind.tolist()) <= COMPUTE:
        return schedule
    return schedule.with_orders(
        [[op for op in schedule.ops(rank) if op.kind in COMPUTE] for rank in range(schedule.num_ranks)]
    )


def _shown(options: argparse.Namespace, timed: list[Timed]) -> str:
    """The drawings, named where there are several; the orders with their messages where ``--lowered`` asks for them."""
    from stretto.schedule.render.text import draw, orders

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    shown = []
    for each in timed:
        name = [each.schedule.name] if len(timed) > 1 else []
        parts = [*name, draw(each.timeline, colour=colour)]
        parts += [orders(_written(each.schedule, True))] * options.lowered
        if options.explain:
            from stretto.schedule.render.explanation import as_text

            parts.append(as_text(each.timeline, each.figures.peak_activation))
        shown.append("\n".join(parts))
    return "\n\n".join(shown)


def _table(timed: list[Timed]) -> str:
    """The figures as aligned lines, one column per schedule."""
    columns = []
    for each in timed:
        figures, search = each.figures, each.search
        columns.append(
            {
                "": figures.name,
                "makespan": f"{figures.makespan:g}",
                "lower bound": f"{figures.lower_bound:g}" + " for all placements" * bool(search),
                "gap": ("0: proven optimal" if search.proven else f"{search.gap:.2%}, not proven optimal")
                if search
                else "",
                "placement": search.layout if search else "",
                "bound set by": search.reason if search and len(timed) == 1 else "",
                "bubble": f"{figures.bubble_rate:.1%} of all ranks' time",
                "peak activation": _peaks(figures.peak_activation, room=100 // len(timed)),
            }
        )
    widths = [max(map(len, column.values())) for column in columns]
    lines = []
    for name in columns[0]:
        cells = [f"{column[name]:<{width}}" for column, width in zip(columns, widths, strict=True)]
        if "".join(cells).strip() and (name or len(timed) > 1):
            lines.append(f"{name:<16} {'   '.join(cells)}".rstrip())
    return "\n".join(lines)


def _peaks(peaks: tuple[float, ...], room: int) -> str:
    """The peak of each rank; where that is too long, of runs of ranks, or only the largest and the smallest."""
    each = " ".join(f"{peak:g}" for peak in peaks)
    if len(each) <= room:
        return each
    runs = [(peak, len(list(run))) for peak, run in groupby(peaks)]
    counted = ", ".join(f"{count} ranks {peak:g}" for peak, count in runs)
    if len(counted) <= room:
        return counted
    most, least = max(peaks), min(peaks)
    return f"{most:g} on rank {peaks.index(most)} to {least:g} on rank {peaks.index(least)}"
