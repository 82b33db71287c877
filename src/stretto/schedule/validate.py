"""Proof that a schedule is right, before any process starts.

    complete      each operation that the flow asks for exists once, on the rank that holds its stage
    ordered       nothing runs before what it needs
    matched       on every channel, receives meet sends one by one in the same order
    live          no ranks wait for each other in a circle
    held          parameters are gathered where they are used, gradients reduced after the last one,
                  offloaded activations are back when they are needed, collectives meet in one order

Complete is relative to the schedule's paths, frozen stages and ``forward_only``.  An error names the
operation, says why, and points at it in the grid.  The rules are in ``verifier``, one file each.
"""

from __future__ import annotations

from stretto.schedule.arrows import Places, arrows
from stretto.schedule.progress import Semantics, check_progress
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.memory import peak_activation
from stretto.schedule.verifier.complete import check_backwards, check_forwards, check_offload
from stretto.schedule.verifier.joined import check_joined
from stretto.schedule.verifier.matched import check_matched
from stretto.schedule.verifier.placed import check_placed
from stretto.schedule.verifier.sharded import check_optimizer, check_sharded
from stretto.schedule.verifier.vocabulary import check_vocabulary
from stretto.spec.errors import ScheduleError


def validate(schedule: Schedule, *, semantics: Semantics = "buffered") -> None:
    """Raise ScheduleError unless the schedule is complete, ordered, matched, live and held.

    Under *buffered* semantics a send is over at once, under *rendezvous* when its receiver has come to it.
    """
    if semantics not in ("buffered", "rendezvous"):
        raise ScheduleError(f"Messages can't have {semantics!r} semantics; they are buffered or rendezvous.")
    check_forwards(schedule)
    places = Places(schedule)
    check_placed(places)
    check_backwards(places)
    check_offload(places)
    check_joined(places)
    check_vocabulary(places)
    if schedule.lowered:
        check_matched(places, arrows(places))
    check_progress(schedule, semantics=semantics)
    check_sharded(places)
    check_optimizer(places)


def peak_memory(schedule: Schedule, *, act_w: float = 1.0) -> tuple[float, ...]:
    """Largest activation memory of each rank.

    Unit: what one micro-batch keeps alive over one rank's whole share of the layers.  ``act_w`` is the
    fraction kept between I and W.
    """
    return peak_activation(schedule, act_w=act_w)
