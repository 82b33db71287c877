"""What vocabulary passes keep besides the activations of the layers.

In the order of a rank, for a micro-batch m with output y of the last stage (``output_bytes``), a shard's table of
exponentials (``vocabulary_bytes``), and the embeddings that a shard looks up (``row_bytes``):

    y           the rank of the last stage   from the end of F till the end of T
                the others                   from when they begin to receive it (itinerary.Outputs) till the end of T
    table       every rank                   from S till the end of T
    products    every rank, algorithm 2      two of the size of y, from S till its T, or its first backward if sooner:
                                             at the latest then the sums are there that they wait for
    gradient    where the first backward is  of the size of y: algorithm 1 from the end of T till that backward;
                                             with algorithm 2 it takes the products' place
    rows        the first stage's rank       of all shards, from the look-up till its F
                the others                   of its shard, till LEAVING more were sent
    and back    the first stage's rank       those of all shards, from its backward till they are sent; the parts of
                                             others till LEAVING more were sent
                every rank                   those of its shard, from then till they are taken

A micro-batch without backward has no T: y is let go behind S, on the last stage's rank at the end.  Sums take no
memory that counts, and what the runtime multiplies while S and T run is gone when they end.  With 16-bit activations
the gradient is summed in float32, twice the size of y; it is one tensor on one rank, and counted as one y.
"""

from __future__ import annotations

from collections import deque
from itertools import accumulate
from typing import TYPE_CHECKING

from stretto.schedule.itinerary import LEAVING, Outputs, by_algorithm_2, itineraries
from stretto.schedule.op import MESSAGES, Kind
from stretto.schedule.passes.communication import lower

if TYPE_CHECKING:
    from stretto.schedule.arrows import Places
    from stretto.schedule.schedule import Schedule
    from stretto.schedule.simulate.stage_costs import StageCosts, Values

BACKWARD = (Kind.B, Kind.I)


def vocabulary_changes(places: Places, costs: StageCosts) -> Values:
    """What each row of a schedule with S takes at its start and gives back (negative) at its end (N, 2)."""
    import numpy as np

    found = np.zeros((places.schedule.num_ops, 2))
    if not (costs.vocabulary.any() or costs.output.any() or costs.row.any()):
        return found
    early = by_algorithm_2(places)
    for rank in range(places.schedule.num_ranks):
        own = _Rank(places, costs, rank, found)
        own.outputs()
        own.passes(early)
    if costs.row.any():
        _rows(places, costs, found)
    return found


def most_waiting(schedule: Schedule) -> tuple[tuple[float, float, float], ...]:
    """What each rank holds: tables, tensors of the size of an output, and embeddings of whole micro-batches.

    Each at its most, which need not be at the same time.
    """
    import numpy as np

    from stretto.schedule.arrows import Places
    from stretto.schedule.simulate.costs import Costs

    places, found = Places(schedule), []
    even = [1.0] * schedule.num_stages
    for name, one in (("vocabulary_bytes", 1.0), ("output_bytes", 1.0), ("row_bytes", 1 / schedule.num_ranks)):
        costs = Costs(activation_bytes=even, **{name: [one] * schedule.num_stages}).of(schedule)
        changes = vocabulary_changes(places, costs) * (costs.unit_bytes or 1.0)
        ranks = np.split(changes, schedule.offsets[1:-1])
        found.append([float(np.cumsum(rank.ravel()).max(initial=0.0)) for rank in ranks])
    return tuple(zip(*found, strict=True))


class _Rank:
    """One rank's rows, whose changes are filled in."""

    def __init__(self, places: Places, costs: StageCosts, rank: int, found: Values) -> None:
        schedule, flows = places.schedule, places.flows
        self.rank, self.found = rank, found
        self.output, self.table = float(costs.output[rank]), float(costs.vocabulary[rank])
        start, stop = int(schedule.offsets[rank]), int(schedule.offsets[rank + 1])
        columns = (schedule.kind[start:stop], schedule.stage[start:stop], schedule.microbatch[start:stop])
        self.rows = [(start + i, *row) for i, row in enumerate(zip(*(c.tolist() for c in columns), strict=True))]
        """Number, kind, stage, micro-batch."""
        self.last, self.turn = flows.last[flows.of].tolist(), flows.turn[flows.of].tolist()
        self.sources = {m: schedule.rank_of(stage, schedule.voice[m]) for m, stage in enumerate(self.last)}

    def outputs(self) -> None:
        """What waits for S, and with S for T."""
        if not self.output:
            return
        order = [m for _, kind, _, m in self.rows if kind == Kind.S]
        learning = {m for _, kind, _, m in self.rows if kind == Kind.T}
        sending = Outputs(order, self.sources, here=self.rank)
        self._receive(sending.begin(), self.rows[0][0], 0)
        for row, kind, stage, m in self.rows:
            own = self.sources[m] == self.rank if m >= 0 else False
            if kind == Kind.F and own and stage == self.last[m]:
                self.found[row, 1] += self.output
                self._receive(sending.give(m), row, 1)
            elif kind == Kind.S:
                self._receive(sending.take(), row, 0)
            if kind == Kind.T or (kind == Kind.S and m not in learning and not own):
                self.found[row, 1] -= self.output
        left = sum(self.sources[m] == self.rank and m not in learning for m in order)
        self.found[self.rows[-1][0], 1] -= left * self.output

    def _receive(self, started: list[int], row: int, side: int) -> None:
        self.found[row, side] += self.output * sum(self.sources[m] != self.rank for m in started)

    def passes(self, early: frozenset[int]) -> None:
        """What S makes for T and the first backward, and T for that."""
        learning = {m for _, kind, _, m in self.rows if kind == Kind.T}
        products: set[int] = set()
        gradients: set[int] = set()
        for row, kind, stage, m in self.rows:
            if kind == Kind.S and m in learning:
                self.found[row, 0] += self.table
                if m in early:
                    products.add(m)
                    self.found[row, 0] += 2 * self.output
            first = kind in BACKWARD and stage == self.turn[m]
            if (kind == Kind.T or first) and m in products:
                products.remove(m)
                self.found[row, 0] -= 2 * self.output
            if first and m in gradients:
                gradients.remove(m)
                self.found[row, 0] -= self.output
            if kind == Kind.T:
                self.found[row, 1] -= self.table
                if m not in early and self.sources[m] == self.rank:
                    gradients.add(m)
                    self.found[row, 1] += self.output


def _rows(places: Places, costs: StageCosts, found: Values) -> None:
    """Embeddings on their way to the first stage and their gradients back."""
    schedule = places.schedule
    lowered = schedule if schedule.lowered else lower(schedule)
    share = costs.row[: schedule.num_ranks]
    whole = float(share.sum())
    first = [schedule.path(m)[0] for m in range(schedule.num_microbatches)]
    reader = [schedule.rank_of(stage, schedule.voice[m]) for m, stage in enumerate(first)]
    for rank, visits in enumerate(itineraries(lowered)):
        own, start, stop = float(share[rank]), int(schedule.offsets[rank]), int(schedule.offsets[rank + 1])
        counted = (schedule.lowered or op.kind not in MESSAGES for op in lowered.ops(rank))
        rows = list(accumulate(counted, initial=start))
        leaving: deque[float] = deque()
        for at, what, m in visits:
            reads, sent = reader[m] == rank, 0.0
            row, side = (rows[at], 0) if rows[at] < stop else (stop - 1, 1)
            if what == "look up":
                sent = 0.0 if reads else own
                found[row, side] += whole if reads else own
            elif what == "exchange":
                sent = whole - own if reads else 0.0
                found[row, side] += own + sent - (whole if reads else 0.0)
            else:
                found[row, side] -= own
                continue
            leaving.append(sent)
            found[row, side] -= leaving.popleft() if len(leaving) > LEAVING else 0.0
        found[stop - 1, 1] -= sum(leaving)
        for row in range(start, stop):
            kind, stage, m = int(schedule.kind[row]), int(schedule.stage[row]), int(schedule.microbatch[row])
            if kind == Kind.F and stage == first[m]:
                found[row, 0] -= whole
            elif kind in BACKWARD and stage == first[m]:
                found[row, 1] += whole
