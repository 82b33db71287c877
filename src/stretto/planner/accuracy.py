"""How far estimates have been from measured runs: said with every estimate."""

from __future__ import annotations

from stretto.planner.request import Request

EXPECTED = {"median": 0.077, "p90": 0.20}
"""Absolute relative error of the step time on published runs of a model that nothing was fitted to (30B rows of
Hagemann et al. 2023, A100; ``benchmarks/planner_truth.py``)."""


def expected_error(request: Request) -> str:
    """One sentence: the error to expect, and where it was found."""
    if request.assumed:
        return "expected error: not known, since the machine's rates are assumed"
    return (
        f"expected error of the step time: {EXPECTED['median']:.0%} in the median, {EXPECTED['p90']:.0%} in one of ten "
        "(published A100 runs that nothing was fitted to)"
    )
