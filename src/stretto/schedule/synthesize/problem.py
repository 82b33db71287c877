"""One placement's scheduling problem: the durations, latencies and memory of a run, without an order.

    stage          0      1      2      3          rank of each stage: 0 1 1 0 (a V on two ranks)
    rank 0        [F I W] ─comm─┐      ┌─ [F I W]
    rank 1                [F I W] ─0─ [F I W]      comm is 0 where both stages lie on one rank

Each of M micro-batches passes the stages forward and then back; W of a stage may come any time after its
I; a rank runs one operation at a time.  An activation is taken at the start of F; ``1 - act_w`` of it is
given back at the end of I and the rest at the end of W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.float64]

TOLERANCE = 1e-6
"""How far above its limit memory may come out, for the sake of rounding."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """What a schedule of one placement must fit; S stages on R ranks."""

    placement: tuple[int, ...]
    """Rank of each stage (S,)."""
    ranks: int
    """R."""
    microbatches: int
    """M."""
    F: Values
    """Time of F on each stage (S,)."""
    I: Values  # noqa: E741
    """Time of I (S,)."""
    W: Values
    """Time of W (S,)."""
    comm: Values
    """Latency from stage s to s + 1 and back (S - 1,); 0 where both lie on one rank."""
    activation: Values
    """Memory that one micro-batch keeps alive on each stage (S,), in micro-batches over a rank's whole share."""
    act_w: Values
    """Fraction of it that is kept between I and W (S,)."""
    limit: Values
    """Memory of each rank (R,), infinite where there is no limit."""

    @property
    def stages(self) -> int:
        """S."""
        return len(self.placement)

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Stages of each rank, ascending."""
        return tuple(
            tuple(stage for stage, holder in enumerate(self.placement) if holder == rank) for rank in range(self.ranks)
        )

    @property
    def work(self) -> Values:
        """Time that each rank computes for one micro-batch (R,)."""
        import numpy as np

        work = np.bincount(self.placement, weights=self.F + self.I + self.W, minlength=self.ranks)
        return work.astype(np.float64)
