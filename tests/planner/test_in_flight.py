"""Closed forms of activations in flight, against the simulator's own count."""

from __future__ import annotations

import pytest

from stretto.planner.in_flight import CLOSED_FORMS, in_flight, simulated
from stretto.spec.errors import ScheduleError


@pytest.mark.parametrize("family", CLOSED_FORMS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 6, 8, 13, 16])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_closed_forms_are_the_simulators(family: str, ranks: int, microbatches: int, chunks: int) -> None:
    try:
        true = simulated(family, ranks=ranks, microbatches=microbatches, chunks=chunks)
    except ScheduleError as error:
        assert chunks > 1 and "one stage per rank" in str(error)
        return
    assert in_flight(family, ranks=ranks, microbatches=microbatches, chunks=chunks) == pytest.approx(true)


@pytest.mark.parametrize(("family", "chunks"), [("zb-h2", 1), ("zb-v", 2), ("v-half", 2), ("dualpipe", 1)])
def test_profiles_have_settled(family: str, chunks: int) -> None:
    """More micro-batches than the profile is taken of don't raise the peak."""
    assert in_flight(family, ranks=4, microbatches=40, chunks=chunks) == pytest.approx(
        simulated(family, ranks=4, microbatches=40, chunks=chunks)
    )
