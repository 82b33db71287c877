"""``stretto diagnose`` of steps that place documents: where each rank's time goes, and which document it was.

    first operation anywhere ├──────────────────── span ────────────────────┤ last operation anywhere
    a rank                   │ computing │ messages │ pipeline │    idle    │
                                           of attention, waited for inside operations
                                                      inputs and gradients of other stages
                                                                 for others, for the next operation, or being done

No schedule is simulated: steps have as many micro-batches as their documents need.  What groups are made for is that
all ranks compute equally long, so what is told is how far they are from that, and by which documents.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stretto.schedule.measured.document_format import Held, documents_path, read_documents
from stretto.schedule.measured.format import FOLDER, RECEIVES, RankTrace, path_of, read
from stretto.schedule.measured.identity import places_documents
from stretto.schedule.measured.trace import NANOSECOND, recorded
from stretto.schedule.op import COMPUTE, Kind
from stretto.spec.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BACK = frozenset({Kind.UNSHARD, Kind.RESHARD})
"""Kinds that a rank is busy with beside its arithmetic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTime:
    """Where the time of one rank in one step goes, in seconds."""

    computing: float
    """Inside operations, without what it waits for there."""
    messages: float
    """Waiting for keys, values and gradients of documents that it shares with others."""
    pipeline: float
    """Waiting for inputs and gradients from other stages."""
    idle: float
    """The rest of the span."""
    settling: float
    """In the last reduction of gradients and of the norm, where the fastest wait for the others."""
    optimizer: float
    before: float
    """From the step's begin to its first operation: reading, and placing documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One micro-batch of one rank."""

    rank: int
    number: int
    seconds: float
    """Of its forward and backward, messages included."""
    documents: tuple[Held, ...]
    """Longest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedStep:
    """One step."""

    step: int
    ranks: tuple[RankTime, ...]
    """By rank of the world."""
    span: float
    """From the first operation anywhere to the last one that computes."""
    whole: float
    """From its begin to its end."""
    micro_batches: tuple[MicroBatch, ...]
    """Longest first."""

    @property
    def fullest(self) -> int:
        """The rank that computes longest."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].computing)

    @property
    def imbalance(self) -> float:
        """Computing of that rank over the mean of all."""
        mean = statistics.fmean(rank.computing for rank in self.ranks)
        return self.ranks[self.fullest].computing / mean if mean else 1.0

    @property
    def idle_share(self) -> float:
        """Of all ranks' span."""
        return statistics.fmean(rank.idle for rank in self.ranks) / self.span if self.span else 0.0

    @property
    def documents(self) -> dict[tuple[int, int, int], int]:
        """Documents by their micro-batch, group and length: (first rank, ranks, length) and how many there are."""
        shared: Counter[tuple[int, int, int, int]] = Counter()
        for one in self.micro_batches:
            seen = Counter((one.number, held.first, held.ranks, held.length) for held in one.documents)
            shared |= seen
        found: Counter[tuple[int, int, int]] = Counter()
        for (_, first, ranks, length), number in shared.items():
            found[first, ranks, length] += number
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentDiagnosis:
    """Steps of a run whose documents have groups of their own."""

    steps: tuple[PlacedStep, ...]
    """All that were recorded, but for the first of the run."""
    placed: PlacedStep
    """The one that is looked at."""
    device: str
    num_hosts: int
    findings: tuple[str, ...]
    """Sentences, the most important first."""

    def as_data(self) -> dict[str, Any]:
        """What ``--json`` prints; times in seconds."""
        placed = self.placed
        return {
            "step": placed.step,
            "steps": [step.step for step in self.steps],
            "whole_step": placed.whole,
            "span": placed.span,
            "imbalance": placed.imbalance,
            "idle_share": placed.idle_share,
            "median_imbalance": statistics.median(step.imbalance for step in self.steps),
            "median_idle_share": statistics.median(step.idle_share for step in self.steps),
            "ranks": [asdict(rank) for rank in placed.ranks],
            "microbatches": [
                {
                    "rank": one.rank,
                    "microbatch": one.number,
                    "seconds": one.seconds,
                    "documents": [held._asdict() for held in one.documents],
                }
                for one in placed.micro_batches
            ],
            "findings": list(self.findings),
        }


def has_documents(run: Path) -> bool:
    """Whether the trace of a run's directory is of steps that place documents; False where there is none to read."""
    path = path_of(run / FOLDER, 0)
    return path.is_file() and places_documents(read(path).source.plan)


def diagnose_documents(run: Path | str, *, step: int | None = None) -> DocumentDiagnosis:
    """Diagnose the run in a directory; ``step`` is looked at instead of the one of median length.

    Raises ConfigError where there is nothing to diagnose, or the step wasn't recorded.
    """
    from stretto.schedule.measured.document_findings import findings

    run = Path(run)
    ranks, common = recorded(run)
    if step is not None and step not in ranks[0].steps:
        told = ", ".join(map(str, common))
        raise ConfigError(f"Step {step} of the run in {run} was not recorded; recorded steps: {told}.")
    held = [read_documents(documents_path(run / FOLDER, rank)) for rank in range(len(ranks))]
    steps = tuple(_placed(ranks, held, number) for number in common)
    ordered = sorted(steps, key=lambda one: one.whole)
    placed = ordered[(len(ordered) - 1) // 2] if step is None else _placed(ranks, held, step)
    device = "cpu" if all(rank.source.device == "cpu" for rank in ranks) else "cuda"
    hosts = len({rank.source.host for rank in ranks})
    told_of = findings(placed, steps, device=device, num_hosts=hosts)
    return DocumentDiagnosis(steps=steps, placed=placed, device=device, num_hosts=hosts, findings=tuple(told_of))


def _placed(ranks: Sequence[RankTrace], held: Sequence[dict[int, tuple[Held, ...]]], step: int) -> PlacedStep:
    """One step of all ranks, on the first one's clock."""
    import numpy as np

    shifts = [_shift(ranks, rank) for rank in ranks]
    rows = [rank.steps[step].rows for rank in ranks]
    compute = [np.isin(found["kind"], [kind.value for kind in COMPUTE]) for found in rows]
    begin = min(
        (int(r["start"][c].min()) + s for r, c, s in zip(rows, compute, shifts, strict=True) if c.any()), default=0
    )
    end = max((int(r["end"][c].max()) + s for r, c, s in zip(rows, compute, shifts, strict=True) if c.any()), default=0)
    times, parts = [], []
    for rank, (found, own) in enumerate(zip(rows, compute, strict=True)):
        trace = ranks[rank].steps[step]
        times.append(_time(found, own, span=end - begin, before=int(found["start"].min(initial=end)) - trace.begin))
        parts += _micro_batches(rank, found[own], held[rank].get(step, ()))
    over = max(rank.steps[step].end + shift for rank, shift in zip(ranks, shifts, strict=True))
    start = min(rank.steps[step].begin + shift for rank, shift in zip(ranks, shifts, strict=True))
    return PlacedStep(
        step=step,
        ranks=tuple(times),
        span=(end - begin) * NANOSECOND,
        whole=(over - start) * NANOSECOND,
        micro_batches=tuple(sorted(parts, key=lambda one: -one.seconds)),
    )


def _shift(ranks: Sequence[RankTrace], rank: RankTrace) -> int:
    """By how much a rank's clock stands behind the first one's, in nanoseconds; one figure for each host."""
    epochs = {other.source.host: other.source.epoch for other in reversed(ranks)}
    return epochs[rank.source.host] - ranks[0].source.epoch


def _time(rows: npt.NDArray[np.void], compute: npt.NDArray[np.bool_], *, span: int, before: int) -> RankTime:
    """Of one rank; times in nanoseconds."""
    import numpy as np

    taken = rows["end"] - rows["start"]
    back = np.isin(rows["kind"], [kind.value for kind in BACK])
    received = np.isin(rows["kind"], [kind.value for kind in RECEIVES])
    messages = int(rows["wait"][compute].sum())
    computing = int(taken[compute].sum()) - messages + int(taken[back].sum())
    pipeline = int(rows["wait"][received].sum())
    whole = rows["microbatch"] < 0
    return RankTime(
        computing=computing * NANOSECOND,
        messages=messages * NANOSECOND,
        pipeline=pipeline * NANOSECOND,
        idle=max(0, span - computing - messages - pipeline) * NANOSECOND,
        settling=int(taken[whole & (rows["kind"] == Kind.REDUCE_GRAD)].sum()) * NANOSECOND,
        optimizer=int(taken[rows["kind"] == Kind.OPT].sum()) * NANOSECOND,
        before=max(0, before) * NANOSECOND,
    )


def _micro_batches(rank: int, rows: npt.NDArray[np.void], held: Sequence[Held]) -> list[MicroBatch]:
    """What a rank computed, micro-batch by micro-batch."""
    found = []
    for number in sorted(set(rows["microbatch"].tolist())):
        own = rows[rows["microbatch"] == number]
        documents = sorted((one for one in held if one.microbatch == number), key=lambda one: -one.length)
        seconds = int((own["end"] - own["start"]).sum()) * NANOSECOND
        found.append(MicroBatch(rank=rank, number=number, seconds=seconds, documents=tuple(documents)))
    return found
