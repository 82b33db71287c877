"""``stretto diagnose RUN`` of a run whose documents have groups of their own."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from stretto.spec.errors import UnsupportedError
from stretto.spec.units import format_seconds

if TYPE_CHECKING:
    from stretto.schedule.measured.document_diagnosis import DocumentDiagnosis, PlacedStep

COLUMNS = ("computing", "messages", "pipeline", "idle", "settling")


def execute(options: argparse.Namespace, outputs: tuple[str, ...], stalls: list[dict[str, Any]]) -> DocumentDiagnosis:
    """Diagnose and print; UnsupportedError for files (``outputs``) that are of one schedule."""
    from stretto.schedule.measured.document_diagnosis import diagnose_documents

    for name in outputs:
        if getattr(options, name) is not None:
            raise UnsupportedError(
                f'--{name.replace("_", "-")} is of a schedule, but steps of plan.context_groups = "dynamic" have each '
                "their own micro-batches; --json has all figures of these."
            )
    found = diagnose_documents(options.run, step=options.step)
    if options.json:
        print(json.dumps({**found.as_data(), "stalls": stalls}))
    else:
        print(shown(found))
    return found


def shown(found: DocumentDiagnosis) -> str:
    """Figures, one row for each rank, and the sentences."""
    placed, number = found.placed, len(found.steps)
    lines = [
        f"documents in groups of their own: {len(placed.ranks)} ranks; step {placed.step}, {number} steps recorded",
        f"operations {format_seconds(placed.span)}   whole step {format_seconds(placed.whole)}   "
        f"fullest / mean {placed.imbalance:.3f}   idle {placed.idle_share:.1%}",
        "",
        f"{'rank':>4}" + "".join(f"   {name:>10}" for name in COLUMNS) + "   longest document",
    ]
    for rank, time in enumerate(placed.ranks):
        cells = "".join(f"   {format_seconds(getattr(time, name)):>10}" for name in COLUMNS)
        lines.append(f"{rank:>4}{cells}   {_longest(placed, rank)}")
    return "\n".join([*lines, "", *found.findings])


def _longest(placed: PlacedStep, rank: int) -> str:
    """The longest document that a rank has something of."""
    held = [held for one in placed.micro_batches if one.rank == rank for held in one.documents]
    if not held:
        return "none"
    first = max(held, key=lambda one: one.length)
    return f"{first.length:,} over {first.ranks}"
