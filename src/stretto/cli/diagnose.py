"""``stretto diagnose``: lay what a run measured over what its schedule should take."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from stretto.cli import calibrate, diagnose_documents, refine
from stretto.spec.errors import ConfigError
from stretto.spec.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from stretto.resilience.stall import Stall
    from stretto.schedule.measured.diagnosis import Diagnosis

SUMMARY = "say where a run's step time goes, measured over simulated"
DESCRIPTION = """\
Read the operations that a run recorded, simulate the same schedule under their median durations, and say where the
difference is: a slow stage or rank, late messages, idle time that isn't predicted. Of all recorded steps the one of
median length is looked at; where a rank was slow once, that is named in whatever step it was. A run records its last
8 steps, or others where run.trace says so (20-30); --costs-out writes the medians as a costs file for
stretto simulate --costs. With --calibrate no run is read: this machine's CPU is measured for stretto plan; with
--refine what the run measured corrects such a calibration. Of steps that place documents in groups of their own it
says which ranks computed longest, what they waited for, and which documents it was."""
EXAMPLES = (
    "stretto diagnose runs/tiny",
    "stretto diagnose runs/tiny --step 20 --html measured.html --trace measured.json",
    "stretto diagnose runs/tiny --json --costs-out costs.json",
    "stretto diagnose --calibrate --out calibration.toml",
    "stretto diagnose runs/tiny --refine calibration.toml --out refined.toml",
)
_STALLS_SHOWN = 3
OUTPUTS = ("costs_out", "trace", "html")
"""Options that name a file to write."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what diagnose takes."""
    parser.add_argument("run", metavar="RUN", type=Path, nargs="?", help="directory of the run (its run.dir)")
    parser.add_argument("--step", type=int, metavar="N", help="look at this step instead")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON alone, times in seconds")
    parser.add_argument("--costs-out", type=Path, metavar="FILE", help="write the measured costs for stretto simulate")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write both timelines for Perfetto (ui.perfetto.dev)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of measured over simulated")
    calibrate.add_arguments(parser)
    refine.add_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    """Diagnose, write the files that are asked for, and print."""
    if options.calibrate and options.refine is not None:
        raise ConfigError("--calibrate measures this machine and --refine reads a run; do one after the other.")
    _check_read(options)
    if options.calibrate:
        return calibrate.execute(options)
    if options.run is None:
        raise ConfigError("Name the directory of a run (its run.dir), or measure this machine with --calibrate.")
    if options.refine is not None:
        return refine.execute(options)
    _check_outputs(options)
    from stretto.resilience.stall import read_stalls
    from stretto.schedule.measured.diagnosis import diagnose
    from stretto.schedule.measured.document_diagnosis import has_documents

    if has_documents(options.run):
        stalls = read_stalls(options.run)
        diagnose_documents.execute(options, OUTPUTS, [asdict(stall) for stall in stalls])
        if not options.json:
            print("\n".join(map(_told, stalls[:_STALLS_SHOWN])), end="\n" * bool(stalls))
        return 0
    found = diagnose(options.run, step=options.step)
    for path, content in _files(options, found).items():
        path.write_text(content, encoding="utf-8")
    stalls = read_stalls(options.run)
    if options.json:
        print(json.dumps({**found.as_data(), "stalls": [asdict(stall) for stall in stalls]}))
    else:
        print("\n".join([_shown(found), *map(_told, stalls[:_STALLS_SHOWN])]))
    return 0


def _told(stall: Stall) -> str:
    """A moment in which nothing moved."""
    who = "Rank " if len(stall.ranks) == 1 else "Ranks "
    who += ", ".join(map(str, stall.ranks)) + (" was" if len(stall.ranks) == 1 else " were")
    return f"{who} slow: nothing else moved for {format_seconds(stall.seconds)}; {stall.sentence}."


def _check_read(options: argparse.Namespace) -> None:
    """Raise ConfigError for what is asked for and would be passed over in silence."""
    measures, refines = options.calibrate, options.refine is not None
    task = "--calibrate" if measures else "--refine" if refines else ""
    for name in ("step", *OUTPUTS):
        if task and getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is of a diagnosis, and {task} makes none; leave it out.")
    if measures and options.run is not None:
        raise ConfigError(f"--calibrate measures this machine and reads no run; leave out {options.run}.")
    if options.out is not None and not task:
        raise ConfigError("--out is for --calibrate or --refine; a diagnosis writes to --html, --trace or --costs-out.")
    if options.processes is not None and not measures:
        raise ConfigError("--processes is for --calibrate; leave it out.")


def _check_outputs(options: argparse.Namespace) -> None:
    """Raise ConfigError where a file that is asked for can't be written, before any work is done."""
    for at, name in enumerate(OUTPUTS):
        path: Path | None = getattr(options, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            what = "is a folder" if path.is_dir() else f"can't be written: there is no folder {path.parent}"
            raise ConfigError(f"--{name.replace('_', '-')} {path} {what}; name a file in a folder that exists.")
        for other in OUTPUTS[:at]:
            if path is not None and path == getattr(options, other):
                raise ConfigError(f"--{name} {path}: --{other.replace('_', '-')} writes that file already.")


def _files(options: argparse.Namespace, found: Diagnosis) -> dict[Path, str]:
    """What to write where."""
    files = {}
    if options.costs_out is not None:
        from stretto.schedule.measured.medians import as_file

        files[options.costs_out] = json.dumps(as_file(found.costs)) + "\n"
    if options.trace is not None:
        from stretto.schedule.render.measured import trace_of

        files[options.trace] = json.dumps(trace_of(found), separators=(",", ":")) + "\n"
    if options.html is not None:
        from stretto.schedule.render.measured import page_of

        files[options.html] = page_of(found)
    return files


def _shown(found: Diagnosis) -> str:
    """Figures, one row per rank, and the sentences."""
    schedule, over = found.trace.schedule, found.over
    messages = format_bytes(int(found.played.num_bytes.sum()) / 2)
    lines = [
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_stages} stages, {schedule.num_microbatches} "
        f"micro-batches; step {found.played.step}, medians over {len(found.steps)} steps",
        f"measured {format_seconds(over.measured.makespan)}   simulated {format_seconds(over.simulated.makespan)}   "
        f"ratio {found.ratio:.3f}   messages {messages}",
        "",
        f"{'rank':>4}   {'busy':^21}   {'communication':^21}   {'bubble':^21}",
        f"{'':>4}" + f"   {'measured':>10} {'simulated':>10}" * 3,
    ]
    names = ("busy", "communication", "bubble")
    for position, rank in enumerate(found.ranks):
        cells = [
            f"   {format_seconds(getattr(over.spent, name)[position]):>10}"
            f" {format_seconds(getattr(over.predicted, name)[position]):>10}"
            for name in names
        ]
        lines.append(f"{rank:>4}{''.join(cells)}")
    return "\n".join([*lines, "", *found.findings])
