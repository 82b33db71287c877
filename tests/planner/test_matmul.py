"""Tiles and waves of matrix products."""

from __future__ import annotations

import pytest

from stretto.planner.matmul import DRAIN, processors_of, product_operations


def test_full_waves_take_what_they_compute() -> None:
    """2048 x 13824 in tiles of 256 x 128 on 108 multiprocessors: 864 tiles, 8 waves to the last place."""
    assert product_operations(2048, 13824, 5120, 108) == 2 * 2048 * 13824 * (5120 + DRAIN)


def test_an_open_wave_takes_as_long_as_a_full_one() -> None:
    just, more = (product_operations(2048, columns, 5120, 108) for columns in (13824, 13952))
    assert more / just > 1.03


@pytest.mark.parametrize("shape", [(2048, 1664, 6656), (1000, 300, 128), (1, 1, 64)])
def test_never_less_than_the_operations(shape: tuple[int, int, int]) -> None:
    rows, columns, inner = shape
    assert product_operations(*shape, 108) >= product_operations(*shape) == 2 * rows * columns * inner


def test_processors_by_preset() -> None:
    assert processors_of("a100:64") == 108 and processors_of("my-cluster") == 0
