"""Honest step 1: what the first steps measured beside what the planner said of them, kept in ``prediction.json``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stretto.planner.prediction import Prediction, predict
from stretto.spec.run import RunSpec
from stretto.spec.units import format_bytes, format_seconds

UNCOUNTED = 1
"""First steps that aren't measured: they allocate, and one counts tensors."""
COUNTED = 5
"""Steps after those whose median counts."""
FILE = "prediction.json"
"""Where it is kept, in the run's directory."""


class FirstSteps:
    """Collects the records of the first steps of this process, until there are enough."""

    def __init__(self, run: RunSpec, prediction: Prediction) -> None:
        self._path, self._prediction = Path(run.run.dir) / FILE, prediction
        self._last = run.training.steps
        self._seconds: list[float] = []
        self._over = False

    @classmethod
    def of(cls, run: RunSpec, *, cuda: bool = False, documents: Sequence[Sequence[int]] = ()) -> FirstSteps | None:
        """None where the planner predicts nothing; ``documents``: lengths, of these very steps."""
        prediction = predict(run, cuda=cuda, documents=documents, uncounted=UNCOUNTED)
        return None if prediction is None else cls(run, prediction)

    def foretold(self) -> str:
        """What is expected, for a run whose steps depend on the documents in them."""
        seconds, held = self._prediction.time.total, self._prediction.memory.total
        return f"a step {format_seconds(seconds)} predicted, memory {format_bytes(held)}"

    def note(self, record: Mapping[str, Any]) -> str | None:
        """Take a step's record; the line to say once there are enough, or the run is at its end with two at least."""
        if self._over:
            return None
        self._seconds.append(record["step_s"])
        ends = record["step"] == self._last and len(self._seconds) > UNCOUNTED
        if len(self._seconds) < UNCOUNTED + COUNTED and not ends:
            return None
        self._over = True
        found = self._compared(statistics.median(self._seconds[UNCOUNTED:]), record)
        self._path.write_text(json.dumps(found) + "\n", encoding="utf-8")
        return line(found)

    def _compared(self, seconds: float, record: Mapping[str, Any]) -> dict[str, Any]:
        found = self._prediction.as_data()
        counted = len(self._seconds) - UNCOUNTED
        found["steps"] = {"last": record["step"], "counted": counted}
        measured = {"seconds": seconds, "bytes": record.get("memory_bytes")}
        for name, figure in measured.items():
            if figure:
                found[name] |= {"measured": figure, "ratio": found[name]["predicted"] / figure}
        return found


def line(found: Mapping[str, Any]) -> str:
    """What a person reads of it."""
    words = []
    for name, label, form in (("seconds", "a step", format_seconds), ("bytes", "memory", format_bytes)):
        one = found[name]
        if "measured" in one:
            off = one["ratio"] - 1
            words.append(f"{label} {form(one['predicted'])} predicted, {form(one['measured'])} measured ({off:+.0%})")
    return "; ".join(words)
