"""Building blocks: a search over any placement and costs, and what repeating a block gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import placement
from stretto.schedule.families.building_block import repeat, search, search_and_repeat
from stretto.schedule.simulate import Costs, peak_activation, simulate
from stretto.schedule.synthesize.problem import Problem
from stretto.schedule.synthesize.space import Layout, problem_of
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError

PROFILED = Costs(F=18.5, I=18.1, W=9.3, comm=0.6)


def problem(ranks: int, chunks: int, microbatches: int, limit: float, costs: Costs, shape: str = "zigzag") -> Problem:
    stages = {"zigzag": placement.zigzag, "loop": placement.loop}[shape](ranks, ranks * chunks)
    layout = Layout(name=shape, num_ranks=ranks, placement=(stages,))
    return problem_of(layout, microbatches=microbatches, costs=costs.of(layout), limit=(limit,) * ranks)


def test_a_block_has_no_two_operations_of_a_rank_at_the_same_time_modulo_its_period() -> None:
    given = problem(4, 2, 8, 4, Costs())
    block = search(given)
    assert block.period >= given.work.max()
    slots = np.round((block.starts % block.period) / 0.5).astype(int)
    for rank, stages in enumerate(given.chunks):
        used = slots[:, list(stages)].ravel().tolist()
        assert len(set(used)) == len(used), f"rank {rank}"


def test_a_block_runs_in_the_order_of_its_data() -> None:
    given = problem(3, 2, 6, 3, PROFILED)
    forward, inputs, weights = search(given).starts
    assert (forward[1:] >= forward[:-1] + given.F[:-1] + given.comm - 1e-6).all()
    assert inputs[-1] >= forward[-1] + given.F[-1] - 1e-6
    assert (inputs[:-1] >= inputs[1:] + given.I[1:] + given.comm - 1e-6).all()
    assert (weights >= inputs + given.I - 1e-6).all()


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", ["loop", "zigzag"])
def test_any_placement_is_within_a_tenth_of_its_bound_at_the_memory_of_1f1b(chunks: int, shape: str) -> None:
    schedule = search_and_repeat(problem(4, chunks, 16, 4, Costs(), shape))
    validate(schedule)
    figures = simulate(schedule)
    assert figures.makespan <= figures.lower_bound * 1.1
    assert max(figures.peak_activation) <= 4 + 1e-6


def test_uneven_stages_and_unequal_limits() -> None:
    costs = Costs(F=(1, 1, 2.5, 1, 1, 1), I=(1, 1, 1, 1, 2, 1), W=(1, 1, 1, 0.5, 1, 1), comm=0.2, act_w=0.5)
    layout = Layout(name="V", num_ranks=3, placement=((0, 1, 2, 2, 1, 0),))
    given = problem_of(layout, microbatches=9, costs=costs.of(layout), limit=(2.0, 1.5, 3.0))
    schedule = search_and_repeat(given)
    validate(schedule)
    assert all(peak <= limit + 1e-6 for peak, limit in zip(peak_activation(schedule, costs), (2, 1.5, 3), strict=True))


def test_four_chunks_beat_the_best_of_two_at_two_thirds_of_the_memory() -> None:
    # 28 is the proven optimum of the V with two chunks in 8/3 micro-batches.
    assert simulate(search_and_repeat(problem(4, 4, 8, 8 / 3, Costs(), "loop"))).makespan < 28


def test_polishing_never_makes_it_longer() -> None:
    given = problem(4, 2, 8, 3, PROFILED)
    block = search(given)
    plain, polished = (simulate(repeat(block, given, rounds=rounds), PROFILED) for rounds in (0, 3000))
    assert polished.makespan <= plain.makespan
    assert max(polished.peak_activation) <= 3 + 1e-6


@given(
    ranks=st.integers(1, 5),
    chunks=st.integers(1, 3),
    microbatches=st.integers(1, 9),
    limit=st.floats(1, 6),
    shape=st.sampled_from(["loop", "zigzag"]),
)
@settings(max_examples=20, deadline=None)
def test_any_problem_gives_a_schedule_within_its_limit(
    ranks: int, chunks: int, microbatches: int, limit: float, shape: str
) -> None:
    schedule = search_and_repeat(problem(ranks, chunks, microbatches, limit, PROFILED, shape), rounds=200)
    validate(schedule)
    assert max(peak_activation(schedule)) <= limit + 1e-6


def test_a_block_of_another_memory_is_refused() -> None:
    block = search(problem(4, 2, 8, 4, Costs()))
    with pytest.raises(ScheduleError, match="can't keep the memory limit"):
        repeat(block, problem(4, 2, 8, 1, Costs()))
