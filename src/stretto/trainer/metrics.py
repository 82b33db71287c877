"""Metrics of a run: one JSON line a step, one line on the terminal, TensorBoard on request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from stretto.spec.units import format_bytes, format_count


class MetricsFile:
    """An append-only file of JSON lines, truncated to the checkpoint on resume."""

    def __init__(self, path: Path, *, after: int) -> None:
        """Open ``path``; records of steps later than ``after`` are dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if _step_of(line) is not None and _step_of(line) <= after]  # type: ignore[operator]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(line + "\n" for line in kept))
        beside.replace(path)
        self._file: TextIO = path.open("a")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; what is not known (None) or not finite, which JSON can't say, is left out."""
        known = {key: value for key, value in record.items() if value is not None and _sayable(value)}
        self._file.write(json.dumps(known) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _sayable(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _step_of(line: str) -> int | None:
    """The step of a record; None for a line that a dying process left half-written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class Board:
    """TensorBoard events; the extra is needed only where a run asks for them."""

    def __init__(self, folder: Path, *, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1)

    def write(self, record: Mapping[str, Any], prefix: str) -> None:
        """Write every number of a record."""
        for key, value in record.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(f"{prefix}/{key}", value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def step_line(record: Mapping[str, Any], steps: int) -> str:
    """The line that a step prints.

    >>> step_line({"step": 3, "loss": 5.5, "grad_norm": 1.25, "lr": 1e-3, "tokens_per_s": 12345.0}, 250)
    'step   3/250  loss 5.5000  norm 1.250  lr 1.00e-03  12.3 k tok/s'
    """
    width = len(str(steps))
    parts = [f"step {record['step']:>{width}}/{steps}", f"loss {record['loss']:.4f}"]
    if record["grad_norm"] is not None:
        parts.append(f"norm {record['grad_norm']:.3f}")
    parts += [
        f"lr {record['lr']:.2e}",
        f"{format_count(record['tokens_per_s'])} tok/s",
    ]
    if record.get("memory_bytes") is not None:
        parts.append(format_bytes(record["memory_bytes"]))
    if record.get("mfu") is not None:
        parts.append(f"mfu {100 * record['mfu']:.1f}%")
    if record.get("skipped"):
        parts.append("gradient not finite, update left out")
    return "  ".join(parts)
