"""Where a thread is: the innermost line of a stack that belongs to the run, not to Python or torch below it.

    stretto/parallel/pipeline/channel.py:241 (receive)

A stack that ends in torch.distributed, or in a function of ours that calls it to wait, waits for another rank.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

_PYTHON = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
_PACKAGE = str(Path(__file__).parents[2])
_PARALLEL = "/stretto/parallel/"
_WAITS = ("wait", "all_reduce", "all_gather", "reduce_scatter", "_exchange", "receive", "let_go", "finish", "result")
"""Functions of ours, there, whose calls end when other ranks have done their part."""
_LINE = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_THREAD = re.compile(r"^(?:Current thread|Thread) .*$", re.MULTILINE)


class Line(NamedTuple):
    """One level of a stack."""

    file: str
    number: int
    function: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank's main thread is."""

    text: str
    """``file:line (function)``."""
    waits: bool
    """Whether it is in code that waits for other ranks."""


def place_of(stack: Iterable[Line]) -> Place:
    """The place that a stack, innermost level first, stands for."""
    waits, first = False, None
    for line in stack:
        first = first or line
        waits = waits or "/torch/distributed/" in line.file or (_PARALLEL in line.file and line.function in _WAITS)
        if not _is_library(line.file):
            return Place(text=_shown(line), waits=waits)
    return Place(text=_shown(first) if first else "an unknown place", waits=waits)


def lines_of(frame: FrameType | None) -> Iterator[Line]:
    """The stack of a thread of this process."""
    while frame is not None:
        yield Line(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back


def lines_in(dump: str) -> list[Line]:
    """The stack of the main thread, which is the last that ``faulthandler`` writes."""
    last = _THREAD.split(dump)[-1]
    return [Line(file, int(number), function) for file, number, function in _LINE.findall(last)]


def _is_library(file: str) -> bool:
    return file.startswith((*_PYTHON, "<")) or "/site-packages/torch/" in file


def _shown(line: Line) -> str:
    file = line.file.removeprefix(_PACKAGE).lstrip("/") if line.file.startswith(_PACKAGE) else line.file
    return f"{file}:{line.number} ({line.function})"
