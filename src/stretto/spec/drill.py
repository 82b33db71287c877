"""``run.drill``: a fault that a run is to suffer, to see that it is noticed and told right.

freeze rank 1 step 2 at B            stops the process of rank 1 (SIGSTOP) in the first B of step 2
kill rank 3 at JOIN                  SIGKILL while the ranks meet
delay 2.5 rank 0 step 3 at 0F1       sleeps 2.5 s in that operation, and goes on
raise rank 2 step 2 at OPT; ...      several are separated by semicolons
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stretto.spec.errors import ConfigError

ACTIONS = ("kill", "freeze", "delay", "raise")
PHASES = ("START", "JOIN", "BUILD", "LOAD", "COMPILE", "DATA", "EVAL", "SAVE", "LEAVE")
"""What a rank does outside a schedule, by the names that its log has for it."""
OPERATIONS = (
    *("F", "B", "I", "W", "R", "S", "T", "O", "L", "SEND_F", "RECV_F", "SEND_B", "RECV_B"),
    *("UNSHARD", "RESHARD", "REDUCE_GRAD", "OPT", "FLUSH", "NORM", "VALIDATE"),
)
"""Likewise inside a step: the kinds of a schedule's operations, and what comes behind them."""
_FAULT = re.compile(r"(kill|freeze|raise|delay (\d+(?:\.\d+)?)) rank (\d+)(?: step (\d+))? at (\d*[A-Z_]+\d*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to which rank, where."""

    action: str
    """One of ACTIONS."""
    rank: int
    """Of the world."""
    step: int | None
    """Optimizer step; None: any."""
    at: str
    """Operation as the log names it (``2F7``, ``OPT``, ``SAVE``) or its kind alone (``F``)."""
    seconds: float = 0.0
    """Length of a delay."""


def faults_of(text: str) -> tuple[Fault, ...]:
    """The faults that ``run.drill`` asks for.  Raises ConfigError for what says none.

    >>> faults_of("freeze rank 1 step 2 at 0F1")[0].at
    '0F1'
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        match = _FAULT.fullmatch(part)
        if match is None:
            raise ConfigError(
                f'run.drill = "{part}" is no fault; write ACTION rank N [step N] at OPERATION, such as "freeze rank 1 '
                f'step 2 at B"; actions are kill, freeze, raise and delay SECONDS, operations those of the schedule '
                f"(1F3, or F for the first F) and {', '.join(PHASES)}."
            )
        action, seconds, rank, step, at = match.groups()
        kind = at.strip("0123456789")
        if kind not in (*OPERATIONS, *PHASES):
            raise ConfigError(
                f'run.drill = "{part}": no rank ever does {kind}; write one of {", ".join((*OPERATIONS, *PHASES))}.'
            )
        fault = Fault(
            action=action.split()[0],
            rank=int(rank),
            step=None if step is None else int(step),
            at=at,
            seconds=float(seconds or 0),
        )
        found.append(fault)
    return tuple(found)
