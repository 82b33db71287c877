"""Between schedules and the orders of symbols that the search works on (see ``placing``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stretto.schedule.synthesize.problem import Problem
    from stretto.schedule.synthesize.tables import Symbols

KINDS = (Kind.F, Kind.I, Kind.W)
"""What the kinds 0, 1, 2 of a symbol stand for."""


def to_symbols(schedule: Schedule) -> Symbols | None:
    """Orders (R, n) of a schedule, B as I and W; None where it has other operations, paths or replicas."""
    plain = len(schedule.placement) == 1 and schedule.paths is None and not schedule.frozen
    backward = schedule.kind == Kind.B
    if not plain or not np.isin(schedule.kind, [Kind.F, Kind.B, Kind.I, Kind.W]).all():
        return None
    stages = schedule.num_stages
    code = np.full(len(Kind), -1, dtype=np.int64)
    code[[Kind.F, Kind.I, Kind.B, Kind.W]] = 0, 1, 1, 2
    repeats = 1 + backward.astype(np.int64)
    symbols = np.repeat(code[schedule.kind] * stages + schedule.stage, repeats)
    ends = np.cumsum(repeats)
    symbols[ends[backward] - 1] += stages
    bounds = np.append(0, ends)[schedule.offsets]
    length = np.diff(bounds)
    if int(length.sum()) != 3 * stages * schedule.num_microbatches:
        return None
    order = np.zeros((schedule.num_ranks, int(length.max())), dtype=np.int64)
    for rank in range(schedule.num_ranks):
        order[rank, : length[rank]] = symbols[bounds[rank] : bounds[rank + 1]]
    return order


def from_orders(orders: Sequence[Sequence[tuple[int, int, int]]], problem: Problem) -> Symbols:
    """Orders (R, n) from lists of kind, stage and micro-batch, one per rank."""
    code = {int(kind): number * problem.stages for number, kind in enumerate(KINDS)}
    order = np.zeros((problem.ranks, max(map(len, orders))), dtype=np.int64)
    for rank, operations in enumerate(orders):
        order[rank, : len(operations)] = [code[int(kind)] + stage for kind, stage, _ in operations]
    return order


def to_schedule(order: Symbols, problem: Problem, *, name: str) -> Schedule:
    """The schedule of orders; the n-th occurrence of a symbol works for micro-batch n."""
    stages, microbatches = problem.stages, problem.microbatches
    length = [3 * len(held) * microbatches for held in problem.chunks]
    symbols = np.concatenate([row[:count] for row, count in zip(order, length, strict=True)])
    by_symbol = np.argsort(symbols, kind="stable")
    microbatch = np.empty_like(symbols)
    microbatch[by_symbol] = np.tile(np.arange(microbatches), 3 * stages)
    return Schedule.from_columns(
        kind=np.array(KINDS)[symbols // stages],
        stage=symbols % stages,
        microbatch=microbatch,
        offsets=np.append(0, np.cumsum(length)),
        name=name,
        num_stages=stages,
        num_microbatches=microbatches,
        placement=[problem.placement],
    )
