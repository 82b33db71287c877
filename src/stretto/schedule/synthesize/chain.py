"""When each operation of a micro-batch can run at the earliest, and how much must follow it at the least.

A micro-batch goes forward over all stages and back; W of a stage hangs off its I:

    F0 ─► F1 ─► F2 ─► I2 ─► I1 ─► I0        before_F, before_I: the longest way from the left edge
                       │     │     │        after_F, after_I:   the longest way to the end of the last W
                       W2    W1    W0

These are times of a micro-batch that never waits, so no schedule can be faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from stretto.schedule.synthesize.replay import Durations, Number


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain(Generic[Number]):
    """Least times around each stage's operations, S entries each."""

    before_F: tuple[Number, ...]
    """From the start of the schedule to the start of F."""
    before_I: tuple[Number, ...]
    """From the start of the schedule to the start of I."""
    after_F: tuple[Number, ...]
    """From the end of F to the end of the schedule."""
    after_I: tuple[Number, ...]
    """From the end of I to the end of the schedule; at least the stage's own W."""
    held: tuple[Number, ...]
    """From the start of F to the end of I: how long the activation is kept whole."""

    @staticmethod
    def along(durations: Durations[Number]) -> Chain[Number]:
        """Follow one micro-batch there and back."""
        F, I, W, comm = durations.F, durations.I, durations.W, durations.comm  # noqa: E741
        last = len(F) - 1
        before_F, before_I, after_F, after_I = ([0 * F[0]] * (last + 1) for _ in range(4))
        for stage in range(1, last + 1):
            before_F[stage] = before_F[stage - 1] + F[stage - 1] + comm[stage - 1]
        before_I[last] = before_F[last] + F[last]
        for stage in reversed(range(last)):
            before_I[stage] = before_I[stage + 1] + I[stage + 1] + comm[stage]
        after_I[0] = W[0]
        for stage in range(1, last + 1):
            after_I[stage] = max(W[stage], comm[stage - 1] + I[stage - 1] + after_I[stage - 1])
        after_F[last] = I[last] + after_I[last]
        for stage in reversed(range(last)):
            after_F[stage] = comm[stage] + F[stage + 1] + after_F[stage + 1]
        held = tuple(back + own - there for back, own, there in zip(before_I, I, before_F, strict=True))
        return Chain(
            before_F=tuple(before_F),
            before_I=tuple(before_I),
            after_F=tuple(after_F),
            after_I=tuple(after_I),
            held=held,
        )
