"""How much a search may simulate.

A schedule without closed form is simulated once per shape (family, ranks, chunks, micro-batches up to a few rounds),
which takes some milliseconds per rank and chunk.  The budget counts these instead of seconds, so that the same question
has the same answer on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from stretto.planner.candidates import FEW_CHUNKS
from stretto.planner.profile import ROUNDS
from stretto.planner.request import Request
from stretto.planner.step import FAMILIES
from stretto.spec.plan import PlanSpec

SEARCHED = ("v-min", "v-half", "zb-v")
"""Families that look for their order themselves: seconds for one shape."""
SEARCHED_PRICE = 10
"""Times what a family costs that doesn't."""
PASSES_PRICE = 8
"""Times what a schedule costs without passes: they are done operation by operation."""
UNITS = 1200
"""Ranks x chunks that are simulated, about 5 ms each."""
DEAREST = 40
"""Units that one shape may cost."""
THOROUGH = 10
"""Times that, if asked for."""
KEPT = {"closed": 1.0, "profiled": 0.5, "searched": 0.3, "pinned": 0.0}
"""Of 1f1b's activations, what the schedules of a round keep at least; a core that can't hold that isn't opened."""
OFFLOADED = ("1f1b", "interleaved")
"""Schedules that are tried with offload."""
CORES = 40
"""Cores of which more than the closed forms is looked at."""
SEARCHED_CORES = 3
"""Of which the searched families are."""
CHUNKS = (1, 2, 4)
"""Chunks that are simulated unless all shapes are paid for; others where they divide the layers of a rank evenly."""


@dataclass(slots=True, kw_only=True)
class Effort:
    """The budget of one search."""

    thorough: bool = False
    """Whether to simulate more, the searched families too."""
    left: int = field(init=False)
    """Units that can still be spent."""
    unpaid: int = 0
    """Shapes that were left out."""
    known: dict[tuple[object, ...], bool] = field(default_factory=dict)
    """Shape -> whether it is paid for."""

    def __post_init__(self) -> None:
        """Fill the purse."""
        self.left = UNITS * (THOROUGH if self.thorough else 1)

    def rounds(self, request: Request) -> Iterator[Round]:
        """What to look at, in turn; a pinned schedule is paid whatever it costs."""
        if "schedule" in request.pins or "schedule_file" in request.pins:
            yield Round(self, "pinned")
            return
        yield Round(self, "closed")
        yield Round(self, "profiled")
        if self.thorough:
            self.left = max(self.left, UNITS)
            yield Round(self, "searched")


class Round:
    """Which schedules are looked at in one pass over the cores."""

    def __init__(self, effort: Effort, kind: str) -> None:
        self.effort, self.kind = effort, kind
        self.kept = KEPT[kind]
        self.whole = kind in ("closed", "pinned")
        """Whether all cores belong to it."""
        self.cores = {"searched": SEARCHED_CORES}.get(kind, CORES * (THOROUGH if effort.thorough else 1))

    def opens(self, core: PlanSpec) -> bool:
        """Whether a core has anything to look at; without a pipeline there is only the closed form."""
        if self.kind == "pinned":
            return True
        return not core.offload if self.kind == "closed" else core.pp > 1 or core.offload or core.chunks > 1

    def pays(self, plan: PlanSpec, request: Request) -> bool:
        """Whether the schedule of ``plan`` belongs to this round and can be paid."""
        if self.kind == "pinned":
            return True
        closed = plan.schedule in FAMILIES and not (plan.offload or plan.passes)
        kind = "closed" if closed else "searched" if plan.schedule in SEARCHED else "profiled"
        if kind != self.kind:
            return False
        return kind == "closed" or self._buy(plan, request)

    def _buy(self, plan: PlanSpec, request: Request) -> bool:
        effort = self.effort
        microbatches = request.run.training.global_batch_size // (plan.dp * plan.micro_batch_size)
        settled = min(microbatches, ROUNDS * plan.pp + plan.pp + microbatches % plan.pp)
        shape = (plan.schedule, plan.pp, plan.chunks, settled, plan.offload, plan.passes)
        if shape not in effort.known:
            even = request.model.num_layers % (plan.pp * plan.chunks) == 0
            price = plan.pp * plan.chunks * (SEARCHED_PRICE if plan.schedule in SEARCHED else 1)
            price *= PASSES_PRICE if plan.passes else 1
            pinned = "chunks" in request.pins or "stages" in request.pins
            few = pinned or plan.chunks in CHUNKS or (even and plan.chunks <= FEW_CHUNKS)
            usual = effort.thorough or (few and (not plan.offload or plan.schedule in OFFLOADED))
            effort.known[shape] = usual and price <= min(effort.left, DEAREST * (THOROUGH if effort.thorough else 1))
            if effort.known[shape]:
                effort.left -= price
            else:
                effort.unpaid += 1
        return effort.known[shape]
