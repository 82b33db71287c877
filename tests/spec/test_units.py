"""Sizes and times as people write them, there and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.spec import units
from stretto.spec.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (80e9, "80.0 GB"),
        (999.6e6, "1.00 GB"),
        (1e21, "1000000 PB"),
    ],
)
def test_bytes(value: float, text: str) -> None:
    assert units.format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 ns"), (2e-6, "2.00 us"), (0.0999, "99.9 ms"), (1.0, "1 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min")],
)
def test_seconds(value: float, text: str) -> None:
    assert units.format_seconds(value) == text


@given(st.integers(0, 10**15))
def test_what_is_formatted_reads_back(value: int) -> None:
    assert units.parse_bytes(units.format_bytes(value)) == pytest.approx(value, rel=0.006)
    assert units.parse_count(units.format_count(value)) == pytest.approx(value, rel=0.006)


def test_binary_bytes() -> None:
    assert units.parse_bytes("2 GiB") == 2**31


@pytest.mark.parametrize("text", ["", "GB", "1 XB", "-1 GB", "1 GB x", "1..2"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not bytes; write a number and one of B, kB"):
        units.parse_bytes(text)
