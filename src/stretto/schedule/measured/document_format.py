"""The documents of a trace, where each has a group of ranks of its own: ``trace/documents-3`` beside ``trace/rank-3``.

One line of JSON for each step that the rank recorded, with what it had of every micro-batch:

    {"step": 7, "documents": [[micro-batch, first rank, ranks, length, tokens, away], ...]}

Ranks are those that read data, numbered along dp, then cp.  A document of several ranks is in the files of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stretto.spec.errors import ConfigError


class Held(NamedTuple):
    """What a rank has of a document."""

    microbatch: int
    first: int
    """First rank of the document's group."""
    ranks: int
    """Size of the group."""
    length: int
    """Tokens of the whole document."""
    tokens: int
    """Of these the rank's own."""
    away: int
    """Blocks whose activations are on the host between forward and backward."""


def documents_path(folder: Path, rank: int) -> Path:
    """The file of a rank in the folder of the trace."""
    return folder / f"documents-{rank}"


def document_line(step: int, held: Sequence[Held]) -> str:
    """One step as a line."""
    return json.dumps({"step": step, "documents": held}, separators=(",", ":")) + "\n"


def read_documents(path: Path) -> dict[int, tuple[Held, ...]]:
    """What a rank had of the documents of each step; ConfigError for a file that says something else."""
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines:
            if line.endswith("\n"):  # else its process died while it wrote
                record = json.loads(line)
                found[int(record["step"])] = tuple(Held(*map(int, row)) for row in record["documents"])
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigError(f"{path} doesn't say which documents its rank had; record the run again.") from None
    return found
