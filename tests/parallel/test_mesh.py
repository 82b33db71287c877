"""The mesh: which rank sits where, and who is in whose group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from ranks import Ranks
from stretto.parallel import mesh as meshes
from stretto.parallel.mesh import AXES, GROUPED, STATE_AXES, build_mesh, make_group, make_holders
from stretto.spec.plan import PlanSpec
from stretto.spec.states import of_plan

PLANS = [
    PlanSpec(pp=2, dp_replicate=2, dp_shard=1, tp=2),
    PlanSpec(pp=2, dp_shard=2, tp=2),
    PlanSpec(pp=4, dp_replicate=2),
    PlanSpec(dp_replicate=2, dp_shard=2, tp=2),
    PlanSpec(pp=8),
    PlanSpec(dp_shard=2, cp=2, tp=2),
    PlanSpec(pp=2, cp=4),
    PlanSpec(dp_replicate=2, dp_shard=2, cp=2, shard_parameters=2, shard_gradients=4, shard_optimizer=8),
    PlanSpec(pp=2, dp_replicate=4, zero=3, shard_gradients=2, shard_optimizer=4),
]


def members(group: Any) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def describe(rank: int, world: int, plans: list[PlanSpec]) -> list[dict[str, Any]]:
    found = []
    for plan in plans:
        mesh = build_mesh(plan, rank)
        ends = make_holders(mesh, (0, plan.pp - 1)) if plan.pp > 1 else None
        found.append(
            {
                "place": tuple(mesh.index(a) for a in AXES),
                "states": tuple(mesh.index(a) for a in STATE_AXES),
                "groups": {axes: members(mesh.group(*axes)) for axes in GROUPED},
                "ends": members(ends.group) if ends is not None else None,
                "dp_index": mesh.dp_index,
                "column": [mesh.pipeline_rank(i) for i in range(plan.pp)],
            }
        )
    return found


@pytest.fixture(scope="module")
def described(ranks: Ranks) -> list[list[dict[str, Any]]]:
    """By plan, then by rank."""
    found = ranks.run(describe, 8, PLANS)
    return [[of_rank[i] for of_rank in found] for i in range(len(PLANS))]


@pytest.mark.parametrize("which", range(len(PLANS)))
def test_tp_is_fastest_and_pp_slowest(which: int, described: list[list[dict[str, Any]]]) -> None:
    plan = PLANS[which]
    for rank, mine in enumerate(described[which]):
        pp, replicate, shard, cp, tp = mine["place"]
        data = (pp * plan.dp_replicate + replicate) * plan.dp_shard + shard
        assert rank == (data * plan.cp + cp) * plan.tp + tp
        assert mine["dp_index"] == replicate * plan.dp_shard + shard


@pytest.mark.parametrize("which", range(len(PLANS)))
def test_a_group_holds_who_differs_along_its_axes_only(which: int, described: list[list[dict[str, Any]]]) -> None:
    plan, everybody = PLANS[which], described[which]
    for mine in everybody:
        for axes, found in mine["groups"].items():
            place, order = ("place", AXES) if set(axes) <= set(AXES) else ("states", STATE_AXES)
            fixed = [i for i, axis in enumerate(order) if axis not in axes]
            expected = [
                rank for rank, other in enumerate(everybody) if all(other[place][i] == mine[place][i] for i in fixed)
            ]
            assert found == (expected if len(expected) > 1 else None), axes
        assert mine["column"] == [
            rank for rank, other in enumerate(everybody) if other["place"][1:] == mine["place"][1:]
        ]
        ends = [
            rank
            for rank, other in enumerate(everybody)
            if other["states"][0] in (0, plan.pp - 1) and other["states"][2:] == mine["states"][2:]
        ]
        at_an_end = plan.pp > 1 and mine["place"][0] in (0, plan.pp - 1)
        assert mine["ends"] == (ends if at_an_end else None)


@pytest.mark.parametrize("which", range(len(PLANS)))
def test_states_are_divided_over_consecutive_data_ranks(which: int, described: list[list[dict[str, Any]]]) -> None:
    plan, states = PLANS[which], of_plan(PLANS[which])
    for rank, mine in enumerate(described[which]):
        pp, *levels, tp = mine["states"]
        data = rank // plan.tp % (plan.dp * plan.cp)
        sizes = (states.parameters, states.gradients, states.optimizer)
        expected = [data // sizes[2], data % sizes[2] // sizes[1], data % sizes[1] // sizes[0], data % sizes[0]]
        assert (pp, tp) == (mine["place"][0], mine["place"][-1]) and levels == expected


def test_one_rank_needs_no_process_group() -> None:
    mesh = build_mesh(PlanSpec(), 0)
    assert all(mesh.group(*axes) is None for axes in GROUPED)
    assert mesh.size(*AXES) == 1 and mesh.dp_index == 0


def test_all_groups_have_the_limit_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[timedelta] = []

    def make(ranks: tuple[int, ...], *, limit: timedelta) -> str:
        limits.append(limit)
        return "group"

    monkeypatch.setattr(meshes, "new_group", make)
    limit = timedelta(seconds=7)
    mesh = build_mesh(PlanSpec(pp=2, tp=2), 0, limit=limit)
    before = len(limits)
    assert make_group(mesh, "pp") == make_holders(mesh, (0, 1)).group == "group"
    assert len(limits) == before + 2 + 2 and set(limits) == {limit}
