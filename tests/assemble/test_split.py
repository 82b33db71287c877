"""Which parts a stage has, and which ties cross ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stretto.assemble.split import generic, holders_of_tied, owner_of, parts_of_stages, ranks_of_parts


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_stages_hold_every_part_once_and_in_order(layers: list[int]) -> None:
    stages = parts_of_stages(layers)
    assert [s.index for s in stages] == list(range(len(layers)))
    expected = ["inputs", *(f"blocks.{i}" for i in range(sum(layers))), "outputs"]
    assert [part for s in stages for part in s.parts] == expected
    assert [sum(p.startswith("blocks.") for p in s.parts) for s in stages] == layers
    assert "inputs" in stages[0].parts and "outputs" in stages[-1].parts


def test_rules_name_any_block() -> None:
    assert generic("blocks.12.attention.q") == "blocks.*.attention.q"
    assert generic("blocks") == "blocks" and generic("inputs.blocks.3") == "inputs.blocks.3"


HEAD = {"outputs.head.weight": "inputs.tokens.weight"}


def test_a_part_is_held_where_its_stage_is_in_any_replica() -> None:
    stages = parts_of_stages([1, 1, 1, 1])
    assert ranks_of_parts([(0, 1, 1, 0)], stages)["outputs"] == (0,)
    both = ranks_of_parts([(0, 1, 2, 3), (3, 2, 1, 0)], stages)
    assert both == {"inputs": (0, 3), "blocks.0": (0, 3), "blocks.1": (1, 2), "blocks.2": (1, 2)} | {
        "blocks.3": (0, 3),
        "outputs": (0, 3),
    }


@pytest.mark.parametrize(
    ("placement", "ranks"), [([(0,)], (0,)), ([(0, 1)], (0, 1)), ([(1, 0, 2)], (1, 2)), ([(0, 1), (1, 0)], (0, 1))]
)
def test_a_tie_is_held_by_both_of_its_ends(placement: list[tuple[int, ...]], ranks: tuple[int, ...]) -> None:
    held = ranks_of_parts(placement, parts_of_stages([1] * len(placement[0])))
    assert holders_of_tied(HEAD, held) == {"inputs.tokens.weight": ranks}
    assert holders_of_tied({}, held) == {}


def test_blocks_1_and_10_are_not_mixed_up() -> None:
    held = ranks_of_parts([(0, 1)], parts_of_stages([2, 9]))
    assert holders_of_tied({"blocks.10.w": "blocks.1.w"}, held) == {"blocks.1.w": (0, 1)}


def test_a_near_copy_does_not_hide_a_far_one() -> None:
    held = ranks_of_parts([(0, 1)], parts_of_stages([2, 1]))
    tied = {"outputs.w": "inputs.w", "blocks.0.w": "inputs.w"}
    assert holders_of_tied(tied, held) == {"inputs.w": (0, 1)}


def test_owner_of_a_parameter() -> None:
    root = nn.Sequential(nn.Linear(2, 2))
    assert owner_of(root, "0.weight") == (root[0], "weight")
