"""Vocabulary parallelism: the output layer as passes S and T on every rank (Yeung et al. 2024, figure 10).

The last stage's output layer costs as much as several blocks where the vocabulary is large, and all ranks wait
for it.  Here it is cut along the vocabulary: rank r holds shard r, one of R, and runs ``rSm`` and ``rTm`` for each
micro-batch m (the shard stands where other operations have their stage; it is always the rank).

*S* multiplies the last stage's output with the shard, and takes the maximum and the sum of exponentials over
the shard's part of the vocabulary.  *T* uses those of the whole vocabulary, known after an all-reduce.

    algorithm 1   S: logits                       ─► all-reduce ─► T: both gradients ─► reduce ─► B of the last stage
    algorithm 2   S: logits, gradient of inputs   ─► all-reduce ─► B of the last stage
                                                               └─► T: gradient of weights, at any time

Algorithm 2 sums the gradient of the inputs over the shards with the same all-reduce that makes the softmax
whole, so that one barrier lies between the forward and the backward of the last stage instead of two.

**Arrows** (what ``arrows`` and the simulator hold a schedule to; l is the last stage of m's path, and b the
first backward of m: its B or I on the last stage that has one):

    rSm needs lFm                             for each rank r: l's output is broadcast
    rTm needs qSm of all ranks q              both algorithms: the all-reduce
    b   needs qTm of all ranks q              where b's rank runs its own T of m before b: algorithm 1
    b   needs qSm of all ranks q              elsewhere: algorithm 2

An arrow between two ranks takes the latency of the largest boundary, one inside a rank none.  The collectives are
not part of the order, lowered or not; the arrows stand for them.  A schedule says nowhere which algorithm it
is of: the order of T and b on b's rank does, for each micro-batch.

**Complete** means: where any S or T appears, each rank r has rSm and rTm once for each micro-batch that has a
backward, rSm alone for the others, and no rank has another's shard.  All ranks run S in the same order of
micro-batches, and T likewise, because collectives must meet.

**Costs**: a scalar S or T is the time of one rank's shard, not divided by chunks; a list is indexed by the shard.
What they keep is told in bytes (simulate/vocabulary_memory.py); without, it doesn't count.

**Place.**  With a barrier between its forward and its backward, the last stage must have other work meanwhile: the
forwards of as many more micro-batches as there are barriers, which all ranks then keep alive (1F1B: R + 2 and R + 1
in place of R).  ``weave`` tries how many forwards, and takes the fastest.

The input layer is cut likewise, but looking up rows takes next to no time: no operation stands for it, and the runtime
reads off the order when rows travel (schedule/itinerary.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule.op import Kind
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.weave import BARRIERS, weave
from stretto.schedule.progress import check_progress
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs


def vocabulary(schedule: Schedule, *, algorithm: int = 1, waiting: int = 2, costs: Costs | None = None) -> Schedule:
    """S and T come in, forwards keep their order and all others theirs; memory grows by at most 2 or 1.

    No rank keeps more than two micro-batches (algorithm 1) or one (algorithm 2) more than it did, over its whole
    share of the layers; and none more at all where it overlaps pairs, shards or offloads, since all its operations
    keep their order then.  ``waiting`` is how many T of algorithm 2 a rank may put off (each keeps the shard's
    logits alive).  ``costs`` are what S and T are placed by, not a part of the result.
    Raises ScheduleError for options that can't be and for a schedule that has S or T already.
    """
    import numpy as np

    if algorithm not in tuple(BARRIERS):
        raise ScheduleError(f"Vocabulary parallelism has no algorithm {algorithm!r}; it has 1 and 2.")
    if not isinstance(waiting, int) or waiting < 0:
        raise ScheduleError(f"Vocabulary parallelism can't let {waiting!r} T passes wait; give a number of at least 0.")
    if np.isin(schedule.kind, (Kind.S, Kind.T)).any():
        raise ScheduleError(f"{schedule.name} has S and T already; the vocabulary passes come once.")
    bare = without_messages(schedule)
    check_progress(bare)
    woven = weave(bare, algorithm=algorithm, waiting=waiting, costs=costs)
    return lower(woven) if schedule.lowered else woven
