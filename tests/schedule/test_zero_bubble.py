"""ZB-H1 and ZB-H2: the published bubble rates, the memory that the paper promises, any shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stretto.schedule.families.zero_bubble as family
from stretto.schedule.families import build
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run, simulate
from stretto.schedule.validate import validate

# Qi et al. 2023, table 5 (profiled F, B, W and communication in ms) and the bubble rates computed from it.
PUBLISHED = [
    (8, 24, (18.522, 18.086, 9.337, 0.601), 0.1585, 0.1083),
    (8, 64, (18.546, 18.097, 9.321, 0.762), 0.0674, 0.0444),
    (16, 48, (11.347, 11.248, 8.132, 0.377), 0.1397, 0.0672),
]


@pytest.mark.parametrize(("ranks", "microbatches", "times", "h1", "h2"), PUBLISHED)
def test_the_published_bubble_rates_come_out(
    ranks: int, microbatches: int, times: tuple[float, float, float, float], h1: float, h2: float
) -> None:
    costs = Costs(F=times[0], I=times[1], W=times[2], comm=times[3])
    for name, rate in (("zb-h1", h1), ("zb-h2", h2)):
        figures = simulate(build(name, ranks=ranks, microbatches=microbatches), costs)
        assert figures.bubble_rate_span == pytest.approx(rate, abs=1e-4)


@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_memory_and_bubble_are_the_papers(ranks: int) -> None:
    h1, h2 = (simulate(build(name, ranks=ranks, microbatches=3 * ranks)) for name in ("zb-h1", "zb-h2"))
    assert h1.peak_activation == (ranks,) * ranks
    assert h1.span - max(h1.busy) == ranks - 1
    assert h2.peak_activation == (2 * ranks - 1,) * ranks
    assert h2.bubble_rate_span == 0


@given(
    name=st.sampled_from(["zb-h1", "zb-h2"]),
    ranks=st.integers(1, 9),
    microbatches=st.integers(1, 25),
)
def test_any_shape_is_complete_and_lives_within_its_memory(name: str, ranks: int, microbatches: int) -> None:
    schedule = build(name, ranks=ranks, microbatches=microbatches)
    validate(schedule)
    assert max(simulate(schedule).peak_activation) == min(microbatches, ranks if name == "zb-h1" else 2 * ranks - 1)


@pytest.mark.parametrize(("name", "microbatches"), [("zb-h1", 6), ("zb-h2", 8)])
def test_the_figures_in_the_docstring_are_what_is_built(name: str, microbatches: int) -> None:
    picture = draw(run(build(name, ranks=4, microbatches=microbatches), Costs()), width=116)
    assert "\n".join(f"    {line}" for line in picture.splitlines()) in str(family.__doc__)
