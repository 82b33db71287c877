"""What ``stretto simulate --list`` prints: the families and passes, and what each can be told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stretto.schedule.families import Family


def listing() -> str:
    """One line for each family and pass, and below it the chunks and options that it takes."""
    from stretto.schedule.families import FAMILIES
    from stretto.schedule.passes import PASSES

    width = max(map(len, [*FAMILIES, *PASSES])) + 2
    lines = ["families: --schedule NAME --pp R --microbatches M [--chunks V] [--option KEY=VALUE ...]"]
    for name, family in FAMILIES.items():
        told = [f"chunks: {chunks(family)}"] if chunks(family) != "1" else []
        told += ["options: " + ", ".join(family.options)] if family.options else []
        told += ["fits itself to --cost, --costs and --memory-limit"] if family.costed else []
        lines += _entry(name, family.summary, "; ".join(told), width)
    lines += ["", "passes: --pass NAME[:KEY=VALUE,...], in the order given"]
    for name, change in PASSES.items():
        lines += _entry(name, change.summary, "options: " * bool(change.options) + ", ".join(change.options), width)
    return "\n".join(lines)


def listing_json() -> str:
    """The same as JSON: ``{"families": [...], "passes": [...]}``."""
    from stretto.schedule.families import FAMILIES
    from stretto.schedule.passes import PASSES

    families = [
        {"name": name, "summary": family.summary, "chunks": chunks(family), "options": family.options}
        for name, family in FAMILIES.items()
    ]
    passes = [{"name": name, "summary": change.summary, "options": change.options} for name, change in PASSES.items()]
    return json.dumps({"families": families, "passes": passes})


def chunks(family: Family) -> str:
    """Stages per rank that a family can have, in words."""
    if family.chunk_counts is None:
        return "any" if family.chunked else "1"
    return " or ".join(map(str, family.chunk_counts)) or "as its options say"


def _entry(name: str, summary: str, told: str, width: int) -> list[str]:
    """A line, and one with what it can be told."""
    return [f"  {name:<{width}}{summary}"] + [f"  {'':<{width}}{told}"] * bool(told)
