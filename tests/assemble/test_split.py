"""Which parts a stage has, and which ties cross ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stretto.assemble.split import generic, holders_of_tied, owner_of, parts_of_stages
from stretto.spec.errors import UnsupportedError


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


def test_a_tie_crosses_where_its_ends_lie_on_two_ranks() -> None:
    one, two = parts_of_stages([2]), parts_of_stages([1, 1])
    names = {"outputs.head.weight", "inputs.tokens.weight"}
    assert holders_of_tied(HEAD, [0], one) == dict.fromkeys(names, False)
    assert holders_of_tied(HEAD, [0, 1], two) == dict.fromkeys(names, True)
    assert holders_of_tied(HEAD, [0, 0], two) == dict.fromkeys(names, False)
    assert holders_of_tied({}, [0, 1], two) == {}


def test_blocks_1_and_10_are_not_mixed_up() -> None:
    stages = parts_of_stages([2, 9])
    tied = {"blocks.10.w": "blocks.1.w"}
    assert holders_of_tied(tied, [0, 1], stages) == {"blocks.10.w": True, "blocks.1.w": True}


def test_a_near_copy_does_not_hide_a_far_one() -> None:
    stages = parts_of_stages([2, 1])
    tied = {"outputs.w": "inputs.w", "blocks.0.w": "inputs.w"}
    found = holders_of_tied(tied, [0, 1], stages)
    assert found == {"outputs.w": True, "blocks.0.w": False, "inputs.w": True}


def test_a_tie_to_a_rank_in_the_middle_is_refused() -> None:
    # Only the first and the last rank sum tied gradients; anything else would hang or be wrong in silence.
    stages = parts_of_stages([1, 1, 1])
    with pytest.raises(UnsupportedError, match=r"blocks\.1\.w is tied to blocks\.0\.w.*ranks 0 and 1;.*plan\.pp = 2"):
        holders_of_tied({"blocks.1.w": "blocks.0.w"}, [0, 1, 2], stages)


def test_owner_of_a_parameter() -> None:
    root = nn.Sequential(nn.Linear(2, 2))
    assert owner_of(root, "0.weight") == (root[0], "weight")
