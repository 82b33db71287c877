"""``stretto diagnose --calibrate``: measure this machine for the planner."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stretto.spec.errors import ConfigError
from stretto.spec.units import format_seconds

if TYPE_CHECKING:
    from stretto.planner.machine import Machine

DEFAULT = Path("calibration.toml")
"""Where the figures go."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what calibrating takes to ``diagnose``."""
    group = parser.add_argument_group("measuring this machine instead of reading a run")
    group.add_argument("--calibrate", action="store_true", help="measure this machine's CPU for stretto plan")
    group.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help=f"where the figures go, .toml or .json ({DEFAULT})"
    )
    group.add_argument("--processes", type=int, metavar="N", help="processes at work together (as many as cores, 4-16)")


def execute(options: argparse.Namespace) -> int:
    """Measure, write and print."""
    path: Path = options.out or DEFAULT
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"--out {path} must end in .toml or .json.")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--out {path} can't be written; name a file in a folder that exists.")
    from stretto.planner.calibration_file import write_calibration
    from stretto.trainer.calibrate import calibrate

    machine = calibrate(processes=options.processes, say=lambda line: print(line, file=sys.stderr, flush=True))
    write_calibration(machine, path)
    print(
        json.dumps(machine.as_data())
        if options.json
        else f"{shown(machine)}\nwrote {path}: stretto plan --calibration {path}"
    )
    return 0


def shown(machine: Machine) -> str:
    """The figures that people look at first."""
    side = machine.sides[-1]
    rate = 2.0 * side**3 / machine.product(side, side, side)
    size, seconds = machine.copy.points[-1]
    most, slower = machine.contention[-1]
    ranks = max(ranks for _, ranks, _ in machine.collectives)
    lines = (
        ("products", f"{rate / 1e9:.0f} GFLOP/s in {machine.dtype}, {side} x {side} x {side}, one thread"),
        ("memory", f"{size / seconds / 1e9:.1f} GB/s read and written"),
        ("message", f"{format_seconds(machine.messages.at(64))}, of 1 MB {format_seconds(machine.messages.at(1e6))}"),
        ("all-reduce", f"1 MB over {ranks} ranks in {format_seconds(machine.collective('all_reduce', ranks, 1e6))}"),
        ("cores", f"{machine.cores}; of {most} processes at work each takes {slower:.2f} times as long"),
        (
            "runtime",
            f"{format_seconds(machine.operation_seconds)} an operation, {format_seconds(machine.step_seconds)} a step",
        ),
        ("spread", f"{machine.spread:.1%} between repeated measurements"),
    )
    return "\n".join(f"{name:<11} {figure}" for name, figure in lines)
