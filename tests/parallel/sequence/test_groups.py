"""Who sits where in a document's group."""

from __future__ import annotations

from functools import partial
from typing import Any

from stretto.parallel.sequence.groups import GroupedAttend
from stretto.parallel.wire import Wire
from stretto.spec.plan import PlanSpec
from stretto.spec.sequence import Arrangement, Section, cut_sequence


def test_ranks_share_heads_as_far_as_their_number_lets_them() -> None:
    nobody: Any = None
    plan = PlanSpec(context="mesh", ulysses=4, inner_ring=2)
    attend = GroupedAttend(wire=Wire(None), arrange=partial(Arrangement.of_group, plan), local=nobody, kernel=nobody)

    def found(tokens: int, ranks: int) -> tuple[int, int, int]:
        section = Section(first=0, shares=cut_sequence(tokens, ranks, "zigzag"), start=0)
        who = attend.arrangement(section)
        return who.ranks, who.ulysses, who.inner_ring

    assert [found(100, ranks) for ranks in (2, 4, 6, 8, 16)] == [(2, 2, 1), (4, 4, 1), (6, 2, 1), (8, 4, 2), (16, 4, 2)]
    assert found(7, 8) == (8, 1, 1), "a rank without tokens has no heads to share"
