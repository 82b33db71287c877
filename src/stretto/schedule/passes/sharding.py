"""Sharded parameters: gather before use, free after it, reduce gradients after the last (ZeRO-3, Rajbhandari et al.
2020).

    0UNSHARD0 0F0 0F1 0RESHARD0 ... 0UNSHARD0 0I0 0W0 0I1 0W1 0RESHARD0 0REDUCE_GRAD0 OPT

A stage has one or more blocks, each gathered, freed and reduced by itself; the number after the kind is the block.
UNSHARD and REDUCE_GRAD run on a stream of their own (one per rank, a queue in the order of the rank) and occupy no
arithmetic; RESHARD takes no time.  Each starts when the operation before it in the rank's order that does occupy
arithmetic has ended, and where it is on the stream, when the stream is free.

**Arrows**, all on one rank, in its order (these kinds may occur several times):

    F, B, I, R of stage s      need the latest UNSHARD of each block of s that stands before them
    W                          needs no parameters: the input and the output's gradient are kept
    sREDUCE_GRADb              needs the latest B or W of stage s before it
    OPT                        needs every REDUCE_GRAD and every B or W of the rank

**Complete**: where a block of a stage is ever unsharded, each F, B, I and R of the stage has it unsharded: an UNSHARD
stands before it with no RESHARD between; the latest REDUCE_GRAD of each block stands behind the last B or W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stretto.schedule.op import PER_BLOCK, Kind, Op
from stretto.schedule.passes.chosen import together
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

USES = frozenset({Kind.F, Kind.B, Kind.I, Kind.R})
"""What needs a stage's parameters."""
GRADIENTS = frozenset({Kind.B, Kind.W})
"""What adds to their gradients."""
RESHARD = ("turn", "each", "never")
"""When parameters are let go: as the rank turns to another stage, after each operation, after the last one."""
MOST = 4096
"""Blocks of a stage."""
REDUCE = ("last", "each")
"""When gradients are reduced: after the stage's last B or W, after each."""


def sharding(
    schedule: Schedule,
    *,
    blocks: int | Sequence[int] = 1,
    reshard: str = "turn",
    prefetch: int = 1,
    reduce: str = "last",
    optimizer: bool = True,
) -> Schedule:
    """Each use of a stage has its blocks gathered, each last gradient is reduced; all operations keep their order.

    ``blocks`` is their number in each stage, or one number per stage.  ``prefetch`` is how many operations ahead of its
    use a block is gathered; parameters that would be gathered again while they are let go are kept.
    ``reshard`` and ``reduce`` are explained at ``RESHARD`` and ``REDUCE``; ``optimizer`` adds OPT at the end.
    Raises ScheduleError for an option that can't be and for a schedule that is sharded already.
    """
    _check(schedule, reshard=reshard, prefetch=prefetch, reduce=reduce)
    if type(optimizer) is not bool:
        raise ScheduleError(f"Sharding can't have optimizer={optimizer!r}; it is true or false.")
    bare = without_messages(schedule)
    counts = _blocks(bare, blocks)
    sharded = []
    for rank in range(bare.num_ranks):
        order = _Order(bare.ops(rank))
        order.gather(counts, reshard=reshard, prefetch=prefetch)
        order.reduce(counts, each=reduce == "each")
        sharded.append(order.ops(optimizer=optimizer))
    result = bare.with_orders(sharded)
    return lower(result) if schedule.lowered else result


def _check(schedule: Schedule, *, reshard: str, prefetch: int, reduce: str) -> None:
    """Raise ScheduleError for options that can't be, and for a schedule that has what this pass adds."""
    for name, value, known in (("reshard", reshard, RESHARD), ("reduce", reduce, REDUCE)):
        if value not in known:
            raise ScheduleError(f"Sharding can't have {name}={value!r}; it is one of {', '.join(known)}.")
    if type(prefetch) is not int or prefetch < 0:
        raise ScheduleError(f"Sharding can't prefetch {prefetch!r} operations ahead; give a number of at least 0.")
    there = sorted(Kind(kind).name for kind in set(schedule.kind.tolist()) & (PER_BLOCK | {Kind.OPT}))
    if there:
        raise ScheduleError(
            f"{schedule.name} has {', '.join(there)} already; sharding comes once, and last. Families that bring their "
            "own have an option against it: sharded=false (zeropp, modular), eager_sync=false (chimera, bitpipe)."
        )


def _blocks(schedule: Schedule, blocks: int | Sequence[int]) -> list[int]:
    """Number of blocks of each stage."""
    counts = list(blocks) if isinstance(blocks, Sequence) else [blocks] * schedule.num_stages
    fitting = all(type(count) is int and 1 <= count <= MOST for count in counts)
    if len(counts) != schedule.num_stages or not fitting:
        raise ScheduleError(
            f"Sharding can't have blocks={blocks!r}; give one number of at least 1 (up to {MOST}), or one for each of "
            f"the {schedule.num_stages} stages."
        )
    return counts


@dataclass(slots=True)
class _Unit:
    """Operations that run together, and what comes before and after them."""

    ops: list[Op]
    before: list[Op]
    after: list[Op]

    def uses(self) -> set[int]:
        """Stages whose parameters are needed."""
        return {op.stage for op in self.ops if op.kind in USES}


class _Order:
    """One rank's order."""

    def __init__(self, order: list[Op]) -> None:
        self.units = [_Unit(group, [], []) for group in together(order)]

    def gather(self, counts: list[int], *, reshard: str, prefetch: int) -> None:
        """Put UNSHARD and RESHARD around the uses of each stage."""
        for stage in sorted(set().union(*(unit.uses() for unit in self.units))):
            free = 0
            for first, last in self._intervals(stage, reshard=reshard, prefetch=prefetch):
                kinds = {op.kind for op in self.units[first].ops if op.stage == stage}
                backward = not kinds & {Kind.F, Kind.R}
                blocks = range(counts[stage])[:: -1 if backward else 1]
                gathered = self.units[max(free, first - prefetch)].before
                gathered += [Op(Kind.UNSHARD, stage=stage, microbatch=block) for block in blocks]
                self.units[last].after += [Op(Kind.RESHARD, stage=stage, microbatch=block) for block in blocks]
                free = last + 1

    def _intervals(self, stage: int, *, reshard: str, prefetch: int) -> Iterator[tuple[int, int]]:
        """First and last unit of each time for which a stage stays gathered."""
        uses = [index for index, unit in enumerate(self.units) if stage in unit.uses()]
        first = uses[0]
        for last, following in zip(uses, [*uses[1:], -1], strict=True):
            if following >= 0 and reshard != "each":
                turned = any(self.units[between].uses() for between in range(last + 1, following))
                if reshard == "never" or not turned or following - last <= prefetch + 1:
                    continue
            yield first, last
            first = following

    def reduce(self, counts: list[int], *, each: bool) -> None:
        """Put REDUCE_GRAD after gradients."""
        seen: set[int] = set()
        for unit in reversed(self.units):
            for stage in sorted({op.stage for op in unit.ops if op.kind in GRADIENTS}):
                if each or stage not in seen:
                    blocks = reversed(range(counts[stage]))
                    unit.after += [Op(Kind.REDUCE_GRAD, stage=stage, microbatch=block) for block in blocks]
                seen.add(stage)

    def ops(self, *, optimizer: bool) -> list[Op]:
        """The order, OPT at its end where the rank has gradients and a step is wanted."""
        result = [op for unit in self.units for op in (*unit.before, *unit.ops, *unit.after)]
        if optimizer and any(op.kind in GRADIENTS for op in result):
            result.append(Op(Kind.OPT))
        return result
