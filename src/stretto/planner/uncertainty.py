"""How far off an estimate is expected to be: each cause has its own uncertainty, and independent ones add as squares.

    error of a step = sqrt(sum over causes of (share of the step x its uncertainty)^2)

The uncertainties are those of the causes on published runs that the calibration has not seen (docs/planner.md):
arithmetic is known best, what the network does to others least.  On machines that no calibration was fitted on all
shares of rates are guesses; ``FOREIGN`` says how good.
"""

from __future__ import annotations

from collections.abc import Mapping

UNCERTAINTY: Mapping[str, float] = {
    "work": 0.05,
    "tensor": 0.15,
    "context": 0.25,
    "bubble": 0.2,
    "data": 0.3,
    "host": 0.4,
    "optimizer": 0.3,
}
"""Relative error of each cause of a step's time, one standard deviation."""
FOREIGN = 0.25
"""Besides, relative error on machines other than the fitted: 70 runs of MosaicML on H100s come out 43% too fast to 2%
too slow, the median 18% too fast; four of torchtitan's on H100s of 500 W, 26% too fast to 6% too slow
(``benchmarks/planner_h100.py``)."""
FITTED_MACHINES = ("a100",)
"""Presets whose shares of rates are fitted."""
MEMORY = 0.1
"""Relative error of a rank's peak bytes: what tells the runs that are judged wrongly from the limit."""


def expected_error(seconds: Mapping[str, float], machine: str) -> float:
    """Relative error of the sum of ``seconds`` by cause (keys of ``UNCERTAINTY``) on a cluster of that name.

    >>> round(expected_error({"work": 8.0, "data": 2.0}, "a100:64"), 3)
    0.072
    """
    total = sum(seconds.values())
    if total <= 0:
        return 0.0
    squares = sum((share * UNCERTAINTY[cause] / total) ** 2 for cause, share in seconds.items())
    if machine.partition(":")[0] not in FITTED_MACHINES:
        squares += FOREIGN**2
    return float(squares**0.5)
