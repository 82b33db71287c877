"""What a plan's pipeline schedule asks of its ranks, in counts: stages, what is alive, what the step hangs on.

A schedule is a fixed order, so the time of a step is the longest of its chains of operations, and each chain costs

    sum over stages of  n_F F + n_I I + n_W W (+ n_S S + n_T T)  +  n messages

The schedule is simulated once under several probes (even stages, a heavy head, one heavy rank, slow messages ...). The
chains that the step hung on are kept as counts, and an estimate is the longest of them under its own costs: exact where
a probe was of the same shape, a little less elsewhere.  A few rounds of R micro-batches after the start every family
repeats itself, so two lengths are simulated and longer steps follow by the difference.

Memory likewise: for each rank, how many micro-batches of each of its stages are alive at its fullest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from stretto.schedule.op import Kind
from stretto.spec.errors import ScheduleError, StrettoError
from stretto.spec.front import FILL

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.schedule import Schedule
    from stretto.schedule.simulate import Costs
    from stretto.spec.plan import PlanSpec

    Values = npt.NDArray[np.float64]

ROUNDS = 4
"""Rounds of R micro-batches after which a family repeats itself."""
UNITS = ("zeropp", "skip-pipe")
"""Families whose units or paths depend on the number of micro-batches; they are simulated as they are."""
FEW = 512
"""Micro-batches up to which that is done."""
PASSES = (Kind.F, Kind.I, Kind.W, Kind.R, Kind.S, Kind.T)
"""Columns of a chain; B is I and W."""
HEAVY = 1.3
"""How much longer a heavy stage takes in a probe."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:
    """Counts of one schedule; nothing here depends on a cost."""

    placement: tuple[tuple[int, ...], ...]
    """Rank of each stage, for each replica of the model in the pipeline."""
    held: tuple[tuple[tuple[int, int], ...], ...]
    """(replica, stage) that each rank holds."""
    voices: tuple[float, ...]
    """Micro-batches through each replica."""
    alive: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
    """For each rank candidates of its fullest moment: (stage, micro-batches of it alive)."""
    chains: Values
    """Counts of each pass and stage, and of messages, of the chains of the shorter simulation [K, 6 S + 1]."""
    longer: Values
    """Of the longer one."""
    beyond: float
    """How many times the difference of the two comes on top of the shorter."""
    vocabulary: bool
    """Whether the head is cut over all ranks (passes S and T)."""
    waiting: tuple[tuple[float, float, float], ...]
    """What those keep on each rank at its most: tables between S and T, tensors of the size of the last stage's output,
    embeddings of a micro-batch; nothing where the head isn't cut."""
    offloaded: tuple[float, ...]
    """Share of each rank's activations that go to the host and come back."""

    def makespan(self, passes: Mapping[Kind, Sequence[float]], message: float) -> float:
        """Seconds from the first operation to the last; ``passes`` seconds per stage, ``message`` of one message."""
        import numpy as np

        zeros = [0.0] * len(self.placement[0])
        costs = np.array([*(second for kind in PASSES for second in passes.get(kind, zeros)), message])
        short = float((self.chains @ costs).max())
        return short + self.beyond * (float((self.longer @ costs).max()) - short) if self.beyond else short

    def stages_of_rank(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(replica, stage) that a rank holds."""
        return self.held[rank]


def profile(plan: PlanSpec, microbatches: int) -> Profile:
    """The profile of a plan's schedule; ScheduleError for a family or shape that can't be.  Remembered."""
    found = _profile(schedule_key(plan), microbatches)
    check_shape("stages", len(found.placement[0]), plan.num_stages)
    return found


def check_shape(what: str, there: int, asked: int) -> None:
    """ScheduleError where a schedule has another number of something than the plan."""
    if there != asked:
        raise ScheduleError(f"The schedule has {there} {what}, but the plan has {asked}.")


def schedule_key(plan: PlanSpec) -> Key:
    """What of a plan its schedule depends on."""
    options = tuple(sorted((name, _frozen(value)) for name, value in plan.options.items()))
    passes = tuple(text for text in plan.passes if text.partition(":")[0] != FILL)  # of the pipeline by itself
    if plan.offload and not any(text.partition(":")[0] == "offload" for text in passes):
        passes = (*passes, "offload")
    whole = plan.compile == "blocks"
    return (plan.schedule, plan.pp, plan.chunks, options, passes, plan.memory_limit, plan.schedule_file, whole)


Key = tuple[str, int, int, tuple[tuple[str, Any], ...], tuple[str, ...], float | None, str | None, bool]
"""Family, ranks, chunks, options, passes, memory limit, file, and whether layers are compiled as a whole (W empty)."""


@lru_cache(maxsize=4096)
def _profile(key: Key, microbatches: int) -> Profile:
    family, ranks, *_, file, _ = key
    first = ROUNDS * ranks + microbatches % ranks
    second = first + ranks
    exact = file is not None or microbatches <= second or (family in UNITS and microbatches <= FEW)
    lengths = (microbatches, microbatches) if exact else (first, second)
    short, long = (_simulated(key, length) for length in lengths)
    return Profile(
        placement=short.placement,
        held=_held(short.placement, ranks),
        voices=tuple(share * microbatches for share in short.voices),
        alive=long.alive if exact else _grown(short.alive, long.alive, microbatches / second),
        chains=short.chains,
        longer=long.chains,
        beyond=0.0 if exact else (microbatches - first) / ranks,
        vocabulary=short.vocabulary,
        waiting=long.waiting,
        offloaded=long.offloaded,
    )


def _held(placement: tuple[tuple[int, ...], ...], ranks: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """(replica, stage) by rank."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for voice, holders in enumerate(placement):
        for stage, rank in enumerate(holders):
            found[rank].append((voice, stage))
    return tuple(map(tuple, found))


Alive = tuple[tuple[tuple[tuple[int, int], ...], ...], ...]


def _grown(short: Alive, long: Alive, factor: float) -> Alive:
    """What is alive in a longer step: as in ``long`` once a family alternates, in proportion where it gathers."""
    before, after = (sum(max(sum(n for _, n in one) for one in rank) for rank in alive) for alive in (short, long))
    if before >= after:
        return long
    return tuple(tuple(tuple((stage, round(n * factor)) for stage, n in one) for one in rank) for rank in long)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Counts:
    """What one simulated length gave."""

    placement: tuple[tuple[int, ...], ...]
    voices: tuple[float, ...]
    """Share of the micro-batches through each replica."""
    alive: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
    chains: Values
    vocabulary: bool
    waiting: tuple[tuple[float, float, float], ...]
    offloaded: tuple[float, ...]
    """Of each rank's share of the layers and a micro-batch, what goes to the host and comes back."""


@lru_cache(maxsize=1024)
def _simulated(key: Key, microbatches: int) -> _Counts:
    import numpy as np

    from stretto.schedule.simulate.vocabulary_memory import most_waiting

    schedule, whole = scheduled(key, microbatches), key[-1]
    chains = {tuple(_chain(schedule, costs.whole() if whole else costs)) for costs in _probes(schedule)}
    ranks = range(schedule.num_ranks)
    moved = []
    for rank in ranks:
        kinds = schedule.kind[int(schedule.offsets[rank]) : int(schedule.offsets[rank + 1])]
        moved.append(int(np.count_nonzero(kinds == Kind.O)) / max(1, int(np.count_nonzero(kinds == Kind.F))))
    scored = bool(np.isin(schedule.kind, (Kind.S, Kind.T)).any())
    voices = [schedule.voice.count(voice) for voice in range(len(schedule.placement))]
    return _Counts(
        placement=schedule.placement,
        voices=tuple(count / schedule.num_microbatches for count in voices),
        alive=tuple(_fullest(schedule, rank, whole=whole) for rank in ranks),
        chains=np.array(sorted(chains)),
        vocabulary=scored,
        waiting=most_waiting(schedule) if scored else ((0.0, 0.0, 0.0),) * schedule.num_ranks,
        offloaded=tuple(moved),
    )


def scheduled(key: Key, microbatches: int) -> Schedule:
    """The schedule that the runtime would play, without messages and sharding."""
    from stretto.schedule.document import load
    from stretto.schedule.families import FAMILIES, build, check_peak
    from stretto.schedule.passes import change
    from stretto.schedule.passes.hand_over import ahead
    from stretto.schedule.simulate import Costs
    from stretto.spec.written import read_named

    family, ranks, chunks, pairs, passes, limit, file, whole = key
    options, costs = dict(pairs), Costs().whole() if whole else Costs()
    if family == "hanayo":
        options.setdefault("waves", max(1, chunks // 2))
    if family == "skip-pipe":
        options.setdefault("keep", [0, ranks * chunks - 1])
    if file is not None:
        from pathlib import Path

        schedule = load(Path(file).expanduser())
        check_shape("micro-batches", schedule.num_microbatches, microbatches)
        check_shape("ranks", schedule.num_ranks, ranks)
    else:
        known = FAMILIES.get(family)
        free = known is not None and known.chunk_counts == ()
        bounded = None if passes and known is not None and not known.costed else limit
        schedule = build(
            family, ranks=ranks, microbatches=microbatches, chunks=None if free else chunks, options=options,
            memory_limit=bounded, costs=costs,
        )  # fmt: skip
        check_shape("stages", schedule.num_stages, ranks * chunks)
    for text in passes:
        name, settings = read_named(text, "plan.passes")
        if name == FILL:
            schedule, costs = ahead(schedule, costs=costs, **{key: settings[key] for key in settings if key != "units"})
        else:
            schedule, costs = change(schedule, name, options=settings, costs=costs)
    if limit is not None and (passes or file is not None):
        check_peak(schedule, costs, limit)
    return schedule


@lru_cache(maxsize=512)
def refused(key: Key, microbatches: int) -> str:
    """Why the schedule can't be built in full length, with its options and within its memory limit; empty: it can."""
    try:
        scheduled(key, microbatches)
    except StrettoError as error:
        return str(error)
    return ""


def _probes(schedule: Schedule) -> list[Costs]:
    """Costs of different shapes: even, a heavy head, light ends, one heavy rank, slow messages, dear recompute."""
    from stretto.schedule.simulate import Costs

    stages, ranks = schedule.num_stages, schedule.num_ranks

    def shaped(weights: Sequence[float], comm: float = 0.0, again: float = 0.0) -> Costs:
        return Costs(
            F=weights, I=tuple((1.1 + again) * w for w in weights), W=tuple(0.9 * w for w in weights), S=0.1, T=0.1,
            comm=comm,
        )  # fmt: skip

    even = (1.0,) * stages
    ends = (HEAVY**-1, *even[1:-1], HEAVY**-1) if stages > 2 else even
    head = (*even[1:], HEAVY)
    found = [Costs(F=even, I=even, W=even), shaped(even), shaped(even, 0.05), shaped(even, 0.3), shaped(even, 0, 1.0)]
    found += [shaped(head), shaped(head, 0.05), shaped(ends), shaped(ends, 0.05)]
    for rank in sorted({0, ranks // 2, ranks - 1} if ranks > 8 else set(range(ranks))):
        heavy = {stage for voice in schedule.placement for stage, holder in enumerate(voice) if holder == rank}
        found.append(shaped([HEAVY if stage in heavy else 1.0 for stage in range(stages)]))
    return found


def _chain(schedule: Schedule, costs: Costs) -> list[float]:
    """Counts of the chain that the step hangs on."""
    import numpy as np

    from stretto.schedule.simulate import critical_path, run

    timeline = run(schedule, costs)
    played = timeline.schedule
    rows = np.array(critical_path(timeline), dtype=np.int64)
    rank = np.searchsorted(played.offsets, rows, side="right") - 1
    counts = np.zeros((len(PASSES), schedule.num_stages))
    kinds, stages = played.kind[rows], played.stage[rows]
    for column, kind in enumerate(PASSES):
        same = (kinds == kind) | ((kinds == Kind.B) if kind in (Kind.I, Kind.W) else False)
        np.add.at(counts[column], stages[same], 1.0)
    return [*counts.ravel().tolist(), float(np.count_nonzero(np.diff(rank)))]


def _fullest(schedule: Schedule, rank: int, *, whole: bool) -> tuple[tuple[tuple[int, int], ...], ...]:
    """What is alive on a rank at its fullest: where all its stages weigh the same, and where one weighs more.

    ``whole``: I gives back what W else does.
    """
    import numpy as np

    rows = slice(int(schedule.offsets[rank]), int(schedule.offsets[rank + 1]))
    kind, stage, microbatch = schedule.kind[rows], schedule.stage[rows], schedule.microbatch[rows]
    stages = sorted({int(one) for one in stage[kind == Kind.F]})
    if not stages:
        return ((),)
    column = np.searchsorted(stages, np.clip(stage, stages[0], stages[-1]))
    again = {(int(s), int(m)) for s, m in zip(stage[kind == Kind.R], microbatch[kind == Kind.R], strict=True)}
    taken, given = np.zeros((2, len(kind), len(stages)))
    takes = np.isin(kind, (Kind.F, Kind.R, Kind.L))
    taken[np.flatnonzero(takes), column[takes]] = 1
    gives = np.isin(kind, (Kind.B, Kind.I if whole else Kind.W, Kind.O))
    for row in np.flatnonzero(kind == Kind.F).tolist():
        one = int(stage[row])
        gives[row] = not schedule.has_backward(one) or (one, int(microbatch[row])) in again
    given[np.flatnonzero(gives), column[gives]] = 1
    before = np.cumsum(taken, axis=0) - np.cumsum(given, axis=0) + given
    found = set()
    for heavy in range(-1, len(stages) if len(stages) > 1 else 0):
        weights = np.ones(len(stages))
        if heavy >= 0:
            weights[heavy] = 2.0
        moment = before[int((before @ weights).argmax())]
        found.add(tuple((one, round(float(count))) for one, count in zip(stages, moment, strict=True)))
    return tuple(sorted(found))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
