"""The arguments that verbs about a run share: the run file and what is written over it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stretto.spec.check import check
from stretto.spec.plan import PlanSpec
from stretto.spec.resolve import load_run
from stretto.spec.run import RunSpec


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``RUN_FILE`` and ``--set``."""
    parser.add_argument("run_file", metavar="RUN_FILE", type=Path, help="TOML file that describes the run")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="write over keys of the run file, for example plan.pp=4 plan.stages=[3,5] run.dir=runs/a",
    )


def fill_in(run: RunSpec, pins: Mapping[str, Any]) -> PlanSpec:
    """The planner, loaded where a run file says ``auto``."""
    from stretto.planner.plan import fill_in as planned

    return planned(run, pins)


def read_run(options: argparse.Namespace, *, data: bool = True) -> RunSpec:
    """The run that the arguments name, resolved and checked; ``data`` is False where no corpus is read."""
    run = load_run(options.run_file, options.overrides, planner=fill_in)
    check(run, data=data)
    return run
