"""Learning rate over the steps: warm-up, the three schedules, their ends."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.spec.training import RateSchedule, TrainingSpec
from stretto.trainer.rate import learning_rate

SCHEDULES: tuple[RateSchedule, ...] = ("constant", "cosine", "wsd")


def rates(**given_fields: object) -> list[float]:
    training = TrainingSpec(learning_rate=2.0, **given_fields)  # type: ignore[arg-type]
    return [learning_rate(training, step) for step in range(1, training.steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak(schedule: RateSchedule) -> None:
    found = rates(schedule=schedule, steps=20, warmup_steps=4)
    assert found[:4] == [0.5, 1.0, 1.5, 2.0] and max(found) == 2.0


def test_constant_stays() -> None:
    assert rates(steps=5, min_learning_rate=0.1) == [2.0] * 5


def test_cosine_falls_from_the_peak_to_the_minimum() -> None:
    found = rates(schedule="cosine", steps=12, warmup_steps=2, min_learning_rate=0.2)
    assert found[1] == 2.0 and found[-1] == pytest.approx(0.2)
    assert found[6] == pytest.approx((2.0 + 0.2) / 2)  # half of the way
    assert found[2] == pytest.approx(0.2 + 0.9 * (1 + math.cos(math.pi / 10)))
    assert all(a > b for a, b in pairwise(found[1:]))


def test_wsd_is_stable_and_then_falls_in_a_line() -> None:
    found = rates(schedule="wsd", steps=20, warmup_steps=2, decay_steps=4, min_learning_rate=0.4)
    assert found[1:16] == [2.0] * 15
    assert found[16:] == [pytest.approx(r) for r in (1.6, 1.2, 0.8, 0.4)]


def test_wsd_decays_over_a_tenth_where_nothing_is_said() -> None:
    found = rates(schedule="wsd", steps=30)
    assert found[26] == 2.0 and found[27:] == [pytest.approx(r) for r in (4 / 3, 2 / 3, 0.0)]
    assert rates(schedule="wsd", steps=3)[-1] == 0.0


@given(
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 40),
    warmup=st.integers(0, 50),
    decay=st.integers(0, 50),
    low=st.floats(0, 2),
    step=st.integers(1, 60),
)
def test_never_above_the_peak_never_negative(
    schedule: RateSchedule, steps: int, warmup: int, decay: int, low: float, step: int
) -> None:
    training = TrainingSpec(
        learning_rate=2.0,
        schedule=schedule,
        steps=steps,
        warmup_steps=warmup,
        decay_steps=decay,
        min_learning_rate=low,
    )
    rate = learning_rate(training, step)
    assert 0 <= rate <= 2.0 + 1e-12
    if step > max(steps, warmup) and schedule != "constant":
        assert rate == pytest.approx(low)  # past the end it stays at the end
