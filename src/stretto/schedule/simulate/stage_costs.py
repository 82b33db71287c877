"""Costs laid out for a schedule: one array per kind of operation, one entry per stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.schedule.op import Kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.schedule import Schedule

    Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageCosts:
    """Costs of S stages on R ranks; made by ``Costs.of``.  Times in the costs' unit."""

    F: Values
    """Forward (S,)."""
    I: Values  # noqa: E741
    """Gradient of the inputs (S,)."""
    W: Values
    """Gradient of the weights (S,)."""
    R: Values
    """Recompute (S,)."""
    S: Values
    """First vocabulary pass, by vocabulary shard (S,)."""
    T: Values
    """Second vocabulary pass, by vocabulary shard (S,)."""
    O: Values  # noqa: E741
    """Offload (S,)."""
    L: Values
    """Load (S,)."""
    UNSHARD: Values
    """Gathering parameters (S,)."""
    RESHARD: Values
    """Letting them go (S,)."""
    REDUCE_GRAD: Values
    """Reducing gradients (S,)."""
    OPT: Values
    """Optimizer step (R,)."""
    comm: Values
    """Latency between stages s and s + 1 (S - 1,); 0 where no replica crosses ranks there."""
    activation: Values
    """What one micro-batch keeps alive (S,), in micro-batches over the average rank's share; sums to R."""
    input: Values
    """What is kept of it where R runs the forward again (S,), in the same unit."""
    rerun: Values
    """What B and I hold besides while they run (S,), in the same unit."""
    vocabulary: Values
    """What S keeps until T, by vocabulary shard (S,), in the same unit."""
    output: Values
    """What S scores, likewise (S,)."""
    row: Values
    """Embeddings that are looked up for a micro-batch, likewise (S,)."""
    act_w: Values
    """Fraction of it kept between I and W (S,)."""
    unit_bytes: float | None
    """Bytes of one unit of ``activation``, where they are known."""

    @property
    def B(self) -> Values:
        """Full backward (S,)."""
        return self.I + self.W

    def durations(self) -> Values:
        """Time of each kind on each stage (kinds, S); messages, and OPT which goes by rank, are 0 here."""
        import numpy as np

        table = np.zeros((len(Kind), len(self.F)))
        for name in ("F", "B", "I", "W", "R", "S", "T", "O", "L", "UNSHARD", "RESHARD", "REDUCE_GRAD"):
            table[Kind[name]] = getattr(self, name)
        return table


def stages_of(schedule: Schedule) -> npt.NDArray[np.int32]:
    """Entry of the arrays that each row of a schedule goes by (N,); that of OPT, which has no stage, means nothing."""
    import numpy as np

    return np.clip(schedule.stage, 0, schedule.num_stages - 1)
