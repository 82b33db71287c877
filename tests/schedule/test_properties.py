"""Any shape of any family: the verifier and an independent referee agree, on what is right and on what is broken.

Written against ``FAMILIES``: a family that is added is held to all of this as it stands.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from referee import objection
from stretto.schedule import Kind, Op, Schedule
from stretto.schedule.families import FAMILIES, build
from stretto.schedule.op import MESSAGES, PER_BLOCK
from stretto.schedule.passes import PASSES
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.rendezvous import lower_rendezvous
from stretto.schedule.validate import peak_memory, validate
from stretto.spec.errors import ScheduleError

Orders = list[list[Op]]

OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "sharded": st.booleans(),
    "eager_sync": st.booleans(),
    "waves": st.integers(1, 3),
    "unit": st.integers(1, 6),
    "group": st.integers(1, 8),
    "skip": st.sampled_from([0, 0.25, 0.5]),
    "swap": st.booleans(),
    "keep": st.sampled_from(["", "0"]),
    "seed": st.integers(0, 3),
    "algorithm": st.integers(1, 2),
    "waiting": st.integers(0, 2),
    "fraction": st.sampled_from([0.25, 0.5]),
    "blocks": st.integers(1, 3),
    "prefetch": st.integers(0, 2),
    "optimizer": st.booleans(),
    "units": st.integers(0, 3),
}
"""What an option of a family or a pass is tried with; those that aren't here keep their defaults."""
SEARCHED: dict[str, list[dict[str, Any]]] = {
    "auto": [
        {"ranks": ranks, "microbatches": microbatches, "chunks": chunks, "options": {"time_budget": 0.05}}
        for ranks, microbatches, chunks in ((4, 8, None), (3, 5, 2), (1, 2, 1))
    ]
}
"""Families that search for seconds: the shapes that they are tried with, each built once."""
PLAYED = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def shapes(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of ``build`` for a family, chunks and options included."""
    if name in SEARCHED:
        return st.sampled_from(SEARCHED[name])
    family = FAMILIES[name]
    counts = st.none()
    if family.chunked or family.chunk_counts:
        counts = st.sampled_from([None, *(family.chunk_counts or (1, 2, 3))])
    return st.fixed_dictionaries(
        {
            "ranks": st.integers(1, 5),
            "microbatches": st.integers(1, 9),
            "chunks": counts,
            "options": chosen(family.options),
        }
    )


def chosen(options: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """Values for some of the options of a family or a pass."""
    return st.fixed_dictionaries({}, optional={option: OPTIONS[option] for option in options if option in OPTIONS})


def built(name: str, shape: dict[str, Any]) -> Schedule:
    """The schedule; a shape that the family refuses is passed over."""
    schedule = built_once(name, json.dumps(shape, sort_keys=True))
    assume(schedule is not None)
    return schedule


@cache
def built_once(name: str, shape: str) -> Schedule | None:
    """The schedule of a shape written as JSON, None where the family refuses it."""
    try:
        return build(name, **json.loads(shape))
    except ScheduleError:
        return None


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_common_shape(name: str) -> None:
    shape = SEARCHED[name][0] if name in SEARCHED else {"ranks": 4, "microbatches": 8}
    schedule = built_once(name, json.dumps(shape, sort_keys=True))
    assert schedule is not None
    validate(schedule)


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@PLAYED
def test_what_a_family_builds_runs_to_its_end_in_every_form(name: str, data: st.DataObject) -> None:
    schedule = built(name, data.draw(shapes(name)))
    validate(schedule)
    assert objection(schedule) is None
    buffered, rendezvous = lower(schedule), lower_rendezvous(schedule)
    validate(buffered)
    assert objection(buffered) is None
    for semantics in ("buffered", "rendezvous"):
        validate(rendezvous, semantics=semantics)
        assert objection(rendezvous, semantics) is None
    for lowered in (buffered, rendezvous):
        assert without_messages(lowered) == schedule


@pytest.mark.parametrize("change", PASSES)
@given(data=st.data(), name=st.sampled_from(sorted(set(FAMILIES) - set(SEARCHED))))
@PLAYED
def test_what_a_pass_makes_of_any_family_runs_to_its_end(change: str, data: st.DataObject, name: str) -> None:
    schedule = built(name, data.draw(shapes(name)))
    try:
        schedule = PASSES[change].apply(schedule, **data.draw(chosen(PASSES[change].options)))
    except ScheduleError:
        assume(False)
    for form in (schedule, lower(schedule), lower_rendezvous(schedule)):
        validate(form)
        assert objection(form) is None
    validate(lower_rendezvous(schedule), semantics="rendezvous")


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@PLAYED
def test_memory_is_what_a_count_gives(name: str, data: st.DataObject) -> None:
    schedule = built(name, data.draw(shapes(name)))
    assume(not {Kind.O, Kind.L, Kind.R} & {Kind(kind) for kind in schedule.kind.tolist()})
    counted = []
    for rank in range(schedule.num_ranks):
        alive, most = 0, 0
        for op in schedule.ops(rank):
            alive += op.kind is Kind.F
            most = max(most, alive)
            alive -= op.kind in (Kind.B, Kind.W) or (op.kind is Kind.F and not schedule.has_backward(op.stage))
        counted.append(most * schedule.num_ranks / schedule.num_stages)
    assert peak_memory(schedule) == pytest.approx(counted)


Break = Callable[[Orders, random.Random], bool]
"""Breaks orders in place; false where there is nothing to break that way."""


def drop(orders: Orders, dice: random.Random) -> bool:
    """Leave an operation out.  Parameters may stay gathered, and an earlier reduction may be left out."""
    rank, at = somewhere(orders, dice, lambda op: op.kind not in (Kind.RESHARD, Kind.REDUCE_GRAD))
    orders[rank].pop(at)
    return True


def duplicate(orders: Orders, dice: random.Random) -> bool:
    """Run an operation a second time, somewhere on its rank."""
    rank, at = somewhere(orders, dice, lambda op: op.kind not in PER_BLOCK)
    orders[rank].insert(dice.randint(0, len(orders[rank])), orders[rank][at])
    return True


def move(orders: Orders, dice: random.Random) -> bool:
    """Run an operation on another rank."""
    if len(orders) == 1:
        return False
    rank, at = somewhere(orders, dice, lambda op: op.kind not in PER_BLOCK | {Kind.OPT})
    other = dice.choice([each for each in range(len(orders)) if each != rank])
    orders[other].insert(dice.randint(0, len(orders[other])), orders[rank].pop(at))
    return True


def reverse(orders: Orders, dice: random.Random) -> bool:
    """Swap an operation with one that needs it, on one rank."""
    needed_by = {Kind.F: (Kind.B, Kind.I), Kind.I: (Kind.W,), Kind.RECV_F: (Kind.F,), Kind.RECV_B: (Kind.B, Kind.I)}
    needed_by |= {Kind.O: (Kind.L,), Kind.L: (Kind.B, Kind.I), Kind.R: (Kind.B, Kind.I)}
    pairs = [
        (rank, first, second)
        for rank, order in enumerate(orders)
        for first, op in enumerate(order)
        for second, later in enumerate(order)
        if later.kind in needed_by.get(op.kind, ()) and (op.stage, op.microbatch) == (later.stage, later.microbatch)
    ]
    return swap_any(orders, dice, pairs)


def cross(orders: Orders, dice: random.Random) -> bool:
    """Swap two receives (or two sends) of one channel."""
    pairs = [
        (rank, first, second)
        for rank, order in enumerate(orders)
        for second, later in enumerate(order)
        for first, op in enumerate(order[:second])
        if op.kind in MESSAGES and (op.kind, op.peer) == (later.kind, later.peer)
    ]
    return swap_any(orders, dice, pairs)


def swap_any(orders: Orders, dice: random.Random, pairs: list[tuple[int, int, int]]) -> bool:
    """Swap two operations of a rank, one of the pairs (rank, position, position)."""
    if pairs:
        rank, first, second = dice.choice(pairs)
        orders[rank][first], orders[rank][second] = orders[rank][second], orders[rank][first]
    return bool(pairs)


BREAKS: tuple[Break, ...] = (drop, duplicate, move, reverse, cross)


def somewhere(orders: Orders, dice: random.Random, fits: Callable[[Op], bool]) -> tuple[int, int]:
    """Rank and position of any operation that fits."""
    places = [(rank, at) for rank, order in enumerate(orders) for at, op in enumerate(order) if fits(op)]
    return dice.choice(places)


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data(), seed=st.integers(0, 999), lowering=st.sampled_from([None, lower, lower_rendezvous]))
@PLAYED
def test_broken_schedules_are_refused(
    name: str, data: st.DataObject, seed: int, lowering: Callable[[Schedule], Schedule] | None
) -> None:
    schedule = built(name, data.draw(shapes(name)))
    schedule = lowering(schedule) if lowering else schedule
    semantics = "rendezvous" if lowering is lower_rendezvous else "buffered"
    broken = 0
    for breaks in BREAKS:
        orders = [schedule.ops(rank) for rank in range(schedule.num_ranks)]
        if breaks(orders, random.Random(seed)):
            with pytest.raises(ScheduleError):
                validate(schedule.with_orders(orders), semantics=semantics)
            broken += 1
    assert broken >= 2


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(SEARCHED)))
@given(data=st.data(), seed=st.integers(0, 999), lowered=st.booleans())
@PLAYED
def test_the_verifier_and_the_referee_agree_on_any_order(
    name: str, data: st.DataObject, seed: int, lowered: bool
) -> None:
    schedule = built(name, data.draw(shapes(name)))
    schedule = lower(schedule) if lowered else schedule
    dice = random.Random(seed)
    orders = [[replace(op, joined=False) for op in schedule.ops(rank)] for rank in range(schedule.num_ranks)]
    steps = [(rank, at, at + 1) for rank, order in enumerate(orders) for at in range(len(order) - 1)]
    for _ in range(dice.randint(1, 3)):
        swap_any(orders, dice, steps)
    changed = schedule.with_orders(orders)
    for semantics in ("buffered", "rendezvous"):
        verdict = None
        try:
            validate(changed, semantics=semantics)
        except ScheduleError as error:
            verdict = str(error)
        assert (verdict is None) == (objection(changed, semantics) is None), verdict
