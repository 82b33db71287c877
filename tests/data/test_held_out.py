"""Which documents are held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.data.split import split
from stretto.spec.errors import ConfigError


def offsets(lengths: list[int]) -> np.ndarray:
    """Document starts."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@given(st.lists(st.integers(2, 50), min_size=2, max_size=60), st.floats(0.001, 0.99))
def test_every_document_lies_on_one_side(lengths: list[int], fraction: float) -> None:
    sides = split(offsets(lengths), fraction)
    starts = np.concatenate([sides["train"][0], sides["validation"][0]])
    assert sorted(starts.tolist()) == offsets(lengths)[:-1].tolist()
    assert len(sides["train"][0]) and len(sides["validation"][0])


def test_the_share_is_about_right_and_growth_moves_nobody() -> None:
    small, large = (split(offsets([3] * n), 0.1)["validation"][0] for n in (5_000, 20_000))
    assert 400 < len(small) < 600 and 1_800 < len(large) < 2_200
    assert large[large < 15_000].tolist() == small.tolist()


def test_nothing_is_held_out_at_zero() -> None:
    assert split(offsets([3, 4]), 0)["train"][1].tolist() == [3, 4]
    assert "validation" not in split(offsets([3, 4]), 0)


@given(st.integers(4, 10_000), st.floats(0.001, 0.99))
def test_a_single_document_is_cut(length: int, fraction: float) -> None:
    sides = split(offsets([length]), fraction)
    (train_start,), (train_length,) = sides["train"]
    (held_start,), (held_length,) = sides["validation"]
    assert train_start == 0 and held_start == train_length and held_start + held_length == length
    assert min(train_length, held_length) >= 2 and abs(held_length - length * fraction) <= 2


def test_a_fraction_that_cannot_be() -> None:
    for fraction in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="must be at least 0 and less than 1"):
            split(offsets([3, 4]), fraction)
