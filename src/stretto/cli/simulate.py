"""``stretto simulate``: time and draw a pipeline schedule without running it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stretto.spec.errors import ConfigError

if TYPE_CHECKING:
    from stretto.schedule.schedule import Schedule
    from stretto.schedule.simulate.figures import Figures

SUMMARY = "time and draw a pipeline schedule without running it"
DESCRIPTION = """\
Build a schedule (or read one), check that it is complete, ordered and free of deadlocks, and print its
drawing and figures: makespan, bubble, activation memory of each rank. Times are in the unit of the costs,
which are those of a rank's whole share of the model."""
EXAMPLES = (
    "stretto simulate --schedule 1f1b --pp 4 --microbatches 8",
    "stretto simulate --schedule interleaved --pp 4 --microbatches 8 --chunks 2 --cost F=1,I=1,W=1,comm=0.1 --json",
    "stretto simulate --schedule-file schedule.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what simulate takes."""
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--schedule", metavar="NAME", help="family to build, for example 1f1b")
    origin.add_argument("--schedule-file", metavar="FILE", type=Path, help="schedule file to read")
    parser.add_argument("--pp", type=int, metavar="R", help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, metavar="M", help="micro-batches of a step")
    parser.add_argument("--chunks", type=int, metavar="V", help="stages per rank (1)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the family")
    parser.add_argument("--cost", default="", metavar="F=1,I=1,W=1,comm=0,act_w=1", help="costs of the operations")
    parser.add_argument("--export", metavar="FILE", type=Path, help="also write the schedule as a schedule file")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON alone")


def execute(options: argparse.Namespace) -> int:
    """Simulate and print."""
    from stretto.schedule.document import save
    from stretto.schedule.render.text import draw
    from stretto.schedule.simulate import Costs, run, simulate
    from stretto.schedule.validate import validate

    costs = Costs.parse(options.cost)
    schedule = _schedule(options)
    validate(schedule)
    figures = simulate(schedule, costs)
    if options.export is not None:
        _writable(options.export)
        save(schedule, options.export)
    if options.json:
        print(json.dumps(dataclasses.asdict(figures)))
    else:
        print(draw(run(schedule, costs)))
        print(_table(figures))
    return 0


def _schedule(options: argparse.Namespace) -> Schedule:
    shape = {"--pp": options.pp, "--microbatches": options.microbatches, "--chunks": options.chunks}
    if options.schedule_file is not None:
        given = [name for name, value in shape.items() if value is not None] + ["--option"] * bool(options.option)
        if given:
            raise ConfigError(f"The schedule file says its own shape; leave out {', '.join(given)}.")
        from stretto.schedule.document import load

        return load(options.schedule_file)
    missing = [name for name in ("--pp", "--microbatches") if shape[name] is None]
    if missing:
        raise ConfigError(f"--schedule {options.schedule} also needs {' and '.join(missing)}.")
    from stretto.schedule.families import build

    return build(
        options.schedule,
        ranks=options.pp,
        microbatches=options.microbatches,
        chunks=1 if options.chunks is None else options.chunks,
        options=dict(_option(text) for text in options.option),
    )


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--option {text}: write KEY=VALUE, for example waves=2.")
    try:
        return name, json.loads(value)  # numbers, true, false and lists; a name is the string that it is
    except json.JSONDecodeError:
        return name, value


def _writable(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--export {path}: name a file in a folder that exists.")


def _table(figures: Figures) -> str:
    rows = [
        ("makespan", f"{figures.makespan:g}"),
        ("lower bound", f"{figures.lower_bound:g}"),
        ("bubble", f"{figures.bubble_rate:.1%} of all ranks' time"),
        ("peak activation", " ".join(f"{peak:g}" for peak in figures.peak_activation)),
    ]
    return "\n".join(f"{name:<16} {value}" for name, value in rows)
