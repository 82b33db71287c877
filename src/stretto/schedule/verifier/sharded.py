"""Sharded parameters and the optimizer: gathered before use, reduced after the last gradient, stepped at the end.

    0UNSHARD0 0F0 0RESHARD0 0B0        refused: 0B0 uses what 0RESHARD0 freed

Only stages that are unsharded (or reduced) anywhere on a rank are held to it there; what stays gathered at the
end of the step is no error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule.arrows import Places
from stretto.schedule.op import Kind
from stretto.schedule.verifier.fault import fault, fault_at

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.int64]

USES = (Kind.F, Kind.B, Kind.I, Kind.R)
"""Kinds that need the parameters; W needs only what I kept."""
GIVES_GRADIENTS = (Kind.B, Kind.W)
"""Kinds that add to the gradients of the parameters."""


def check_sharded(places: Places) -> None:
    """Raise ScheduleError where a block is used while it isn't gathered, gathered or freed twice, or not reduced."""
    gathers = _by_stage(places, (Kind.UNSHARD, Kind.RESHARD))
    uses = _by_stage(places, USES) if gathers else {}
    for held, toggles in gathers.items():
        for block in sorted(set(places.schedule.microbatch[toggles].tolist())):
            _check_gathered(places, toggles[places.schedule.microbatch[toggles] == block], uses.get(held), block)
    reductions = _by_stage(places, (Kind.REDUCE_GRAD,))
    if reductions:
        for held, gradients in _by_stage(places, GIVES_GRADIENTS).items():
            blocks = set(places.schedule.microbatch[gathers[held]].tolist()) if held in gathers else set()
            _check_reduced(places, gradients, reductions.get(held), blocks)


def check_optimizer(places: Places) -> None:
    """Raise ScheduleError where a rank steps twice, before its work is over, or not while others do.

    An asynchronous schedule steps behind every B, on every rank: that is allowed as a whole or not at all.
    """
    import numpy as np

    schedule = places.schedule
    steps = np.flatnonzero(schedule.kind == Kind.OPT)
    if not len(steps) or _steps_each(places):
        return
    twice = np.flatnonzero(np.diff(places.rank[steps]) == 0)
    if len(twice):
        raise fault(schedule, int(steps[twice[0] + 1]), "which has run already; a rank steps once")
    work = np.flatnonzero(~np.isin(schedule.kind, (Kind.OPT, Kind.RESHARD, Kind.UNSHARD)))
    for rank in range(schedule.num_ranks):
        own, step = work[places.rank[work] == rank], steps[places.rank[steps] == rank]
        if len(step) and len(own) and own[-1] > step[0]:
            raise fault(schedule, int(step[0]), "but has work left behind it")
        if not len(step) and np.isin(schedule.kind[own], GIVES_GRADIENTS).any():
            sentence = f"OPT is missing from rank {rank}, which has gradients as the ranks that run it."
            raise fault_at(schedule, rank, int(np.diff(schedule.offsets)[rank]), sentence)


def _steps_each(places: Places) -> bool:
    """Whether every rank runs B OPT B OPT ... and no other backward: each update is of the one gradient before it."""
    import numpy as np

    schedule = places.schedule
    rows = np.flatnonzero(np.isin(schedule.kind, (*GIVES_GRADIENTS, Kind.I, Kind.REDUCE_GRAD, Kind.OPT)))
    kinds, ranks = schedule.kind[rows], places.rank[rows]
    pairs = len(rows) % 2 == 0 and (kinds[::2] == Kind.B).all() and (kinds[1::2] == Kind.OPT).all()
    return bool(pairs and (ranks[::2] == ranks[1::2]).all())


def _by_stage(places: Places, kinds: tuple[Kind, ...]) -> dict[tuple[int, int], Rows]:
    """Rows of some kinds, in order, by rank and stage."""
    import numpy as np

    schedule = places.schedule
    rows = np.flatnonzero(np.isin(schedule.kind, kinds))
    if not len(rows):
        return {}
    held = places.rank[rows].astype(np.int64) * schedule.num_stages + schedule.stage[rows]
    order = np.argsort(held, kind="stable")
    names, starts = np.unique(held[order], return_index=True)
    parts = np.split(rows[order], starts[1:])
    return {divmod(name, schedule.num_stages): part for name, part in zip(names.tolist(), parts, strict=True)}


def _check_gathered(places: Places, toggles: Rows, uses: Rows | None, block: int) -> None:
    """One block of one stage on one rank: gathers and frees alternate, and every use lies inside."""
    import numpy as np

    schedule = places.schedule
    gathers = schedule.kind[toggles] == Kind.UNSHARD
    odd = gathers != (np.arange(len(toggles)) % 2 == 0)
    if odd.any():
        at = int(odd.argmax())
        raise fault(schedule, int(toggles[at]), f"but the block is {'' if gathers[at] else 'not '}gathered there")
    if uses is None:
        return
    bare = np.searchsorted(toggles, uses) % 2 == 0
    if bare.any():
        row = int(uses[bare.argmax()])
        raise fault(schedule, row, f"but block {block} of stage {schedule.stage[row]} is not gathered there")


def _check_reduced(places: Places, gradients: Rows, reductions: Rows | None, blocks: set[int]) -> None:
    """One stage on one rank: each block is reduced after the last operation that adds to its gradient."""
    schedule, last = places.schedule, int(gradients[-1])
    rank, stage = int(places.rank[last]), int(schedule.stage[last])
    reduced: dict[int, int] = {}
    if reductions is not None:
        reduced = dict(zip(schedule.microbatch[reductions].tolist(), reductions.tolist(), strict=True))
    for block in sorted(blocks | set(reduced)) or [0]:
        if reduced.get(block, -1) < last:
            sentence = f"no {stage}REDUCE_GRAD{block} follows the last gradient of stage {stage} on rank {rank}."
            raise fault_at(schedule, rank, last - int(schedule.offsets[rank]), sentence)
