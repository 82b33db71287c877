"""One operation of a schedule, and the words for all of them.

An operation is a kind, the stage it works on and the micro-batch it works for.  Its text form is
stage, kind, micro-batch: ``2F0`` is the forward of stage 2 for micro-batch 0.  Messages carry the
rank at the other end besides:

    rank 0 (stage 0)                           rank 1 (stage 1)

    0F3       forward                          1RECV_F3  the input of stage 1, from rank 0
    0SEND_F3  the output of stage 0, to 1 ──►  1F3
    0RECV_B3  the gradient of stage 0's        1B3
              output, from rank 1         ◄──  1SEND_B3  the gradient of stage 1's input, to rank 0
    0B3
"""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from enum import IntEnum

from stretto.spec.errors import ScheduleError, nearest


class Kind(IntEnum):
    """What an operation does.  The numbers are what schedules store in their column."""

    F = 0
    """Forward."""
    B = 1
    """Full backward: I and W in one."""
    I = 2  # noqa: E741
    """Gradient of the inputs."""
    W = 3
    """Gradient of the weights."""
    R = 4
    """Recompute: the forward again, just before its backward."""
    S = 5
    """First vocabulary pass; the stage is the vocabulary shard."""
    T = 6
    """Second vocabulary pass; the stage is the vocabulary shard."""
    O = 7  # noqa: E741
    """Offload the activations that F kept."""
    L = 8
    """Load the activations that O moved away."""
    SEND_F = 9
    """Send the output of the stage to the rank that holds the next stage."""
    RECV_F = 10
    """Receive the input of the stage from the rank that holds the previous stage."""
    SEND_B = 11
    """Send the gradient of the stage's input to the rank that holds the previous stage."""
    RECV_B = 12
    """Receive the gradient of the stage's output from the rank that holds the next stage."""
    UNSHARD = 13
    """Gather the parameters of a block of the stage; the micro-batch is the block's index."""
    RESHARD = 14
    """Free the gathered parameters of a block; the micro-batch is the block's index."""
    REDUCE_GRAD = 15
    """Reduce the gradients of a block over its data-parallel ranks; the micro-batch is the block's index."""
    OPT = 16
    """Optimizer step; has neither stage nor micro-batch."""


COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W, Kind.R, Kind.S, Kind.T})
"""Kinds that occupy a device's arithmetic."""
MESSAGES = frozenset({Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B})
"""Kinds that carry a peer."""
PER_BLOCK = frozenset({Kind.UNSHARD, Kind.RESHARD, Kind.REDUCE_GRAD})
"""Kinds whose micro-batch column holds a block index."""

_NUMBERS = {kind.name: kind.value for kind in Kind if kind is not Kind.OPT}
_TOKEN = re.compile(r"(0|[1-9][0-9]{0,8})([A-Z_]+)(0|[1-9][0-9]{0,8})")  # nine digits fit a column


@dataclass(frozen=True, slots=True)
class Op:
    """A view of one row of a schedule.

    >>> Op(Kind.F, stage=2, microbatch=0)
    2F0
    >>> Op.parse("2RECV_F0").kind.name
    'RECV_F'
    """

    kind: Kind
    """What is done."""
    _: KW_ONLY
    stage: int = -1
    """Stage worked on (vocabulary shard for S and T), -1 where there is none."""
    microbatch: int = -1
    """Micro-batch worked for (block index for UNSHARD, RESHARD, REDUCE_GRAD), -1 where there is none."""
    peer: int = -1
    """Rank at the other end of a message, -1 where there is none or where placement decides it."""
    joined: bool = False
    """Whether it overlaps with the operation that follows it on its rank."""

    def __str__(self) -> str:
        """``2F0``, ``2UNSHARD0``, ``OPT``; the peer is not part of it, since the placement gives it."""
        return text(self.kind, self.stage, self.microbatch)

    __repr__ = __str__

    @classmethod
    def parse(cls, token: str) -> Op:
        """Read the text form.  Raises ScheduleError for anything else; the peer stays -1."""
        kind, stage, microbatch = numbers(token)
        return cls(Kind(kind), stage=stage, microbatch=microbatch)


def numbers(token: str) -> tuple[int, int, int]:
    """Kind, stage and micro-batch of a text form, without making an Op; the inverse of ``text``.

    >>> numbers("5B7")
    (1, 5, 7)
    """
    if token == "OPT":
        return Kind.OPT.value, -1, -1
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise ScheduleError(
            f"{shortened(token)} is not an operation; one is written stage, kind, micro-batch, "
            "such as 2F0, or OPT alone."
        )
    stage, name, microbatch = match.groups()
    if name not in _NUMBERS:
        raise ScheduleError(
            f"{shortened(token)} has the unknown kind {shortened(name)}{nearest(name, _NUMBERS) or '.'} "
            f"Kinds are {', '.join(_NUMBERS)}."
        )
    return _NUMBERS[name], int(stage), int(microbatch)


def shortened(value: object) -> str:
    """A value as an error quotes it: at most 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def text(kind: int, stage: int, microbatch: int) -> str:
    """Text form of a row of integers, without making an Op.

    >>> text(1, 5, 7)
    '5B7'
    """
    name = Kind(kind).name
    return name if kind == Kind.OPT else f"{stage}{name}{microbatch}"
