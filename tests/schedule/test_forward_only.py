"""Forward only: every micro-batch passes every stage once, and nothing is kept."""

import pytest

from stretto.schedule import Kind
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.simulate import Costs, peak_activation, simulate
from stretto.schedule.validate import validate


@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), [(1, 1, 1), (3, 4, 1), (4, 6, 2), (4, 3, 2), (2, 9, 4)])
def test_every_stage_runs_every_micro_batch_forward(ranks: int, microbatches: int, chunks: int) -> None:
    schedule = build("forward-only", ranks=ranks, microbatches=microbatches, chunks=chunks)
    validate(schedule)
    validate(lower(schedule))
    assert schedule.forward_only
    for rank in range(ranks):
        done = {(op.stage, op.microbatch) for op in schedule.ops(rank) if op.kind is Kind.F}
        assert done == {(chunk * ranks + rank, m) for chunk in range(chunks) for m in range(microbatches)}
        assert len(schedule.ops(rank)) == len(done)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_rank_never_idles_once_it_has_begun_and_keeps_only_what_it_works_on(chunks: int) -> None:
    schedule = build("forward-only", ranks=4, microbatches=8, chunks=chunks)
    figures = simulate(schedule, Costs())
    assert figures.makespan == 8 + 3 / chunks
    assert figures.span == 8
    assert peak_activation(schedule) == (1 / chunks,) * 4
