"""``stretto diagnose RUN --refine CALIBRATION``: correct a calibration by what a run measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from stretto.spec.errors import ConfigError
from stretto.spec.units import format_seconds

if TYPE_CHECKING:
    from stretto.planner.refine import Refined


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what refining takes to ``diagnose``; ``--out`` is that of --calibrate."""
    group = parser.add_argument_group("refining a calibration by a run")
    group.add_argument(
        "--refine",
        type=Path,
        metavar="CALIBRATION",
        help="correct this file's figures by the run's trace and write them to --out (CALIBRATION-refined)",
    )


def execute(options: argparse.Namespace) -> int:
    """Refine, write and print."""
    given: Path = options.refine
    path: Path = options.out or given.with_name(f"{given.stem}-refined{given.suffix}")
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"--out {path} must end in .toml or .json.")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--out {path} can't be written; name a file in a folder that exists.")
    from stretto.planner.calibration_file import write_calibration, written
    from stretto.planner.refine import refine

    shares = written(given)
    machine = shares.pop("machine", None)
    if machine is None:
        raise ConfigError(
            f"{given} has no [machine] that a run could correct; measure one: stretto diagnose --calibrate --out FILE."
        )
    found = refine(machine, options.run)
    replaced = " (instead of an older file)" if path.exists() else ""
    write_calibration(found.machine, path, shares=shares)
    print(json.dumps(as_data(found)) if options.json else shown(found))
    if not options.json:
        print(f"wrote {path}{replaced}: stretto plan --calibration {path}")
    return 0


def as_data(found: Refined) -> dict[str, object]:
    """What ``--json`` prints."""
    return {
        "refined": [one.as_data() for one in found.found],
        "measured": found.measured,
        "predicted_before": found.before.total,
        "predicted_after": found.after.total,
        "expected_error_before": found.before.expected_error,
        "expected_error_after": found.after.expected_error,
    }


def shown(found: Refined) -> str:
    """One row for each factor, and what they change for the run."""
    lines = [f"{'figure':<12} {'at size':>10} {'factor':>8} {'error':>7}"]
    lines += [f"{one.kind:<12} {one.size:>10.3g} {one.factor:>8.2f} {one.error:>7.1%}" for one in found.found]
    steps = (("before", found.before), ("now", found.after))
    said = [f"{name} {format_seconds(step.total)} ({step.total / found.measured - 1:+.1%})" for name, step in steps]
    lines.append(f"the run's step: measured {format_seconds(found.measured)}, predicted {', '.join(said)}")
    return "\n".join([*lines, f"expected error of such steps: {found.after.expected_error:.1%}"])
